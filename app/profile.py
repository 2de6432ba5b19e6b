"""--profile: where the rounds' time goes, measured from outside the core. [ours]"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

import firm
import ppo
from app.session import Session
from app.tables import aligned


@contextmanager
def watch(session: Session, lines: Sequence[Any], say: Callable[[str], None]) -> Iterator[None]:
    """Time the phases of a session's rounds inside the context, and say them at its end; lines: one for each round."""
    phases = {
        "sample": [(session.policy, "sample")],
        "score": [(session.federation, "score"), (session, "score")],  # the latter between the rounds
        "reference": [(ppo, "prepare")],
        "update": [(firm, "local_update")],
        "aggregate": [(session.federation.server, "step")],
    }
    done, started, seconds = len(lines), time.perf_counter(), defaultdict(float)
    with ExitStack() as patches:
        for phase, functions in phases.items():
            for owner, name in functions:
                patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), phase, seconds)))
        yield
    if len(lines) > done:
        say(table(seconds, time.perf_counter() - started, len(lines) - done))


def timed(function: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """`function`, whose time is added to seconds[phase]."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        wait()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        seconds[phase] += time.perf_counter() - started
        return result

    return run


def table(seconds: dict[str, float], total: float, rounds: int) -> str:
    """Where the time of `rounds` rounds went, `total` seconds, and the peak memory so far."""
    rows = [["phase", "s/round", "share"]]
    for phase, spent in [*seconds.items(), ("rest", total - sum(seconds.values()))]:
        rows.append([phase, f"{spent / rounds:.3f}", f"{spent / total:.0%}"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    return "\n".join(["", *aligned(rows), f"of {rounds} rounds, {total:.1f} s; peak memory {peak / 2**30:.2f} GiB"])
