"""What a checkpoint keeps of a federation: θ_t, κ, the calibration, and what clients and server keep between rounds.

Tensors by dotted names, and a few JSON values; `Session.save` writes them. Every random draw hangs on (seed, purpose,
round, client), so there is no generator's state to save. [ours]
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from clients import LocalTraining
from firm import Federation
from rewards import Calibration


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
