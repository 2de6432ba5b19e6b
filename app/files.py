"""Files that are written whole or not at all, and directories that belong to one run. [ours]"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all: under a temporary name, then renamed. A link is replaced, never followed."""
    temporary = Path(f"{path}.tmp")  # in the same directory, since renaming is atomic within a file system
    temporary.unlink(missing_ok=True)  # a crash may have left it
    with open(temporary, "xb") as file:
        file.write(content)
    os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, from tensors on any device; metadata defaults to PEFT's."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(tensors, metadata or {"format": "pt"}))


def to_json(values: Any, **settings: Any) -> str:
    """JSON with null for NaN and infinity, which JSON does not have: one objective has no cosine."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None), **settings)


def nan_for_null(line: dict[str, Any]) -> dict[str, Any]:
    """Figures as they were before `to_json`."""
    return {name: math.nan if value is None else value for name, value in line.items()}


def read_json(path: Path, hook: Callable | None = None) -> dict[str, Any]:
    """The object in a file; hook: `nan_for_null` for figures. Raises ValueError, naming the file, if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"), object_hook=hook)
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); put it back, or make it anew") from error


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a .jsonl file, whole or not at all."""
    write_text(path, "".join(to_json(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line, object_hook=nan_for_null) for line in path.read_text("utf-8").splitlines()]


def free_directory(out: str | Path | None, name: str = "", resume: bool = False) -> Path:
    """`out`, empty unless its run is to `resume`, or the first free of runs/NAME, runs/NAME-2, …; locked to the end."""
    k = 0
    while True:
        k += 1
        directory = Path(out or f"runs/{name}" + f"-{k}" * (k > 1))
        directory.mkdir(parents=True, exist_ok=True)
        if resume or {entry.name for entry in directory.iterdir()} <= {".lock"}:
            if links := [path for path in directory.rglob("*") if path.is_symlink()]:
                raise ValueError(f"out: {links[0]} is a link, and might lead out of the run; name another directory")
            lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)  # stays open, so the lock ends with the process
            with suppress(OSError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return directory
        if out:
            raise ValueError(f"out: {directory} is not empty, or another process works in it; name another directory")
