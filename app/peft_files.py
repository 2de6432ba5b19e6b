"""Adapters as PEFT's two files: `adapter_config.json` and `adapter_model.safetensors`. [ours]

Left out on purpose: PEFT's settings that compute something else than W x + scale · B A x over the base model's own W.
"""

import json
import math
from pathlib import Path

import safetensors
import safetensors.torch

from app.files import read_json, write_tensors, write_text
from lora import Adapter

# Settings that change the function, if they are on. Others that are about a start or a variant end with "_config".
UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
)  # fmt: skip
SUPPORTED = {  # other values change it as well; of the starts of A and B, PiSSA, OLoRA, … take a part out of W
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "mica"),
}  # fmt: skip


def save(adapter: Adapter, directory: str | Path, base_model: str) -> None:
    """Write both files, each whole or not at all, into `directory`. base_model: the name that PEFT loads it by."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": sorted(adapter.layers),
        "fan_in_fan_out": any(layer.transposed for layer in adapter.layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_tensors(directory / "adapter_model.safetensors", adapter.tensors())
    write_text(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def load(adapter: Adapter, directory: str | Path) -> str:
    """Read an adapter in PEFT's format, ours or PEFT's own, into this one. Returns the name of its base model.

    Raises ValueError if it does not fit.
    """
    try:
        tensors = safetensors.torch.load_file(Path(directory, "adapter_model.safetensors"))
        config = read_json(Path(directory, "adapter_config.json"))
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, LookupError, safetensors.SafetensorError) as error:
        remedy = "save it with PEFT as safetensors (a .bin file is a pickle, which is not read)"
        raise ValueError(f"adapter: {directory} cannot be read ({type(error).__name__}: {error}); {remedy}") from error
    unsupported = [key for key, values in SUPPORTED.items() if config.get(key, values[0]) not in values]
    unsupported += [key for key in config if config[key] and (key in UNSUPPORTED or key.endswith("_config"))]
    if unsupported:
        what = f"{unsupported[0]} = {str(config[unsupported[0]])[:60]}"
        raise ValueError(f"adapter: {directory} has {what}, which is not supported; train without it")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rank != adapter.rank or not math.isclose(scale, adapter.scale):
        raise ValueError(
            f"adapter: {directory} has rank {rank} and scale {scale:g}, this model rank {adapter.rank} and scale "
            f"{adapter.scale:g}; set lora_rank and lora_alpha"
        )
    adapter.load_tensors(tensors)
    return config.get("base_model_name_or_path", "")
