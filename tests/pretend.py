"""A pretended CUDA graph, for machines without a GPU: it records the operations of one step on the CPU.

Replaying it runs those operations on those operands and no Python of ours, so a step that reads something replaced
since then shows it here as on a GPU. While it records, it refuses what makes the host wait for a number or a size.
Kernels, their rounding, their speed and copies between devices take a real GPU: `python -m pytest -m gpu`.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout import Policy

WAIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class PretendedGraph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph; as a context it records."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if WAIT & set(func.tags):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Every recorded operation once more; results go to where they went the first time."""
        for func, args, kwargs, out in self.operations:
            places, results = tree_leaves(out), tree_leaves(func(*args, **kwargs))
            for place, result in zip(places, results, strict=True):
                if place.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():  # no view, not in place
                    place.copy_(result)


def pretend(policy: Policy, patch: pytest.MonkeyPatch) -> Policy:
    """Let a policy on the CPU capture its decode step in a pretended graph."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    patch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    patch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda: stream)
    patch.setattr(torch.cuda, "set_stream", lambda stream: None)
    policy.sampler.cuda_graph, policy.sampler.stream = True, stream
    return policy
