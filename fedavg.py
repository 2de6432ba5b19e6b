"""The server's arithmetic: who takes part, what a client sends, the average, the bytes (McMahan et al. 2017).

    θ_{t+1} = θ_t + η_s Σ_c w_c (θ_c − θ_t),      w_c = n_c / Σ n_c,

n_c is the number of prompts that client c holds, unless a method weighs clients in its own way (`fedmoa.py`).
η_s = 1 is plain FedAvg, Σ_c w_c θ_c. [paper: FedAvg. ours: η_s, w_c]

Averaging A and B separately loses mean(BA) − mean(B) mean(A).

Left out on purpose: compression, asynchrony.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from settings import Config


def average(updates: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the clients' vectors: updates [C, d], weights [C] ≥ 0 of any positive sum -> [d].

    The sum runs in client order in float64. An update of weight 0 leaves no trace, even if it is NaN.
    Raises ValueError for weights that cannot be normalised.
    """
    if not ((weights >= 0).all() and weights.sum() > 0):
        raise ValueError(f"average: the weights {weights.tolist()} must be non-negative with a positive sum")
    total = torch.zeros(updates.shape[1], dtype=torch.float64, device=updates.device)
    for share, update in zip((weights.double() / weights.double().sum()).tolist(), updates, strict=True):
        if share > 0:
            total += share * update.double()
    return total.to(updates.dtype)


def sample_clients(n_clients: int, per_round: int, rng: np.random.Generator) -> list[int]:
    """The indices of this round's clients, drawn without replacement, in ascending order."""
    return sorted(rng.choice(n_clients, size=per_round, replace=False).tolist())


def staying(chosen: Sequence[int], dropout: float, rng: np.random.Generator) -> list[int]:
    """The chosen clients that do not vanish before their upload; each vanishes with probability `dropout`.

    If all would vanish, the one with the largest draw stays, since a round needs a client. [ours]
    """
    u = rng.random(len(chosen))
    return [client for client, x in zip(chosen, u, strict=True) if x >= min(dropout, u.max())]


@dataclass
class Upload:
    """All that one client sends at the end of a round."""

    tensors: dict[str, Tensor]  # "theta" [trainings, d], the adapter that each local training ended at; a method's own
    numbers: dict[str, float]  # "prompts" n_c; "kl", the mean KL to the reference per response in nats; a method's own

    @property
    def fault(self) -> str | None:
        """The name of what is NaN or infinite; None if all is finite."""
        values = self.tensors | {name: torch.tensor(x) for name, x in self.numbers.items()}
        return next((name for name, x in values.items() if not x.isfinite().all()), None)


def n_bytes(tensors: dict[str, Tensor], numbers: int = 0) -> int:
    """Bytes of a message: its tensors, and so many float64 numbers."""
    return sum(x.numel() * x.element_size() for x in tensors.values()) + 8 * numbers


def prompts_held(uploads: Sequence[Upload], config: Config | None = None) -> Tensor:
    """n_c [C] in float64, the weights of FedAvg."""
    return torch.tensor([upload.numbers["prompts"] for upload in uploads], dtype=torch.float64)


@dataclass(frozen=True)
class Aggregation:
    """How uploads become one update (stage 4), and the numbers that each client reports for it (stage 3)."""

    name: str
    help: str
    weights: Callable[[Sequence[Upload], Config], Tensor] = prompts_held  # of the clients [C], of any positive sum
    numbers: Callable[[Any, Tensor, int], dict[str, float]] = lambda client, raw, S: {}  # raw [B, M], S to a prompt
    combine: Callable[[Tensor, Tensor], Tensor] = average  # updates [C, d], weights [C] -> [d]
    settings: tuple[str, ...] = ()
    needs_primary: bool = False  # whether every client must hold the primary objective, the first one


FEDAVG = Aggregation("fedavg", "by the prompts that a client holds")


@dataclass
class Server:
    """Uploads -> θ. A method's own server overrides what differs; `state` is all that it keeps between rounds."""

    config: Config
    aggregation: Aggregation = FEDAVG
    state: dict[str, Tensor] = field(default_factory=dict)
    equal_objectives = False  # whether every client must hold all objectives
    asks_first = False  # whether `broadcast` exchanges messages with the clients, before their local runs
    exchanged = (0, 0)  # bytes up and down of a client's exchanges with `broadcast` in this round

    def broadcast(self, federation: Any, work: Iterable[tuple], faults: dict[int, str]) -> dict[str, Tensor]:
        """What it sends to every client beside θ and κ. A server that `asks_first` goes through work, (client, batch at
        θ_t, raw rewards) of this process, each made as it is reached; `federation.gathered` then has all answers.
        """
        return {}

    @staticmethod
    def numbers(client: Any, raw: Tensor) -> dict[str, float]:
        """What this server needs to know of a client's raw rewards [B, M]."""
        return {}

    def training_shares(self, updates: Tensor, weights: Tensor) -> Tensor:
        """How much each local training counts [trainings]; updates θ_{c,i} − θ_t [C, trainings, d], weights [C]."""
        return torch.full((updates.shape[1],), 1.0 / updates.shape[1], dtype=torch.float64)

    def step(self, theta: Tensor, uploads: Sequence[Upload]) -> tuple[Tensor, Tensor, Tensor]:
        """The next θ [d], the clients' shares [C] of sum 1, the local trainings'. ValueError if θ is not finite."""
        weights = self.aggregation.weights(uploads, self.config)
        updates = torch.stack([upload.tensors["theta"] - theta for upload in uploads])  # [C, trainings, d]
        mixing = self.training_shares(updates, weights)
        mixed = torch.einsum("i,cid->cd", mixing.to(updates), updates)
        theta = theta + self.config.server_lr * self.aggregation.combine(mixed, weights)
        if not theta.isfinite().all():
            raise ValueError("server_lr: the server's new adapter is not finite; lower server_lr or lr")
        return theta, weights / weights.sum(), mixing
