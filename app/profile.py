"""--profile: where the rounds' time goes, measured from outside the core. [ours]"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

import firm
import ppo
from app.session import Session
from app.tables import aligned
from fedavg import Server
from rollout import Policy

PHASES = (
    (Policy, "sample", "sample"),
    (Session, "score", "score"),
    (ppo, "prepare", "reference"),
    (firm, "local_update", "update"),
    (Server, "step", "aggregate"),
)


def watch() -> dict[str, float]:
    """Wrap the phases of a round; returns the seconds of each, which grow while the program runs."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
            wait()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            seconds[name] += time.perf_counter() - started
            return result

        return run

    for owner, attribute, name in PHASES:
        setattr(owner, attribute, timed(getattr(owner, attribute), name))
    return seconds


def table(seconds: dict[str, float], total: float, rounds: int) -> str:
    """Where the time of `rounds` rounds went, `total` seconds, and the peak memory so far."""
    rows = [["phase", "s/round", "share"]]
    for name, spent in [*seconds.items(), ("rest", total - sum(seconds.values()))]:
        rows.append([name, f"{spent / rounds:.3f}", f"{spent / total:.0%}"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    return "\n".join(["", *aligned(rows), f"of {rounds} rounds, {total:.1f} s; peak memory {peak / 2**30:.2f} GiB"])
