"""What a client has, what one of its optimizer steps may look at, and the records that a round leaves.

FIRM has one local training a round, on all the objectives that a client holds. Some methods combine objectives first
(k < M rewards), or train several times from the same θ_t, once per objective. `fedavg.Upload` says what a client sends;
what a training keeps stays at home.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from fedavg import Upload
from lora import Adapter
from ppo import Advantages, Batch
from settings import Config


class Purpose(IntEnum):
    """What a random stream is for: the first key after the seed."""

    COHORT = 1
    TRAINING = 2
    CALIBRATION = 3
    EVALUATION = 4
    SERVER = 5
    PERSONAL = 6
    PREDICTOR_TRAINING = 11
    PREDICTOR_EVALUATION = 12
    DROPOUT = 13


def stream(seed: int, *keys: int) -> np.random.Generator:
    """An independent random stream per seed, purpose, and what it is for, a round and a client mostly. [ours]

    So the draws of a client that holds the same prompts depend on nobody else, on no order of calls, on no restart.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=keys))


@dataclass
class Client:
    """One client. The first of all M objectives is the primary one."""

    index: int
    prompts: Sequence[Any]
    objectives: list[int]  # the m of the M objectives that it holds, in ascending order
    preference: Tensor  # p [m] among them
    task: int = 0
    state: list[dict[str, Tensor]] = field(default_factory=list)  # by each local training, from round to round

    def draw(self, size: int, rng: np.random.Generator) -> list[Any]:
        """`size` of this client's prompts, none twice before each was taken once; every round draws afresh."""
        n = len(self.prompts)
        order = np.concatenate([rng.permutation(n) for _ in range(-(-size // n))])[:size]
        return [self.prompts[i] for i in order]


@dataclass
class Context:
    """What one optimizer step of a local training may look at. A method assigns in `state`, and changes no tensor."""

    config: Config
    round: int  # t, of config.rounds
    message: dict[str, Tensor]  # what the server sent, θ_t [d] as "theta" among it
    mix: Tensor  # [m, k] the rewards of this training are the client's m scores @ mix
    batch: Batch  # with these k rewards
    preference: Tensor  # p [k] among these rewards
    state: dict[str, Tensor]
    epoch: int = 0
    theta: Tensor | None = None  # [d] where the adapter stands
    J: Tensor | None = None  # [k, d]
    gram: Tensor | None = None  # [k, k] JJᵀ


def optimizer_step(optimizer: Optimizer, adapter: Adapter, gradient: Tensor, max_norm: float | None) -> None:
    """One step along −gradient [d], clipped to max_norm."""
    if max_norm is not None:
        gradient = gradient * (max_norm / gradient.norm().clamp_min(max_norm))
    for parameter, part in zip(adapter.parameters, adapter.split(gradient), strict=True):
        parameter.grad = part
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Step:
    """One optimizer step of a local training."""

    lam: Tensor  # [k] λ
    gram: Tensor  # [k, k] JJᵀ
    first_order_gain: float  # min_j −⟨g_j, Δθ⟩: below 0 the worst-served reward loses, as it may under Adam
    entropy: float
    clip_fraction: float
    approx_kl: float


@dataclass
class Update:
    """One local training of one client, for the log."""

    mix: Tensor  # [m, k], as in Context
    batch: Batch  # without hidden states
    advantages: Advantages
    steps: list[Step]


@dataclass
class Contribution:
    """A client's part in a round: what it sends, what it keeps, and what the simulation logs of it."""

    upload: Upload
    state: list[dict[str, Tensor]]
    raw: Tensor | None  # [B, M] its rewards in raw units, NaN for objectives that it does not hold
    updates: list[Update]


@dataclass
class Round:
    """One communication round, of the C clients whose uploads arrived."""

    number: int
    message: dict[str, Tensor]  # what the server sent beside κ, θ_t [d] as "theta" among it
    arrived: dict[int, Contribution]  # by client, in ascending order
    faults: dict[int, str]  # why a client was left out
    dropped: int  # clients that vanished
    shares: Tensor  # [C] how much each upload counted, of sum 1
    training_shares: Tensor  # [trainings] how much each local training counted
    kl_coef: float  # κ, in this round
    exchanged: tuple[int, int]  # bytes up and down of a client before its local run, see `fedavg.Server`
