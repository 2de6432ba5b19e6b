"""Many processes, as `torchrun` starts them: a round's clients are spread over them. [ours]

Every process (a rank) holds the whole federation. It samples and trains for its share of the clients; what came of that
is exchanged, and from there on every process computes the same, so that results do not depend on how many there are,
and none has to be told the next adapter. What a client keeps travels with the rest: any rank may have it next, and the
first writes every checkpoint alone, as it does all files and lines.

An error of one rank is an exchange too, in the place of the one that the others are waiting for: all end alike. One
that is killed closes its connections, and the others' exchange fails. In a single process nothing of this happens.

Everything travels through the CPU by gloo, GPUs' tensors too: a round's clients come once, each with its adapter, its
batch for the log, and what it keeps. Left out on purpose: several machines.
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
    """Bad input that another process has found, and told."""


class Ended(ConnectionError):
    """Another process has ended, of itself or by anything but bad input."""


def join() -> None:
    """Become one of the processes that torchrun has started, if this is one; only the first one is heard."""
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
            sys.exit("torchrun: the processes of a run share one machine; start it with --nproc-per-node alone")
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def leave(together: bool) -> None:
    """Close the connections; together: after all others have come here too, or have ended."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            if together:
                dist.barrier()
            dist.destroy_process_group()


def take_gpu() -> None:
    """Give each process a GPU of its own. Raises ValueError where there are fewer of them than processes."""
    if size() > 1:
        if size() > torch.cuda.device_count():
            raise ValueError(
                f"device: {size()} processes for {torch.cuda.device_count()} GPUs; start one for each, or use "
                "--device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_this_process(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that this process works on: every N-th; all in a single process."""
    return items[dist.get_rank() :: size()] if dist.is_initialized() else items


def merged(mine: dict[int, T]) -> dict[int, T]:
    """What all processes made, by ascending numbers, on this one's device. Raises Elsewhere, Ended for their errors."""
    if size() == 1:
        return mine
    return dict(sorted((number, made) for part in _exchange(mine) for number, made in part.items()))


def from_first(value: T) -> T:
    """The first process's value, everywhere."""
    return _exchange(value)[0] if size() > 1 else value


def after_first(work: Callable[[], T]) -> T:
    """work(), on the first process before the others: what it trains or downloads then lies in the cache for them."""
    made = work() if first() else None
    from_first(None)
    return made if first() else work()


def tell(fault: str, bad_input: bool) -> None:
    """Let the other processes end with this fault, unless they have ended already."""
    if size() > 1:
        with suppress(Elsewhere, Ended):
            _exchange(None, (Elsewhere if bad_input else Ended)(fault))


@phase("exchange")
def _exchange(mine: Any, fault: Exception | None = None) -> list[Any]:
    """Everybody's, in the order of ranks."""
    buffer, found = io.BytesIO(), [b""] * size()
    torch.save((mine, fault), buffer)
    try:
        dist.all_gather_object(found, buffer.getvalue())
    except RuntimeError as error:
        what = " ".join(str(error).split())[:120]
        raise Ended(f"another process of this run has ended, see above ({what}); go on with --resume") from error
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else "cpu"
    places = {f"cuda:{number}": here for number in range(torch.cuda.device_count())}
    parts = [torch.load(io.BytesIO(part), places, weights_only=False) for part in found]
    for _, told in parts:
        if told is not None:
            raise told
    return [part for part, _ in parts]
