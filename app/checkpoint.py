"""What a checkpoint keeps of a federation: θ_t, κ, the calibration, and what clients and server keep between rounds.

Tensors by dotted names, and a few JSON values, in one file with a checksum, so that no crash can leave halves. The one
before it is kept, and used where the last is damaged. Every random draw hangs on (seed, purpose, round, client), so
there is no generator's state to save. [ours]
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from app.files import atomically
from clients import LocalTraining
from firm import Federation
from rewards import Calibration
from settings import Config

FREE = {  # settings that may change within a run: how far it goes, where, what it shows, and what fits into the memory
    "rounds", "out", "preset", "show", "eval_every", "profile", "threads", "device", "diagnostics", "cuda_graph",
    "sample_batch_size", "micro_batch_size", "gradient_checkpointing", "eval_batch_size", "reward_batch_size",
}  # fmt: skip
FILES = ("state.safetensors", "previous.safetensors")


def checksum(tensors: dict[str, Tensor], values: str) -> str:
    """Of the tensors, which lie on the CPU, with their names, types and shapes, and of the values' text."""
    return hashlib.sha256(safetensors.torch.save(tensors) + values.encode()).hexdigest()


def write_state(directory: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write a checkpoint, from tensors on any device; the last one becomes the one before it."""
    directory.mkdir(exist_ok=True)
    last, before = (directory / name for name in FILES)
    text, tensors = json.dumps(values), {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomically(last) as temporary:
        metadata = {"values": checksum(tensors, text) + text}  # in one, since the order of several is random
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))
        if last.is_file():
            os.replace(last, before)  # a crash between here and the end leaves that one


def has_state(directory: Path) -> bool:
    """Whether there is a checkpoint, whole or not."""
    return any((directory / name).is_file() for name in FILES)


def read_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote last, or before that if it is damaged. Raises ValueError where neither is whole."""
    faults = []
    for file in (directory / name for name in FILES):
        try:
            tensors = safetensors.torch.load_file(file)
            with safetensors.safe_open(file, "pt") as opened:
                digest, brace, text = opened.metadata()["values"].partition("{")
            if digest not in ("", checksum(tensors, brace + text)):  # older ones have none
                raise ValueError("its checksum is another")
            values = json.loads(brace + text)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            faults.append(f"{file.name}: {error}")
            continue
        if faults:
            print(f"note: {directory / FILES[0]} is damaged; the run goes on from the checkpoint before it")
        return tensors, values
    raise ValueError(f"resume: {directory} is damaged ({'; '.join(faults)}); start the run anew")


def what_is_fixed(config: Config, fingerprint: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint says of the settings, and of what they name, that a run must keep."""
    settings = {name: value for name, value in config.flat().items() if name not in FREE}
    return {"settings": settings, "fingerprint": fingerprint}


def check_unchanged(values: dict[str, Any], config: Config, fingerprint: dict[str, str]) -> None:
    """Raise ValueError where a checkpoint's values, a run's settings and what they name do not go together any more."""
    now = config.flat()
    for name, then in values.get("settings", {}).items():  # older checkpoints have none
        if name in now and now[name] != then:
            raise ValueError(
                f"resume: {name} is {now[name]} in config.json and was {then} when the run began; put it back, or "
                "start a new run with --out"
            )
    if isinstance(values["fingerprint"], dict):  # else it is an older one, which hashed less
        for what, digest in fingerprint.items():
            if values["fingerprint"].get(what) != digest:
                raise ValueError(f"resume: {what} changed since the run began; start a new run with --out")


def federation_state(federation: Federation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that changes in a federation: tensors by dotted names, and JSON values."""
    server = {f"server.{name}": t.clone() for name, t in federation.server_state.items()}  # it may be θ itself
    tensors = {"theta": federation.theta} | server
    for prefix, training in trainings(federation):
        tensors |= {f"{prefix}{name}": t for name, t in training.state().items()}
    values = {"rounds_done": federation.rounds_done, "kl_coef": federation.kl_coef, "shape": shape(federation)}
    values |= {"method": federation.method.name, "learner": federation.method.learner.__name__}
    values["held"] = [client.objectives for client in federation.clients]
    values["calibration"] = federation.calibration.to_dict() if federation.calibration else None
    return tensors, values


def trainings(federation: Federation) -> Iterator[tuple[str, LocalTraining]]:
    """Every local training of every client, with the beginning of its tensors' names."""
    for client in federation.clients:
        for i, training in enumerate(client.trainings):
            yield f"run{i}.client{client.index}.", training


def shape(federation: Federation) -> list[int]:
    """Local trainings, clients, objectives: what a checkpoint must have in common with the federation it goes to."""
    return [len(federation.clients[0].trainings), len(federation.clients), len(federation.names)]


def restore_federation(federation: Federation, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Take back what `federation_state` gave. What the server remembers in θ's length goes where θ is, the rest, a few
    float64 numbers, stays on the CPU.

    Raises ValueError where the checkpoint is of another federation.
    """
    _, own = federation_state(federation)
    compared = ("shape", "method", "learner", "held")  # older checkpoints lack all but the first
    fits = [values.get(key, own[key]) == own[key] for key in compared]
    if tensors["theta"].shape != federation.theta.shape or not all(fits):
        raise ValueError("resume: the checkpoint is of another federation; resume with its own settings")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    device, server = federation.policy.device, under("server.")
    federation.theta = tensors["theta"].to(device)
    federation.rounds_done, federation.kl_coef = values["rounds_done"], values["kl_coef"]
    long = federation.theta.shape
    federation.server_state = {name: t.to(device) if t.shape[-1:] == long else t for name, t in server.items()}
    calibration = values["calibration"]
    federation.calibration = Calibration.from_dict(calibration) if calibration else None
    for prefix, training in trainings(federation):
        training.restore(under(prefix))
    federation.policy.adapter.assign(federation.theta)
