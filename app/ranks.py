"""Many processes, as `torchrun` starts them: a round's clients are spread over them. [ours]

Every process (a rank) holds the whole federation. It samples and trains for its share of the clients; the results are
exchanged, and from there on every process computes the same. So results do not depend on how many there are. What a
client keeps travels with the rest, because any rank may train it next; the first rank writes all files and lines.

docs/gpu.md has the commands for one machine and for several.

Everything travels through the CPU by gloo, as safetensors and JSON: what a peer sends cannot execute code. Each machine
has its own files and cache. The first process writes the run directory; --resume needs its config.json on all machines.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from clients import Contribution, Step, Update
from fedavg import Upload
from ppo import Advantages, Batch
from rollout import Rollout

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a user's reward may take long; a rank that died is noticed at once, by its connections
RECORDS = {each.__name__: each for each in (Contribution, Upload, Update, Step, Batch, Advantages, Rollout)}


def join() -> None:
    """Become one of the processes that torchrun has started, if this is one; only the first one is heard."""
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def take_gpu() -> None:
    """Give each process a GPU of its own. Raises ValueError if a machine has fewer of them than processes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > torch.cuda.device_count():
        raise ValueError(f"device: {here} processes for {torch.cuda.device_count()} GPUs; start one for each GPU")
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


def mine(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that this process works on: every N-th; all in a single process. See `firm.Alone`."""
    return items[dist.get_rank() :: size()] if dist.is_initialized() else items


def merged(results: dict[int, T]) -> dict[int, T]:
    """The results of all processes, by ascending numbers, on this one's device."""
    return dict(sorted((number, result) for part in exchanged(results) for number, result in part.items()))


def after_first(work: Callable[[], T]) -> T:
    """work(), on each machine's first process before the others: they find in the cache what it trains or downloads."""
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    result = work() if leads else None
    barrier()
    return result if leads else work()


def exchanged(value: Any) -> list[Any]:
    """The values of all processes, by rank: records of tensors and plain values."""
    if size() == 1:
        return [value]
    sent = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(sent)]))
    parts = [torch.empty(int(max(lengths)), dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, torch.cat([sent, parts[0][len(sent) :]]))
    return [unpacked(part[:n].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


def packed(value: Any) -> bytes:
    """A safetensors file, whose tensor `value` says in JSON what the others are of: RECORDS, dicts, lists, values."""
    tensors: dict[str, Tensor] = {}

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = f"{len(tensors)} {x.device.type}"
            tensors[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(x, dict):
            return {"dict": [[key, plain(item)] for key, item in x.items()]}
        if isinstance(x, list | tuple):
            return {type(x).__name__: [plain(item) for item in x]}
        return {type(x).__name__: plain(vars(x))} if type(x).__name__ in RECORDS else x

    text = json.dumps(plain(value)).encode()  # first: it fills `tensors`
    return safetensors.torch.save(tensors | {"value": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def unpacked(sent: bytes) -> Any:
    """What `packed` was given; what was on a GPU comes to this process's, if it has one."""
    tensors, gpu = safetensors.torch.load(sent), torch.cuda.is_available()

    def built(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        ((kind, content),) = x.items()
        if kind == "tensor":
            return tensors[content].to(content.split()[1] if gpu else "cpu")
        if kind == "dict":
            return {key: built(item) for key, item in content}
        if kind in RECORDS:
            return RECORDS[kind](**built(content))
        return {"tuple": tuple, "list": list}[kind](built(item) for item in content)

    return built(json.loads(tensors.pop("value").numpy().tobytes()))
