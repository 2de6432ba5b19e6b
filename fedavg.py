"""The server's arithmetic: who takes part, what a client sends, the average, the bytes (McMahan et al. 2017).

    θ_{t+1} = θ_t + η_s Σ_c w_c (θ_c − θ_t),      w_c = n_c / Σ n_c,

n_c the number of prompts client c holds, unless a method has weights of its own (`fedmoa.py`). η_s = 1 is plain FedAvg,
Σ_c w_c θ_c. [paper: FedAvg. ours: η_s, w_c]

Averaging A and B separately is not averaging BA: mean(BA) − mean(B) mean(A) is what the federation loses by it, logged
as `adapter/averaging_residual`. Every method that averages A and B separately has this residual.

Faults. A client may vanish from a round (`client_dropout`), or a gradient or a number of its upload may not be finite.
The round is then that of the others alone: the average, λ where the server picks it from uploads, κ's
mean KL, the log. What such a client keeps at home is as it was before, and the log names it. Where no client is left,
the run ends, and says what was not finite first. [ours]

Left out on purpose: secure aggregation, compression, asynchrony.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from app.stopwatch import phase


def average(updates: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the clients' vectors.

    updates [C, d], weights [C] non-negative, of any sum above 0. Returns [d] in the updates' type. The sum runs in
    client order in float64.
    Raises ValueError where no weight is left or the shapes do not match.
    """
    weights = weights.double()
    if updates.dim() != 2 or weights.shape != updates.shape[:1]:
        raise ValueError(f"average: {tuple(updates.shape)} updates for {tuple(weights.shape)} weights")
    if not (weights >= 0).all() or weights.sum() <= 0:
        raise ValueError(f"average: the weights {weights.tolist()} must be non-negative with a positive sum")
    total = torch.zeros(updates.shape[1], dtype=torch.float64, device=updates.device)
    for share, update in zip((weights / weights.sum()).tolist(), updates, strict=True):
        if share > 0:  # so that an update of no weight, which may be NaN, leaves no trace
            total += share * update.double()
    return total.to(updates.dtype)


def sample_clients(clients: int, per_round: int, rng: np.random.Generator) -> list[int]:
    """The indices of this round's clients, drawn without replacement, in ascending order."""
    if not 1 <= per_round <= clients:
        raise ValueError(f"clients_per_round: {per_round} must lie between 1 and the number of clients, {clients}")
    return sorted(rng.choice(clients, size=per_round, replace=False).tolist())


def staying(chosen: Sequence[int], dropout: float, rng: np.random.Generator) -> list[int]:
    """Those of a round's clients that do not vanish before their upload, as each does with this probability.

    Where all would, the last to go stays: a round without any client would be none. [ours]
    """
    u = rng.random(len(chosen))
    return [client for client, x in zip(chosen, u, strict=True) if x >= min(dropout, u.max())]


@dataclass
class Upload:
    """All that one client sends at the end of a round; the ledger's bill is made from it."""

    thetas: Tensor  # [trainings, d] the adapter that each local training ended at; FIRM has one
    prompts_held: int
    kl: float | None = None  # mean KL to the reference per response, in nats: κ adapts to it, where there is one
    numbers: dict[str, float] = field(default_factory=dict)  # of the method's own

    @property
    def fault(self) -> str | None:
        """Why the server cannot accept it: a number that is NaN or infinite; None where all are finite."""
        if not torch.isfinite(self.thetas).all():
            return "its adapter after the last step is not finite; lower lr"
        if not all(map(math.isfinite, self.scalars)):
            return f"the numbers of its upload are not all finite: {self.scalars}; lower lr"
        return None

    @property
    def scalars(self) -> list[float]:
        """What travels beside the adapters."""
        return [self.prompts_held, *([] if self.kl is None else [self.kl]), *self.numbers.values()]


def prompts_held(clients: Sequence[Any]) -> Tensor:
    """n_c [C] in float64, the weights of the average; of clients or of their uploads."""
    return torch.tensor([client.prompts_held for client in clients], dtype=torch.float64)


def mean_update(theta: Tensor, uploads: Sequence[Upload], weights: Tensor, mixing: Tensor) -> Tensor:
    """Σ_c w_c Σ_i m_i (θ_{c,i} − θ) [d]; theta [d], weights w [C] of any sum above 0, mixing m [trainings]: how much
    each local training counts.

    Raises ValueError where a client uploads another number of adapters.
    """
    if any(len(upload.thetas) != len(mixing) for upload in uploads):
        raise ValueError(
            f"mean_update: uploads of {[len(u.thetas) for u in uploads]} adapters for {len(mixing)} shares"
        )
    updates = [torch.einsum("i,id->d", mixing.to(upload.thetas), upload.thetas - theta) for upload in uploads]
    return average(torch.stack(updates), weights)


# ---- the bytes -----------------------------------------------------------------------------------------------


def message_bytes(tensors: dict[str, Tensor], scalars: int = 0) -> dict[str, int]:
    """Bytes on the wire of one message, by part: what safetensors, our format on disk, makes of it.

    payload: the tensors' numbers; scalars: that many float64 numbers beside them; header: names, shapes and types.
    """
    parts = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    payload = sum(t.numel() * t.element_size() for t in parts.values())
    if scalars:
        parts["scalars"] = torch.zeros(scalars, dtype=torch.float64)
    total = len(safetensors.torch.save(parts)) if parts else 0
    return {"payload": payload, "scalars": 8 * scalars, "header": total - payload - 8 * scalars}


class Ledger:
    """What one client sends (`up`, `upload`) and receives (`down`) in one round, in bytes as serialised.

    Clients' messages are of equal size, so each kind of message is counted once, on one client's. The calibration comes
    once per run, before the first round, and stands in summary.json.
    """

    def __init__(self) -> None:
        self.bytes = {f"{way}/{part}": 0 for way in ("upload", "download") for part in ("payload", "header", "scalars")}

    def up(self, tensors: dict[str, Tensor], scalars: int = 0) -> None:
        """Count a message from a client to the server: tensors, and a number of float64 scalars."""
        self._count("upload", tensors, scalars)

    def down(self, tensors: dict[str, Tensor], scalars: int = 0) -> None:
        """Count a message from the server to a client."""
        self._count("download", tensors, scalars)

    def upload(self, upload: Upload) -> None:
        """Count a client's upload: its adapters, prompts held, KL, and every number of the method's own."""
        self.up({"theta": upload.thetas}, scalars=len(upload.scalars))

    def _count(self, way: str, tensors: dict[str, Tensor], scalars: int) -> None:
        for part, size in message_bytes(tensors, scalars).items():
            self.bytes[f"{way}/{part}"] += size

    def metrics(self) -> dict[str, int]:
        """The six columns, and their sums `upload_bytes` and `download_bytes`."""
        sums = {
            f"{way}_bytes": sum(size for key, size in self.bytes.items() if key.startswith(way))
            for way in ("upload", "download")
        }
        return sums | self.bytes


@dataclass
class Server:
    """What the server has in a round; a method's own server parts read and change it."""

    lr: float  # η_s
    state: dict[str, Tensor]  # all that it remembers between rounds; a checkpoint keeps it
    rng: np.random.Generator
    settings: Any = None  # of the method, where it has some
    ledger: Ledger = field(default_factory=Ledger)
    mixing: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))  # [trainings], see mean_update
    weights: Tensor | None = None  # [C] what each upload counts in the average


@phase("aggregate")
def federated_average(theta: Tensor, uploads: Sequence[Upload], server: Server) -> Tensor:
    """FedAvg with a server rate: θ + η_s Σ_c w_c (θ_c − θ). theta [d] -> [d]."""
    return theta + server.lr * mean_update(theta, uploads, server.weights, server.mixing)
