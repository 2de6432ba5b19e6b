"""Files that are whole or not there: written under a temporary name beside their own, then renamed. [ours]"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


@contextmanager
def atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it takes `path`'s place at the end of the block.

    After an error, or a crash, what stood at `path` before still stands there; an error leaves no temporary file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # the same directory: renaming is atomic within one file system
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomically(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, from tensors on any device; metadata defaults to PEFT's."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
