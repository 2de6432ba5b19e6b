"""Many processes, as `torchrun` starts them: a round's clients are spread over them. [ours]

Every process (a rank) holds the whole federation. It samples and trains for its share of the clients; what came of that
is exchanged, and from there on every process computes the same, so that results do not depend on how many there are,
and none has to be told the next adapter. What a client keeps travels with the rest: any rank may have it next, and the
first writes every checkpoint alone, as it does all files and lines.

An error of one rank is an exchange too, in the place of the one that the others are waiting for: all end alike. One
that is killed closes its connections, and the others' exchange fails. In a single process nothing of this happens.

Everything travels through the CPU by gloo, GPUs' tensors too: it is one exchange a round, of some adapters.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from app.stopwatch import phase

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a user's reward may take long; a rank that died is noticed at once, by its connections


class Elsewhere(ValueError):
    """An error that another process has told, or its silence."""


def join() -> None:
    """Become one of the processes that torchrun has started, if this is one; only the first one is heard."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def take_gpu() -> None:
    """Give each process a GPU of its own. Raises ValueError where there are fewer of them than processes."""
    if size() > 1:
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"device: {os.environ['LOCAL_WORLD_SIZE']} processes for {there} GPUs; start one for each, or use "
                "--device cpu"
            )
        torch.cuda.set_device(local)


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """What of the items is this process's: every N-th."""
    return items[dist.get_rank() :: size()] if dist.is_initialized() else items


def merged(mine: dict[int, T]) -> dict[int, T]:
    """What all processes made, by ascending numbers, on this one's device. Raises Elsewhere for their errors."""
    if size() == 1:
        return mine
    parts = _exchange(mine)
    return dict(sorted(item for part in parts for item in part.items()))


def from_first(value: T) -> T:
    """The first process's value, everywhere."""
    return _exchange(value)[0] if size() > 1 else value


def after_first(work: Callable[[], T]) -> T:
    """work(), on the first process before the others: what it trains or downloads then lies in the cache for them."""
    made = work() if first() else None
    from_first(None)
    return made if first() else work()


def tell(fault: str) -> None:
    """Let the other processes end with this fault, unless they have ended already."""
    if size() > 1:
        with suppress(Elsewhere):
            _exchange(None, fault)


@phase("exchange")
def _exchange(mine: Any, fault: str | None = None) -> list[Any]:
    """Everybody's, in the order of ranks."""
    buffer, found = io.BytesIO(), [b""] * size()
    torch.save((mine, fault), buffer)
    try:
        dist.all_gather_object(found, buffer.getvalue())
    except RuntimeError as error:
        raise Elsewhere("another process of this run has ended, see above; go on with --resume") from error
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else "cpu"
    places = {f"cuda:{number}": here for number in range(torch.cuda.device_count())}
    parts = [torch.load(io.BytesIO(part), places, weights_only=False) for part in found]
    for _, told in parts:
        if told is not None:
            raise Elsewhere(told)
    return [part for part, _ in parts]
