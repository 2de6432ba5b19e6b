"""Where a round's time goes (`--profile`): phases as decorated functions, each second counted once. [ours]

    @phase("sample")
    def sample(...): ...

costs nothing until a `Stopwatch` runs. Inside a phase another may begin; the outer one's clock stands still meanwhile,
so that the phases add up to the whole. A GPU works through its queue after Python has moved on: a running stopwatch
waits for it at every border, which makes the sum a little slower than a run that is not watched.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_running: "Stopwatch | None" = None


class Stopwatch:
    """`with Stopwatch() as watch:` adds up `watch.seconds` by phase; what is in no phase is "other"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open = ["other"]  # the innermost phase stands last

    def __enter__(self) -> "Stopwatch":
        global _running
        _running, self.last = self, now()
        return self

    def __exit__(self, *_) -> None:
        global _running
        self.turn()
        _running = None

    def turn(self) -> None:
        """The time since the last border goes to the innermost open phase."""
        border = now()
        self.seconds[self.open[-1]] += border - self.last
        self.last = border


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A named stretch of work, as a decorator or in a with statement."""
    watch = _running
    if not watch:
        yield
        return
    watch.turn()
    watch.open.append(name)
    try:
        yield
    finally:
        watch.turn()
        watch.open.pop()


def now() -> float:
    """Seconds, once the GPU, where there is one, has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> dict[str, str | float]:
    """What is measured, and how much: taken of the GPU, CUDA's own half a GiB aside, or by the process."""
    if torch.cuda.is_available():
        return {"memory": "GPU memory", "peak_gib": torch.cuda.max_memory_reserved() / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory": "memory of the process", "peak_gib": peak / 2**30}
