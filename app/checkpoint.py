"""What a checkpoint keeps of a run: tensors by dotted names and a few JSON values, in one file. [ours]

Every random draw depends on (seed, purpose, round, client), so there is no generator's state to save. Tensors: θ_t, the
calibration, what clients and server keep, held-out scores. Values: rounds, κ, the log's lines, settings and hashes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from app.files import write_lines, write_tensors
from app.options import FREE
from firm import Federation
from rewards import Calibration
from settings import Config

FILE = "checkpoint/state.safetensors"  # in the run directory


def write(out: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write a run's checkpoint, from tensors on any device, and then metrics.jsonl, which is values["lines"]."""
    (out / FILE).parent.mkdir(exist_ok=True)
    metadata = {"values": json.dumps(values)}
    write_tensors(out / FILE, tensors, metadata | {"sha256": digest(tensors, metadata["values"])})
    write_lines(out / "metrics.jsonl", values["lines"])


def digest(tensors: dict[str, Tensor], values: str) -> str:
    """A hash of what a checkpoint holds, since safetensors has none."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return hashlib.sha256(values.encode() + safetensors.torch.save(tensors)).hexdigest()


def there(out: Path) -> bool:
    """Whether a run has one to go on from. Raises ValueError if somebody took it away."""
    log = out / "metrics.jsonl"
    if not (out / FILE).is_file() and log.is_file() and log.stat().st_size:
        raise ValueError(f"resume: {out / FILE} is gone, so nothing can go on; start a new run with --out")
    return (out / FILE).is_file()


def read(out: Path, now: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote. Raises ValueError if the file is damaged, or its values["identity"] is another than `now`."""
    try:
        with safetensors.safe_open(out / FILE, "pt") as file:
            metadata = file.metadata()
        tensors, values = safetensors.torch.load_file(out / FILE), json.loads(metadata["values"])
        before = values["identity"]
        if digest(tensors, metadata["values"]) != metadata["sha256"]:
            raise ValueError("its content has another hash than when it was written")
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"resume: {out / FILE} is damaged ({error}); start the run again") from error
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            raise ValueError(f"resume: {name} changed since the run began; put it back, or start a new run with --out")
    return tensors, values


def identity(config: Config, hashes: dict[str, str]) -> dict[str, Any]:
    """What a run must keep to the end: its settings, and hashes of what they name."""
    return {name: value for name, value in vars(config).items() if name not in FREE | {"out", "preset"}} | hashes


def federation_state(federation: Federation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that changes in a federation."""
    tensors = {"theta": federation.theta} | {f"server.{name}": x for name, x in federation.server.state.items()}
    tensors |= {f"calibration.{name}": x for name, x in vars(federation.calibration).items()}
    for client in federation.clients:
        for i, state in enumerate(client.state):
            tensors |= {f"client{client.index}.{i}.{name}": x for name, x in state.items()}
    return tensors, {"rounds_done": federation.rounds_done, "kl_coef": federation.kl_coef}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def restore_federation(federation: Federation, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Take back what `federation_state` gave. Tensors of θ's length go to the policy's device, the rest to the CPU."""
    device, d, kept = federation.policy.device, federation.theta.shape[-1], under(tensors, "server.")
    federation.theta = tensors["theta"].to(device)
    federation.rounds_done, federation.kl_coef = values["rounds_done"], values["kl_coef"]
    federation.server.state = {name: x.to(device) if x.shape[-1:] == (d,) else x for name, x in kept.items()}
    federation.calibration = Calibration(**under(tensors, "calibration."))
    for client in federation.clients:
        client.state = []
        while state := under(tensors, f"client{client.index}.{len(client.state)}."):
            client.state.append(state)
    federation.policy.adapter.assign(federation.theta)
