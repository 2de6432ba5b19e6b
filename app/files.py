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


def reserve_directory(wanted: str | None, name: str) -> Path:
    """Make the run's directory, so that no other run can take it: --out, or without it the next free runs/`name`.

    Raises ValueError where an explicit --out holds anything, or cannot be made.
    """
    base = Path("runs") / name
    names = [Path(wanted)] if wanted else [base, *(Path(f"{base}-{n}") for n in range(2, 10_000))]
    for out in names:
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError as error:
            if wanted and out.is_dir() and not any(out.iterdir()):
                return out
            if wanted:
                go_on = f", or --resume {out}" if (out / "checkpoint").is_dir() else ""
                raise ValueError(f"out: {out} exists and is not empty; name another directory{go_on}") from error
        except OSError as error:
            raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another directory") from error
    raise ValueError("out: every name in runs/ is taken; name a directory")
