"""A pretend GPU, for machines without one: a device whose tensors keep their numbers on the CPU.

It refuses what a GPU refuses: tensors of two devices in one operation and, while a graph is captured, every word
between host and device. It counts what a GPU does silently: those words, and the bytes they carry. A captured graph
holds the recorded operations and their operands; replaying it runs no Python of ours, so a step that reads what has
been replaced since then shows it here as it would there.

Kernels, their rounding and their speed it cannot show: that takes `python -m pytest -m gpu` on a real one.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import sampler

NAME = "lazy"  # a type of device that torch knows, has no kernels for, and runs backward in the calling thread
aten = torch.ops.aten
WAIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # for a number, or for a size
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class PretendTensor(Tensor):
    """A tensor that says it is on the device; `numbers` is where they are."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"PretendTensor({self.numbers})"

    def tolist(self) -> list:
        device.word("read", "tolist", self)
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return device.run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Inside `with device:` tensors can be made on it. `words` lists (kind, operation, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[tuple[str, str, int]] = []
        self.recording: list | None = None
        self.lift: list[bool] = []  # torch's setting outside, a stack

    def __enter__(self) -> "PretendDevice":
        self.words = []
        self.lift.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is made on the CPU, then moved
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lift.pop())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def word(self, kind: str, operation: object, tensor: Tensor) -> None:
        """Host and device speak: kind is `read` (one number, or a size), `up` or `down`."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        self.words.append((kind, str(operation), tensor.numel() * tensor.element_size()))

    def run(self, func, args: tuple, kwargs: dict) -> object:
        """One operation: checked, counted, computed on the CPU, and recorded if a graph is being captured."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, PretendTensor)]
        there = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0]  # a CPU scalar may join in
        onto = bool(here)
        if kwargs.get("device") is not None:
            onto = torch.device(kwargs["device"]).type == NAME
            kwargs = kwargs | {"device": torch.device("cpu")}
            if here and not onto:
                self.word("down", func, here[0])
            elif tensors and not here and onto:
                self.word("up", func, tensors[0])
        elif func is aten.copy_.default and here and there:
            onto = isinstance(args[0], PretendTensor)
            self.word("up" if onto else "down", func, args[1])
        elif func in INDEXING and here and there and isinstance(args[0], PretendTensor):
            for index in tree_leaves(args[1]):  # indices may come from the CPU, values may not
                if isinstance(index, Tensor) and not isinstance(index, PretendTensor):
                    self.word("up", func, index)
            if len(args) > 2 and not isinstance(args[2], PretendTensor) and args[2].dim() > 0:
                raise RuntimeError(f"{func}: values on the CPU, self on {NAME}")
        elif here and there:
            kinds = [f"{type(x).__name__}{list(x.shape)}" for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {', '.join(kinds)}")
        if here and func not in INDEXING and WAIT & set(func.tags):
            self.word("read", func, here[0].new_empty(1))
        if here and func in INDEXING and any(getattr(i, "dtype", None) == torch.bool for i in tree_leaves(args[1])):
            self.word("read", func, here[0].new_empty(1))  # how many are true

        bare_args, bare_kwargs = tree_map(lambda x: x.numbers if isinstance(x, PretendTensor) else x, (args, kwargs))
        out = func(*bare_args, **bare_kwargs)
        if not onto and not here:
            return out
        if self.recording is not None:
            self.recording.append((func, bare_args, bare_kwargs, [x for x in tree_leaves(out) if torch.is_tensor(x)]))
        wrapped = tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) and onto else x, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


device = PretendDevice()


class PretendGraph:
    """In the place of torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Every recorded operation once more; results go where they went the first time."""
        for func, args, kwargs, results in self.operations:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if torch.is_tensor(x)]
            for place, result in zip(results, again, strict=True):
                if place.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():  # no view, not in place
                    place.copy_(result)


@contextlib.contextmanager
def capturing(graph: PretendGraph, stream: object = None) -> Iterator[None]:
    """In the place of torch.cuda.graph."""
    device.recording = []
    try:
        yield
        graph.operations = device.recording
    finally:
        device.recording = None


@contextlib.contextmanager
def pretended() -> Iterator[PretendDevice]:
    """The device, with torch.cuda's graphs and streams on it."""
    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
        patch.setattr(torch.cuda, "graph", capturing)
        patch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        patch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "set_stream", lambda stream: None)
        patch.setattr(sampler, "GPU", NAME)
        patch.setattr(torch, NAME, torch.cpu, raising=False)  # checkpointing asks for a module of the device's name
        yield device
