r"""LoRA by hand (Hu et al. 2021): train two thin matrices beside every frozen one.

             x [.., in]
            /          \
    W [out, in]      A [r, in]       A: small random numbers
      frozen             |           B: zeros, so the adapted model starts as the base model
            \       B [out, r]       scale = alpha / r      (or alpha / √r: rsLoRA, Kalajdzievski 2023)
             \          /
          y = W x + scale · B A x

Switching the adapter off *is* the reference policy π_ref: there is no reference model. All that a client uploads is the
flat vector θ of every A and B, d numbers. [paper: LoRA rank 16. ours: alpha, targets, init]

The base weights stay bit for bit what was loaded: merging, done only while responses are sampled from float32 weights,
keeps a copy of every adapted weight and puts it back.

Left out on purpose: dropout on x (it would make ratios differ from 1 at lr = 0), biases, other adapters (DoRA, IA³).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is stored [in, out]

from app.fields import Checked, Count, Positive, setting
from app.files import write_tensors, write_text

# PEFT's settings that do not change W x + scale · B A x. Which layers are adapted, the tensors' names say; A and B
# may have been started in any way that left W alone; every setting that is not listed here must be off.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "use_rslora",
}  # fmt: skip
ALLOWED = {
    "peft_type": ["LORA"],
    "task_type": ["CAUSAL_LM", None],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "mica"],
}


@dataclass
class LoRAConfig(Checked):
    """Which layers get an adapter, and how large."""

    lora_rank: Count = setting(16, "rank r of every adapter [paper: 16]")
    lora_alpha: Positive | None = setting(None, "numerator of the scale alpha / r; 2r where not given")
    lora_targets: list[str] = setting(
        ["all-linear"], "module names to adapt, e.g. q_proj v_proj; all-linear is every one but the output head"
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(r) instead of alpha / r")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_targets:
            raise ValueError("lora_targets: name at least one module, or all-linear")

    @property
    def alpha(self) -> float:
        """alpha as used, 2r by default. [ours]"""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """Factor in front of B A x."""
        return self.alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it; A and B are float32 whatever the base's type."""

    def __init__(self, base: nn.Linear | Conv1D, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.transposed = isinstance(base, Conv1D)
        n_in, n_out = base.weight.shape if self.transposed else base.weight.shape[::-1]
        bound = 1.0 / math.sqrt(n_in)  # what kaiming_uniform(a = √5) comes to, PEFT's default
        A = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(base.weight.device))  # [r, in]
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=base.weight.device))  # [out, r]
        self.scale = scale
        self.enabled = True
        self.rounded: tuple[Tensor, Tensor] | None = None  # see `factors`
        self.rounded_at: tuple | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as they are multiplied with, in the base layer's type.

        Over float32 weights A and B themselves. Over 16-bit weights the products run in 16 bits too, as in any
        mixed-precision training: rounded copies then, at fixed addresses, which a CUDA graph can read, and the
        gradient is taken in them; averages, sums of gradients and the optimizer stay float32. They are made anew when
        A or B has changed, by torch's own count of changes, which writing into `.data` and fused optimizers escape.
        [ours]
        """
        weight, factors = self.base.weight, (self.A, self.B)
        if weight.dtype == torch.float32:
            return factors
        now = tuple((id(x), x._version, x.device, weight.dtype) for x in factors)
        if now != self.rounded_at:
            if self.rounded is None or self.rounded[0].dtype != weight.dtype or self.rounded[0].device != weight.device:
                self.rounded = tuple(torch.empty_like(x, dtype=weight.dtype, requires_grad=True) for x in factors)
            with torch.no_grad():
                for copy, factor in zip(self.rounded, factors, strict=True):
                    copy.copy_(factor)
            self.rounded_at = now
        return self.rounded

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the base layer's type."""
        y = self.base(x)
        if not self.enabled:
            return y
        A, B = self.factors()
        z = nn.functional.linear(x, A)  # [..., r]
        # y + scale · z Bᵀ in one product, so that nothing of y's size is scaled or added by itself
        add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_  # without a graph, into y itself
        return add(y.view(-1, y.shape[-1]), z.view(-1, z.shape[-1]), B.T, alpha=self.scale).view_as(y)


class Adapter:
    """Every LoRALinear of one model, and θ, the flat vector of their parameters in a fixed order.

    Made by `inject`. `layers` maps the base layer's name to its LoRALinear; `parameters` is the list
    [A₀, B₀, A₁, B₁, …]; `size` is d; `tied` says that a base layer's weight is used elsewhere in the model, too.
    """

    def __init__(self, layers: dict[str, LoRALinear], config: LoRAConfig, tied: bool) -> None:
        self.layers, self.config, self.tied = layers, config, tied
        self.parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
        self.size = sum(p.numel() for p in self.parameters)

    def leaves(self) -> list[Tensor]:
        """What a loss is differentiated in, shaped and ordered like `parameters`: they themselves over float32 weights.

        Over 16-bit weights their rounded copies, whose gradients are 16-bit: sum them up in float32. A `backward()` of
        one's own leaves its gradients there too, and none in `parameters`.
        """
        return [factor for layer in self.layers.values() for factor in layer.factors()]

    def vector(self) -> Tensor:
        """A copy of θ [d], float32."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Copy θ [d] into the parameters. Raises ValueError for another length."""
        if theta.shape != (self.size,):
            raise ValueError(f"adapter: got {tuple(theta.shape)} numbers for an adapter of size {self.size}")
        for p, part in zip(self.parameters, self.split(theta), strict=True):
            p.copy_(part)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a vector [d] into views shaped like the parameters."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @property
    def enabled(self) -> bool:
        """False inside `disabled`."""
        return all(layer.enabled for layer in self.layers.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, no layer adds its adapter: this is π_ref, unless the weights are merged."""
        before = self.enabled
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, W + scale · BA stands in W's place and the adapter costs no time; W comes back bit for bit.

        Holds a second copy of every adapted weight meanwhile. Wrong for `tied` weights, and in 16 bits the sum is
        rounded, which can swallow much of a small adapter.
        """
        saved = {}
        try:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    weight, delta = layer.base.weight, layer.scale * (layer.B @ layer.A)  # [out, in]
                    saved[name] = weight.clone()
                    weight.copy_(weight.float() + (delta.T if layer.transposed else delta))
            with self.disabled():
                yield
        finally:
            with torch.no_grad():
                for name, weight in saved.items():
                    self.layers[name].base.weight.copy_(weight)

    @contextmanager
    def ready_to_sample(self) -> Iterator[None]:
        """Inside, the adapter costs as little as it can at the same fidelity; it must not change there.

        Merged into float32 weights, which is exact to rounding. Over 16-bit weights merging would lose it: there the
        rounded factors are brought up to date, before a CUDA graph reads them without a line of Python. [ours]
        """
        exact = all(layer.base.weight.dtype == torch.float32 for layer in self.layers.values())
        if self.enabled and exact and not self.tied:
            with self.merged():
                yield
        else:
            self.leaves()
            yield

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of every layer, by the names that PEFT gives them."""
        return {
            f"base_model.model.{name}.lora_{factor}.weight": getattr(layer, factor)
            for name, layer in self.layers.items()
            for factor in "AB"
        }

    def save(self, directory: str | Path, base_model: str) -> None:
        """Write PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.config.lora_rank,
            "lora_alpha": self.config.alpha,
            "target_modules": sorted(self.layers),
            "use_rslora": self.config.rslora,
            "fan_in_fan_out": any(layer.transposed for layer in self.layers.values()),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        write_tensors(directory / "adapter_model.safetensors", self.tensors())
        write_text(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")

    def load(self, directory: str | Path) -> None:
        """Read an adapter in PEFT's format, ours or PEFT's own, into this one.

        Raises ValueError where a file is missing, damaged or not finite, where rank, scale or adapted layers differ
        from this adapter's, or where it needs what is left out here.
        """
        config, weights = (Path(directory) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        for file in (config, weights):
            if not file.is_file():
                raise ValueError(f"adapter: {file} is missing; name a directory in PEFT's format")
        rank, scale = rank_and_scale(config)
        if rank != self.config.lora_rank or not math.isclose(scale, self.config.scale):
            raise ValueError(
                f"adapter: {directory} has rank {rank} and scale {scale:g}, this model rank {self.config.lora_rank} "
                f"and scale {self.config.scale:g}; set lora_rank and lora_alpha"
            )
        try:
            saved = safetensors.torch.load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"adapter: {weights} is damaged ({error}); save it anew") from error
        theirs, ours = ({name: x.shape for name, x in tensors.items()} for tensors in (saved, self.tensors()))
        if theirs != ours:
            odd, _ = min(theirs.items() ^ ours.items())
            raise ValueError(f"adapter: {directory} adapts other layers (first: {odd}); set lora_targets alike")
        if broken := [name for name, x in saved.items() if not x.isfinite().all()]:
            raise ValueError(f"adapter: {weights} has weights that are not finite (first: {broken[0]}); save it anew")
        with torch.no_grad():
            for name, parameter in self.tensors().items():
                parameter.copy_(saved[name])


def rank_and_scale(file: Path) -> tuple[int, float]:
    """r and scale from an `adapter_config.json` by PEFT.

    Raises ValueError where it is damaged, and by name for a setting with which PEFT would not compute
    W x + scale · B A x over the base model's own W. [ours]
    """
    try:
        saved = json.loads(file.read_text("utf-8"))
        rank, alpha = saved["r"], saved["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if saved.get("use_rslora") else rank)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"adapter: {file} is damaged ({type(error).__name__}: {error}); save it anew") from error
    for key, value in saved.items():
        if key not in NEUTRAL and (value not in ALLOWED[key] if key in ALLOWED else value):
            remedy = "use an adapter trained without it"
            if key == "init_lora_weights":  # starts that take a part out of W; PEFT can put it back
                remedy = "save it with path_initial_model_for_weight_conversion"
            raise ValueError(f"adapter: {file} has {key} = {shortened(value)}, which this LoRA has not; {remedy}")
    return rank, scale


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0) -> Adapter:
    """Freeze `model` and put an adapter beside every target layer, in place.

    A target names a module by its last part or by a dotted suffix of its name, as in PEFT; `all-linear` takes every
    nn.Linear and Conv1D but the output embedding. Raises ValueError where a target matches no such layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    chosen: dict[str, nn.Module] = {}
    for target in config.lora_targets:
        hits = {n: m for n, m in linear.items() if target == "all-linear" or f".{n}".endswith(f".{target}")}
        if not hits:
            names = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise ValueError(
                f"lora_targets: no linear layer is called {target!r}; this model has {', '.join(names) or 'none'}"
            )
        chosen |= hits
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same θ
    layers = {}
    for name in linear:  # the model's own order, whatever the order of the targets
        if name in chosen:
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(linear[name], config.lora_rank, config.scale, generator)
            setattr(model.get_submodule(parent), child, layers[name])
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return Adapter(layers, config, tied=any(uses[id(layer.base.weight)] > 1 for layer in layers.values()))
