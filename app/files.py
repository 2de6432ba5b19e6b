"""Files that are whole or not there: written under a temporary name beside their own, then renamed. [ours]"""

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def to_json(values: Any, **settings: Any) -> str:
    """JSON with null where a figure does not exist (one objective has no cosine): NaN and infinity are not JSON."""
    finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
    return json.dumps(finite, **settings)


def read_json(text: str) -> dict[str, Any]:
    """The inverse of `to_json`, for one object: NaN for null."""
    return json.loads(text, object_hook=lambda found: {k: math.nan if v is None else v for k, v in found.items()})


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that `to_json` made, one from each line."""
    return [read_json(line) for line in file.read_text("utf-8").splitlines()]


@contextmanager
def new_directory(wanted: str | None, name: str) -> Iterator[Path]:
    """Make the run's directory, so that no other run can take it: --out, or without it the next free runs/`name`.

    If the block fails before anything is in it, it goes again. Raises ValueError where an explicit --out holds
    anything, or cannot be made.
    """
    numbered = (Path("runs", f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    for out in [Path(wanted)] if wanted else numbered:
        try:
            out.mkdir(parents=True)
            break
        except FileExistsError as error:
            if wanted and out.is_dir() and not any(out.iterdir()):
                break
            if wanted:
                go_on = f", or --resume {out}" if (out / "checkpoint").is_dir() else ""
                raise ValueError(f"out: {out} exists and is not empty; name another directory{go_on}") from error
        except OSError as error:
            raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another directory") from error
    try:
        yield out
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
