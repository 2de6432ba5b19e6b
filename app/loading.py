"""Checkpoints of transformers, loaded whole or refused in one line; and a hash of the files a run depends on. [ours]"""

import hashlib
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.utils import chat_template_utils, find_adapter_config_file, logging

# A chat template that prints the date would make other prompts tomorrow, and no run could go on.
chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime(2025, 1, 1))
logging.set_verbosity_error()  # the user sees our lines, not the loading bars of libraries
logging.disable_progress_bar()


def pretrained(
    kind: str, name: str, dtype: str = "float32", device: str | torch.device = "cpu", new_head: bool = False
) -> tuple[torch.nn.Module, Any]:
    """A model of transformers' class `kind` and its tokenizer, by directory or hub name, with dropout set to zero.

    new_head: for training a reward model, which has one label: all but the body may be fresh, and a BERT's pooler too.
    Raises ValueError for a checkpoint that cannot be loaded, lacks weights, or has an adapter_config.json.
    """
    if not Path(name).is_dir():
        print(f"{name} is not a directory here; looking for it on the hub", file=sys.stderr)
    try:
        if find_adapter_config_file(name):  # with PEFT installed, the weights would silently be others than without
            raise ValueError("it has an adapter_config.json: merge it; a policy's may go with --adapter")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config.num_labels = 1 if new_head else config.num_labels
        for part in (config, config.get_text_config(decoder=True)):  # the latter: in models that also see or hear
            for key in [key for key, value in vars(part).items() if "drop" in key and isinstance(value, float)]:
                setattr(part, key, 0.0)
        model, info = getattr(transformers, kind).from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
        )
        body = "" if model.base_model is model else f"{model.base_model_prefix}."
        fresh = {key for key in info["missing_keys"] if new_head and (not key.startswith(body) or "pooler" in key)}
        if lacks := set(info["missing_keys"]) - fresh:
            raise ValueError(f"it lacks {min(lacks)}, which {kind} needs: pass a checkpoint that was trained as one")
    except Exception as error:  # a model's code may raise anything
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model.to(device), tokenizer


def fingerprint(*names: str | Path) -> str:
    """A hash of whole files, of the files in a directory, or of a checkpoint that the hub has given before."""
    digest = hashlib.sha256()
    for name in names:
        root = Path(name) if Path(name).exists() else Path(snapshot_download(str(name), local_files_only=True))
        for file in sorted(root.iterdir()) if root.is_dir() else [root]:
            if file.is_file() and not file.name.startswith("."):
                with open(file, "rb") as content:
                    digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
