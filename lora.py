r"""LoRA by hand (Hu et al. 2021): train two thin matrices beside every frozen one.

             x [.., in]
            /          \
    W [out, in]      A [r, in]       A: small random numbers
      frozen             |           B: zeros, so the adapted model starts as the base model
            \       B [out, r]       scale = alpha / r
             \          /
          y = W x + scale · B A x

Switching the adapter off *is* the reference policy π_ref: there is no reference model. A client trains the flat vector
θ of every A and B, d numbers. [paper: LoRA rank 16. ours: alpha, targets, init]

Left out on purpose: dropout on x (it would make ratios differ from 1 at lr = 0), biases, other adapters (DoRA, IA³),
and files (`app/peft_files.py` writes and reads PEFT's).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is stored [in, out]


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it; A and B are float32 also over 16-bit weights."""

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

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the base layer's type."""
        y = self.base(x)
        if not self.enabled:
            return y
        A, B = self.A.to(y.dtype), self.B.to(y.dtype)  # 16-bit products, if W is; gradients arrive in float32 [ours]
        return y + linear(self.scale * linear(x, A), B)  # scaled while it is thin, [..., r]


class Adapter:
    """Every LoRALinear of one model, and θ, the flat vector of their parameters in a fixed order.

    `inject` makes it. `layers` maps the base layer's name to its LoRALinear. `parameters` is the list [A₀, B₀, A₁, …]
    in which losses are differentiated, float32; `size` is d. `tied`: a base layer's weight is used elsewhere, too.
    """

    def __init__(self, layers: dict[str, LoRALinear], rank: int, scale: float, tied: bool) -> None:
        self.layers, self.rank, self.scale, self.tied = layers, rank, scale, tied
        self.parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
        self.size = sum(p.numel() for p in self.parameters)

    def vector(self) -> Tensor:
        """A copy of θ [d], float32."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @property
    def version(self) -> int:
        """Another number after every change of θ, also by `merged`: a graph that was recorded before is stale."""
        return sum(x._version for layer in self.layers.values() for x in (layer.base.weight, layer.A, layer.B))

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Copy θ [d] into the parameters. One that is there already changes no version."""
        if torch.equal(theta.to(self.parameters[0]), self.vector()):
            return
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
        """Merge while sampling, if that is exact: inside, W + scale · BA stands in W's place.

        The adapter then costs no time, and W comes back bit for bit from a second copy. 16-bit weights are left alone,
        since rounding the sum could swallow much of a small adapter; so are `tied` ones. [ours]
        """
        exact = not self.tied and all(layer.base.weight.dtype == torch.float32 for layer in self.layers.values())
        if not (self.enabled and exact):
            yield
            return
        saved = {}
        try:
            for name, layer in self.layers.items():
                weight, delta = layer.base.weight, layer.scale * (layer.B @ layer.A).detach()  # [out, in]
                saved[name] = weight.clone()
                weight.add_(delta.T if layer.transposed else delta)
            with self.disabled():
                yield
        finally:
            for name, weight in saved.items():
                self.layers[name].base.weight.copy_(weight)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of every layer, by the names that PEFT gives them."""
        return {
            f"base_model.model.{name}.lora_{factor}.weight": getattr(layer, factor)
            for name, layer in self.layers.items()
            for factor in "AB"
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors, named and shaped like `tensors()`, into the parameters.

        Raises ValueError if layers or shapes differ, or if a value is not finite; then nothing is copied.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        expected = {name: parameter.shape for name, parameter in self.tensors().items()}
        if shapes != expected:
            first, _ = min(shapes.items() ^ expected.items())
            raise ValueError(f"adapter: it adapts other layers or shapes (first: {first}); set lora_targets alike")
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"adapter: {broken[0]} is not finite; use another save of it")
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])


def inject(model: nn.Module, rank: int, scale: float, targets: Sequence[str], seed: int = 0) -> Adapter:
    """Freeze `model` and put an adapter beside every target layer, in place.

    A target names a module by its last part or by a dotted suffix of its name, as in PEFT; `all-linear` is every
    nn.Linear and Conv1D except the output embedding. Raises ValueError if a target matches no such layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in linears if target == "all-linear" or f".{name}".endswith(f".{target}")}
        if not matches:
            names = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"lora_targets: no linear layer is called {target!r}; choose from {', '.join(names)}")
        chosen |= matches
    generator = torch.Generator().manual_seed(seed)  # on the CPU: every device starts from the same θ
    layers = {}
    for name, base in linears.items():  # in the model's order, not in that of the targets
        if name in chosen:
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(base, rank, scale, generator)
            setattr(model.get_submodule(parent), child, layers[name])
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return Adapter(layers, rank, scale, tied=any(uses[id(layer.base.weight)] > 1 for layer in layers.values()))
