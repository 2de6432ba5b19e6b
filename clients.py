"""What a client keeps to itself: its prompts, its objectives, and what its local trainings leave from round to round.

    Client            prompts, and which of the objectives it holds
    └── LocalTraining one training on k rewards: its learner (a critic, say), and its optimizer's moments if kept

FIRM makes one local training a round, on all the objectives that the client holds. Some methods combine objectives
first (k < M), or train several times from the same θ_t, once per objective, each time with a learner of its own.

All this stays at home; what a client sends is in `fedavg.Upload`. Random streams hang on (seed, purpose, round,
client), so that a client's draws do not depend on who else takes part, on the order of calls, or on a restart. [ours]

The records at the end are what a round leaves to whoever logs it (`app/metrics.py`, `evidence/diagnostics.py`).
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

import mgda
import ppo
from app.fields import Checked, NonNegative, Positive, setting
from app.ranks import merged
from fedavg import Ledger, Upload
from lora import Adapter
from ppo import PPO, Advantages, Batch, Gradients, NotFinite, PPOConfig
from rollout import Policy, Rollout

T = TypeVar("T")
CLIENT_SAMPLING, TRAINING, CALIBRATION, EVALUATION, SERVER, PERSONAL = range(1, 7)  # what a stream is for: first key
DROPOUT = 13  # 11 and 12 are `pluralllm.py`'s


@dataclass
class ClientConfig(Checked):
    """How a client steps."""

    lr: NonNegative = setting(2e-4, "client learning rate [ours]")
    optimizer: Literal["adam", "adam-keep", "sgd"] = setting(
        "adam", "client optimizer: adam (fresh every round), adam-keep (its moments stay with the client) or sgd [ours]"
    )
    max_grad_norm: Positive | None = setting(None, "clip the combined gradient to this norm")


def stream(seed: int, *keys: int) -> np.random.Generator:
    """An independent random stream per (seed, purpose, …); no order of calls and no restart can change it.

    The keys after the purpose are the round and the client, or a held-out prompt's index.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=keys))


class LocalTraining:
    """One training that a client does in every round, on the k rewards scores @ columns.

    columns [m, k] of the m objectives that the client holds; preference [k] among the rewards; learner: how it learns;
    primary: which of its objectives is the primary one, and which of the rewards where nothing combines them. A
    method's `adapt` may move the preference away from the prior; for that the gradients taken [k, d] in the last step
    are kept.
    """

    def __init__(self, columns: Tensor, preference: Tensor, learner: PPO, primary: int | None = None) -> None:
        self.columns, self.preference, self.learner, self.primary = columns, preference, learner, primary
        self.prior, self.taken = preference, None
        self.moments: dict[int, dict[str, Tensor]] = {}  # of the policy's optimizer

    def optimizer(self, parameters: list[Tensor], config: ClientConfig) -> torch.optim.Optimizer:
        """The optimizer of one local update: fresh, or with the moments of this training's last round."""
        if config.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=config.lr)
        optimizer = torch.optim.Adam(parameters, lr=config.lr)
        if config.optimizer == "adam-keep" and self.moments:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.moments})
        return optimizer

    def keep(self, optimizer: torch.optim.Optimizer, config: ClientConfig, taken: Tensor | None = None) -> None:
        """What lasts after the update: of the optimizer, and the last step's gradients [k, d] where asked for."""
        self.taken = taken
        if config.optimizer == "adam-keep":
            self.moments = optimizer.state_dict()["state"]

    def state(self) -> dict[str, Tensor]:
        """All that changes from round to round, by dotted names."""
        moments = {f"adam.{i}.{name}": t for i, entry in self.moments.items() for name, t in entry.items()}
        adapted = {} if self.taken is None else {"preference": self.preference, "taken": self.taken}
        return self.learner.state() | moments | adapted

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.learner.restore(tensors)
        self.moments = {}
        for key in (key for key in tensors if key.startswith("adam.")):
            _, i, name = key.split(".")
            self.moments.setdefault(int(i), {})[name] = tensors[key]
        self.preference, self.taken = tensors.get("preference", self.prior), tensors.get("taken")


def optimizer_step(
    optimizer: torch.optim.Optimizer, adapter: Adapter, gradient: Tensor, max_norm: float | None
) -> Tensor:
    """One step along −gradient [d], clipped to max_norm. Returns Δθ [d], the step as taken."""
    before = adapter.vector()
    if max_norm is not None:
        gradient = gradient * (max_norm / gradient.norm().clamp_min(max_norm))
    for parameter, part in zip(adapter.parameters, adapter.split(gradient), strict=True):
        parameter.grad = part
    optimizer.step()
    optimizer.zero_grad()
    return adapter.vector() - before


@dataclass
class Client:
    """One client: its prompts, the indices of the objectives it holds, and its local trainings.

    primary: where among them the primary objective is, None for a client without it; task: a number.
    """

    index: int
    prompts: Sequence[Any]
    objectives: list[int]
    trainings: list[LocalTraining]
    primary: int | None = None
    task: int = 0

    def draw(self, size: int, rng: np.random.Generator) -> list[Any]:
        """`size` of this client's prompts, none twice before each was taken once; every round draws afresh."""
        n = len(self.prompts)
        order = np.concatenate([rng.permutation(n) for _ in range(-(-size // n))])[:size]
        return [self.prompts[i] for i in order]

    @property
    def prompts_held(self) -> int:
        """n_c, what the server's average weighs it by."""
        return len(self.prompts)

    def gradients(self, policy: Policy, batch: Batch, config: PPOConfig) -> Tensor:
        """J [k, d] of its first training at θ_t, where the adapter must stand: for a server that picks λ from them."""
        batch, learner = batch.combined(self.trainings[0].columns), self.trainings[0].learner
        return ppo.policy_gradients(policy, batch, learner.advantages(batch).normalised, config).J

    def upload(self, updates: list["Update"], batch: Batch, numbers: dict[str, float]) -> Upload:
        """What it sends after its local trainings. Raises NotFinite where the server could not accept it."""
        thetas = torch.stack([update.theta for update in updates])  # [trainings, d]
        for update, theta in zip(updates, thetas, strict=True):
            update.theta = theta  # a view: there is one copy of it, in memory and on the wire
        made = Upload(thetas, self.prompts_held, float(ppo.sequence_kl(batch).mean()), numbers)
        if made.fault:
            raise NotFinite(made.fault)
        return made


@contextmanager
def leaving_out(client: Client, faults: dict[int, str]) -> Iterator[None]:
    """Inside, a number that is not finite leaves a client out of the round: what it keeps at home is then as before."""
    kept = copy.deepcopy(client.trainings)
    try:
        yield
    except NotFinite as error:
        client.trainings, faults[client.index] = kept, str(error)


def gathered(made: dict[int, T], faults: dict[int, str]) -> dict[int, T]:
    """What the clients of all processes made, by their numbers, without those that failed; faults gains everybody's.
    Raises ValueError where nobody is left.
    """
    parts = merged(made | faults)
    faults |= {client: part for client, part in parts.items() if isinstance(part, str)}
    left = {client: part for client, part in parts.items() if client not in faults}
    check_anybody_left(left, faults)
    return left


def check_anybody_left(clients: Collection[Any], faults: dict[int, str]) -> None:
    """Raise ValueError where a round has no client any more, naming the first fault."""
    if not clients:
        first, fault = next(iter(faults.items()))
        raise ValueError(f"no client's update can be used; client {first}: {fault}")


def check_held(held: Sequence[Sequence[int]], names: Sequence[str], compared_by: str | None) -> None:
    """Raise ValueError unless every client holds some of the objectives, each once, and every objective is held.

    compared_by: who needs the same list of all clients, if anybody.
    """
    for client, own in enumerate(held):
        if not own or len(set(own)) < len(own) or not set(own) <= set(range(len(names))):
            raise ValueError(
                f"objectives: client {client} holds {list(own)}; give numbers below {len(names)}, each once"
            )
    for j, name in enumerate(names):
        if not any(j in own for own in held):
            raise ValueError(f"objectives: no client holds {name}; leave it out")
    if compared_by and len(set(map(tuple, held))) > 1:
        raise ValueError(f"objectives: {compared_by} cannot compare clients that hold unequal lists; give equal ones")


def primary_of(name: str | None, names: Sequence[str]) -> int:
    """The number of the primary objective, the first where none is named. Raises ValueError where there is no such."""
    if name is not None and name not in names:
        raise ValueError(f"primary: {name} is no objective; choose from {', '.join(names)}")
    return names.index(name) if name else 0


def check_primary(held: Sequence[Sequence[int]], names: Sequence[str], primary: int) -> None:
    """Raise ValueError unless every client holds the primary objective."""
    for client, own in enumerate(held):
        if primary not in own:
            raise ValueError(f"primary: client {client} does not hold {names[primary]}; give it to every client")


def responses_per_prompt(config: Any, learner: Callable[..., PPO]) -> int:
    """S, from a `firm.FIRMConfig`, or the learner's own where that leaves it open.

    Raises ValueError where it does not go with the learner, the batch or the Gram.
    """
    S, batch = config.group_size or learner.group_size, config.batch_size
    if S == 1 < learner.group_size:
        raise ValueError("group_size: a group of 1 has nothing to compare with; use at least 2, or advantages ppo")
    if batch % S:
        raise ValueError(f"group_size: {S} does not divide batch_size, {batch}, which counts responses")
    if config.gram == "cross" and batch < 2 * S:
        raise ValueError(f"gram: cross needs two half-batches; use a batch_size of at least {2 * S}")
    return S


def make_client(
    index: int, prompts: Sequence[Any], objectives: Sequence[int], p: Tensor,
    trainings: Callable[[Tensor], list[Tensor]], learner: Callable[[int], PPO], primary: int = 0, task: int = 0,
) -> Client:  # fmt: skip
    """A client that holds m of the M objectives, among which p [M] is renormalised.

    trainings(p [m]): the matrices [m, k] of its local trainings, each with the preference columnsᵀ p, renormalised;
    learner(k): how one of them learns. Raises ValueError where p has nothing for these objectives. [ours]
    """
    p = p[list(objectives)]
    if not p.sum() > 0:
        raise ValueError(f"preference: client {index} holds only objectives of weight 0; give it another one")
    p, made, own = p / p.sum(), [], list(objectives)
    position = own.index(primary) if primary in own else None
    for columns in trainings(p):
        among = mgda.preference_vector(columns.to(p).T @ p, columns.shape[1])  # [k]
        made.append(LocalTraining(columns, among, learner(len(among)), position))
    return Client(index, prompts, own, made, position, task)


# ---- what a round leaves ---------------------------------------------------------------------------------------


@dataclass
class Step:
    """One optimizer step of a local training."""

    lam: Tensor  # [k] λ
    gram: Tensor  # [k, k] JJᵀ
    first_order_gain: float  # min_j −⟨g_j, Δθ⟩ of the step as taken; below 0 the worst-served reward loses
    entropy: float
    clip_fraction: float
    approx_kl: float

    @classmethod
    def of(cls, gradients: Gradients, gram: Tensor, lam: Tensor, moved: Tensor) -> "Step":
        """moved [d] is Δθ. Plain gradient descent along MGDA's λᵀJ never makes the gain negative; Adam may."""
        gain = float((-(gradients.J @ moved)).min())
        return cls(lam, gram, gain, gradients.entropy, gradients.clip_fraction, gradients.approx_kl)


@dataclass
class Update:
    """One local training of one client."""

    theta: Tensor  # [d] the adapter that it ended at
    batch: Batch
    advantages: Advantages
    steps: list[Step]
    halves: Tensor | None = None  # [2, k, d] gradients of the two half-batches at θ_t; only with diagnostics


@dataclass
class Responses:
    """The responses of a cohort: N = clients · batch rows."""

    prompts: list[Any]  # N, that of every row
    rollout: Rollout | None  # None where there is no client
    rows: list[slice]  # each client's
    raw: Tensor  # [N, M] rewards in raw units, NaN for objectives that a client does not hold


@dataclass
class Contribution:
    """What a client's part in a round leaves; between processes it is what travels."""

    raw: Tensor  # [B, M] its rewards, as in Responses
    updates: list[Update]  # of its local trainings
    upload: Upload
    trainings: list[LocalTraining]  # as they are afterwards


@dataclass
class Round:
    """One communication round, of the clients whose uploads arrived."""

    number: int
    cohort: list[Client]
    raw: list[Tensor]  # each client's rewards [B, M]
    updates: list[list[Update]]  # each client's local trainings
    uploads: list[Upload]
    mixing: Tensor  # [trainings] how much each local training counted
    shares: Tensor  # [C] how much each upload counted, of sum 1
    kl_coef: float  # κ, in this round
    ledger: Ledger
    seconds: float
    faults: dict[int, str]  # why a client was left out
    dropped: int  # clients that vanished
