"""What a checkpoint keeps of a run: one file, a SHA-256 digest and what it is of, as `ranks.packed` writes it. [ours]

Every random draw depends on (seed, purpose, round, client), so there is no generator's state to save: θ_t, κ, the
calibration, what clients and server keep, held-out scores, the log's lines, settings and hashes.
"""

import hashlib
from pathlib import Path
from typing import Any

from app.files import write_bytes, write_lines
from app.options import FREE
from app.ranks import packed, unpacked
from firm import Federation
from rewards import Calibration
from settings import Config

FILE = "checkpoint"  # in the run directory


def write(out: Path, content: dict[str, Any]) -> None:
    """Write a run's checkpoint, and then metrics.jsonl, which is content["lines"]."""
    body = packed(content)
    write_bytes(out / FILE, hashlib.sha256(body).digest() + body)
    write_lines(out / "metrics.jsonl", content["lines"])


def there(out: Path) -> bool:
    """Whether a run has one to go on from. Raises ValueError if somebody took it away."""
    log = out / "metrics.jsonl"
    if not (out / FILE).is_file() and log.is_file() and log.stat().st_size:
        raise ValueError(f"resume: {out / FILE} is gone, so nothing can go on; start a new run with --out")
    return (out / FILE).is_file()


def read(out: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError if the file is damaged, or its "identity" is another than `now`."""
    sent = (out / FILE).read_bytes()
    if hashlib.sha256(sent[32:]).digest() != sent[:32]:
        raise ValueError(f"resume: {out / FILE} is damaged (it has another hash than when written); start again")
    content = unpacked(sent[32:])
    before = content["identity"]
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            raise ValueError(f"resume: {name} changed since the run began; put it back, or start a new run with --out")
    return content


def identity(config: Config, hashes: dict[str, str]) -> dict[str, Any]:
    """What a run must keep to the end: its settings, and hashes of what they name."""
    return {name: value for name, value in vars(config).items() if name not in FREE | {"out", "preset"}} | hashes


def federation_state(federation: Federation) -> dict[str, Any]:
    """All that changes in a federation."""
    state = {name: getattr(federation, name) for name in ("theta", "rounds_done", "kl_coef")}
    clients = [client.state for client in federation.clients]
    return state | {"server": federation.server.state, "calibration": vars(federation.calibration), "clients": clients}


def restore_federation(federation: Federation, state: dict[str, Any]) -> None:
    """Take back what `federation_state` gave. Tensors of θ's length go to the policy's device."""
    device, d = federation.policy.device, federation.theta.shape[-1]
    federation.theta, federation.rounds_done = state["theta"].to(device), state["rounds_done"]
    federation.kl_coef, federation.calibration = state["kl_coef"], Calibration(**state["calibration"])
    federation.server.state = {n: x.to(device) if x.shape[-1:] == (d,) else x for n, x in state["server"].items()}
    for client, kept in zip(federation.clients, state["clients"], strict=True):
        client.state = kept
    federation.policy.adapter.assign(federation.theta)
