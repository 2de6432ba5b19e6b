"""Many processes, as `torchrun` starts them: a round's clients are spread over them. [ours]

Every process (a rank) holds the whole federation. It samples and trains for its share of the clients; the results are
exchanged, and from there on every process computes the same. So results do not depend on how many there are. What a
client keeps travels with the rest, because any rank may train it next; the first rank writes all files and lines.

Everything travels through the CPU by gloo, as tensors and plain values. Left out on purpose: several machines.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clients import Contribution, Step, Update
from fedavg import Upload
from ppo import Advantages, Batch
from rollout import Rollout

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a user's reward may take long; a rank that died is noticed at once, by its connections
RECORDS = [Contribution, Upload, Update, Step, Batch, Advantages, Rollout]


def join() -> None:
    """Become one of the processes that torchrun has started, if this is one; only the first one is heard."""
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
            sys.exit("torchrun: the processes of a run share one machine; start it with --nproc-per-node alone")
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def take_gpu() -> None:
    """Give each process a GPU of its own. Raises ValueError if there are fewer of them than processes."""
    if size() > torch.cuda.device_count():
        raise ValueError(f"device: {size()} processes for {torch.cuda.device_count()} GPUs; start one for each GPU")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


class Exchange:
    """How the processes of a run share clients, prompts and results; see `firm.Alone`."""

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that this process works on: every N-th; all in a single process."""
        return items[dist.get_rank() :: size()] if dist.is_initialized() else items

    def merged(self, results: dict[int, T]) -> dict[int, T]:
        """The results of all processes, by ascending numbers, on this one's device."""
        return dict(sorted((number, result) for part in exchanged(results) for number, result in part.items()))


def after_first(work: Callable[[], T]) -> T:
    """work(), on the first process before the others: they find in the cache what it trains or downloads."""
    result = work() if first() else None
    barrier()
    return result if first() else work()


def exchanged(value: Any) -> list[Any]:
    """The values of all processes, by rank. They travel as tensors and plain values; reading them executes no code."""
    if size() == 1:
        return [value]
    buffer, parts = io.BytesIO(), [b""] * size()
    torch.save(value, buffer)
    dist.all_gather_object(parts, buffer.getvalue())
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else "cpu"
    places = {f"cuda:{number}": here for number in range(torch.cuda.device_count())}
    with torch.serialization.safe_globals(RECORDS):
        return [torch.load(io.BytesIO(part), places, weights_only=True) for part in parts]
