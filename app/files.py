"""Files that are whole or not there: written under a temporary name beside their own, then renamed. And directories
that belong to one run. [ours]
"""

import fcntl
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        temporary.write_bytes(safetensors.torch.save(tensors, metadata or {"format": "pt"}))


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


def logged(file: Path, rounds: int) -> list[dict[str, Any]]:
    """The lines of the first `rounds` rounds in a metrics.jsonl; a crash may have left one more, or a piece of one.

    Raises ValueError where any of them is missing or damaged.
    """
    if not rounds:
        return []
    try:
        lines = [read_json(line) for line in file.read_text("utf-8").splitlines()[:rounds]]
        if [line["round"] for line in lines] == list(range(rounds)):
            return lines
        fault = f"it has {len(lines)} of {rounds} rounds"
    except (OSError, ValueError, LookupError, TypeError) as error:
        fault = str(error)
    raise ValueError(f"resume: {file} cannot be used ({fault}); put it back, or start a new run with --out")


LOCK = ".lock"


@contextmanager
def owned(directory: Path) -> Iterator[Path]:
    """Within, the directory is this process's alone: by a lock on a file in it, which goes with the process, however it
    ends. Yields the directory. Raises ValueError where another process owns it.
    """
    with open(directory / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock.fileno()), os.stat(directory / LOCK))
        except (BlockingIOError, FileNotFoundError):  # FileNotFoundError: its owner has just taken it away
            mine = False
        if not mine:
            raise ValueError(f"out: another run is at work in {directory}; wait for it, or name another directory")
        try:
            yield directory
        finally:
            (directory / LOCK).unlink(missing_ok=True)


@contextmanager
def new_directory(wanted: str | None, name: str) -> Iterator[Path]:
    """Make the run's directory and own it within: --out, or without it the next free runs/`name`.

    Bad input, an error before there is a checkpoint, leaves no directory. Raises ValueError where an explicit --out
    holds anything, cannot be made, or belongs to another run.
    """
    numbered = (Path("runs", f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    for out in [Path(wanted)] if wanted else numbered:
        try:
            out.mkdir(parents=True, exist_ok=bool(wanted))
            break
        except FileExistsError as error:
            if wanted:
                raise ValueError(f"out: {out} exists and is no directory; name another") from error
        except OSError as error:
            raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another directory") from error
    with owned(out):
        if any(entry.name != LOCK for entry in out.iterdir()):
            go_on = f", or --resume {out}" if (out / "config.json").is_file() else ""
            raise ValueError(f"out: {out} exists and is not empty; name another directory{go_on}")
        try:
            yield out
        except Exception as error:  # not where the user or the disk stops it
            if not isinstance(error, OSError) and not (out / "checkpoint").is_dir():
                (out / "config.json").unlink(missing_ok=True)
                (out / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # something is in it after all
                    out.rmdir()
            raise
