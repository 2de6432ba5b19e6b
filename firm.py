"""FIRM, Algorithm 1: Federated In-client Regularized Multi-objective alignment (arXiv 2511.16992).

    server: θ_0 ← fresh adapter (B = 0, so π_θ0 is the base model π_ref); rewards calibrated once
    for t = 0 … T − 1, `Federation.round`                                   [paper: T = 16]
        broadcast θ_t to the round's clients (some servers ask them for gradients first)
        each client c, on its own prompts:
            sample responses y ~ π_θt(· | x), score R_j(x, y), j = 1 … M
            log π_old, log π_ref, and per objective advantages Â_j, from its own critic or from groups (`grpo.py`)
            repeat K times, `local_update`                                  [paper: K = 3]
                J  ← rows g_j = ∇_θ L_j(θ), PPO's clipped loss of objective j
                λ* ← argmin over the simplex of λᵀĜλ + (β/2)‖λ − p‖²,  Ĝ = JJᵀ / tr(JJᵀ)
                θ  ← one optimizer step along −Σ_j λ*_j g_j
            fit the critic, if any, to the returns of these responses, for the rounds to come
            upload θ_c: d numbers, whatever M is (and n_c and a mean KL)
        θ_{t+1} ← θ_t + η_s Σ_c w_c (θ_c − θ_t),  w_c ∝ prompts held by c
        κ, the KL coefficient, adapts to the clients' mean KL               [code: RiC]

Symbols here: N clients, of which C take part in a round; M objectives, of which a client holds m and a local
training has k rewards; d adapter parameters; B responses of at most L tokens, S to a prompt; G = JJᵀ; p preference.
λ weighs objectives, `shares` clients, `training_shares` the local trainings of a client.

A method is a few swappable parts on this engine (`Method`), in four stages: 1 rewards -> advantages, 2 gradients -> λ,
3 update -> upload, 4 uploads -> θ. `baselines.py` and `fedmoa.py` have the others.

Faults [ours]. A client may vanish from a round (`client_dropout`), or its update may hold a NaN. Then all else is
as if it had not taken part, but for a λ that the server picked before the local runs.
[ours] fresh Adam on every client and round (its moments are never averaged), η_s, the critic that stays at home.
Left out on purpose: stragglers; secure aggregation and differential privacy, which `app/nodes.py` has from Flower.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fedavg
import mgda
import ppo
import rewards
from clients import Client, Context, Contribution, Purpose, Round, Step, Update, optimizer_step, stream
from fedavg import FEDAVG, Aggregation, Server, Upload
from ppo import CRITIC, Batch, Estimator, NotFinite
from rollout import Policy, Rollout
from settings import Config


@dataclass(frozen=True)
class Trainings:
    """Which rewards the local trainings of a client have (stage 1)."""

    help: str
    mixes: Callable[[Tensor, dict[str, Tensor]], list[Tensor]]  # p [m], the server's message -> [m, k] per training
    combine: Callable[[Tensor, Tensor], Tensor] = torch.matmul  # scores [B, m], mix [m, k] -> rewards [B, k]
    one_scale: bool = False  # whether rewards are compared with each other: then one scale calibrates all
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Who picks λ (stage 2)."""

    name: str
    help: str
    function: Callable[[Context], Tensor]  # a client's λ [k] on the simplex, float64 on the CPU, once a step
    settings: tuple[str, ...] = ()  # that only this part reads; "preference" among them if λ follows p
    needs_primary: bool = False  # whether every client must hold the primary objective


@dataclass(frozen=True)
class Method:
    """A federated multi-objective method, in the order of a round."""

    name: str
    help: str
    trainings: Trainings  # 1. objectives -> rewards
    estimator: Estimator  # 1. rewards -> advantages
    weights: Weights  # 2. gradients -> λ
    correct: Callable[[Tensor, Context], Tensor] = lambda gradient, context: gradient  # 2. λᵀJ [d] -> the step's [d]
    finish: Callable[[Context], dict[str, Tensor]] = lambda context: {}  # 3. what goes up beside the adapter
    aggregation: Aggregation = FEDAVG  # 3. the numbers that go up; 4. what clients weigh
    server: type[Server] = Server  # 4. uploads -> θ
    several_runs: bool = False  # whether it is several runs, mixed afterwards (soups)

    @property
    def needs_primary(self) -> bool:
        """Whether every client must hold the primary objective, the first one."""
        return self.weights.needs_primary or self.aggregation.needs_primary


def min_norm(context: Context) -> Tensor:
    """FIRM's λ [k]: the regularised QP on the normalised Gram. [paper]"""
    return mgda.solve(mgda.normalise(context.gram), context.config.beta, context.preference)


TOGETHER = Trainings("one, on every objective", lambda p, message: [torch.eye(len(p))])
MIN_NORM = Weights("min-norm", "as firm", min_norm, settings=("beta", "preference"))
UNREGULARISED = Weights("beta 0", "as mgda", lambda context: mgda.solve(mgda.normalise(context.gram)))
FIXED = Weights("fixed", "as linear", lambda context: context.preference, settings=("preference",))
FIRM = Method("firm", "regularised min-norm weights", TOGETHER, CRITIC, MIN_NORM)
MGDA = replace(FIRM, name="mgda", help="firm with beta 0 and uniform p", weights=UNREGULARISED)
LINEAR = replace(FIRM, name="linear", help="fixed weights p", weights=FIXED)


# ---- the client ------------------------------------------------------------------------------------------------


def local_update(policy: Policy, context: Context, method: Method) -> tuple[dict[str, Tensor], Update]:
    """One local training in one round, from θ_t to the tensors that its client uploads, "theta" [d] among them.

    Raises NotFinite if a gradient is not finite.
    """
    config, adapter, batch = context.config, policy.adapter, context.batch
    adapter.assign(context.message["theta"])
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = kind(adapter.parameters, lr=config.lr)
    advantages = method.estimator.advantages(batch, context.state, config)
    steps = []
    for epoch in range(config.epochs):
        gradients = ppo.policy_gradients(policy, batch, advantages.normalised, config)
        context.epoch, context.theta = epoch, adapter.vector()
        context.J, context.gram = gradients.J, mgda.gram(gradients.J)  # [k, d], [k, k]
        lam = method.weights.function(context)  # [k]
        gradient = lam.to(context.J) @ context.J  # [d], of Σ_j λ_j L_j: the step goes along its negative
        optimizer_step(optimizer, adapter, method.correct(gradient, context), config.max_grad_norm)
        gain = float((context.J @ (context.theta - adapter.vector())).min())
        steps.append(Step(lam, context.gram, gain, gradients.entropy, gradients.clip_fraction, gradients.approx_kl))
    context.theta = adapter.vector()
    context.state |= method.estimator.fit(batch, advantages, context.state)
    update = Update(context.mix, replace(batch, hidden=None), advantages, steps)
    return {"theta": context.theta} | method.finish(context), update


def contexts(
    client: Client, batch: Batch, message: dict[str, Tensor], method: Method, config: Config, t: int
) -> list[Context]:
    """A Context for each local training of a client in round t; `state` is a shallow copy, to assign in."""
    mixes = method.trainings.mixes(client.preference, message)  # [m, k] each
    trainings = []
    for mix, state in zip(mixes, client.state or [{} for _ in mixes], strict=True):
        rewarded = replace(batch, scores=method.trainings.combine(batch.scores, mix.to(batch.scores)))  # [B, k]
        p = mgda.preference_vector(mix.to(client.preference).T @ client.preference, mix.shape[1])  # [k]
        trainings.append(Context(config, t, message, mix, rewarded, p, dict(state)))
    return trainings


def contribution(
    client: Client, policy: Policy, batch: Batch, raw: Tensor, message: dict[str, Tensor], method: Method,
    config: Config, t: int,
) -> Contribution:  # fmt: skip
    """A client's part in round t: from what the server sent, its own state and its own responses, with their raw
    rewards [B, M], to its upload and its new state. `client` stays as it is.

    Raises NotFinite if a number of the update is NaN or infinite.
    """
    trainings = contexts(client, batch, message, method, config, t)
    tensors, updates = zip(*(local_update(policy, context, method) for context in trainings), strict=True)
    numbers = {"prompts": float(len(client.prompts)), "kl": float(ppo.sequence_kl(batch).mean())}
    numbers |= method.aggregation.numbers(client, raw, batch.rollout.group_size) | method.server.numbers(client, raw)
    upload = Upload({name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}, numbers)
    if upload.fault:
        raise NotFinite(f"{upload.fault} in its upload is not finite; lower lr")
    return Contribution(upload, [context.state for context in trainings], raw, list(updates))


class Alone:
    """How processes share a round's clients and exchange results: here there is one process. See `app/ranks.py`."""

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """Those of the items that this process works on."""
        return items

    def merged(self, results: dict[int, Any]) -> dict[int, Any]:
        """The results of all processes, in ascending order of their numbers."""
        return results


class Federation:
    """The server and its clients. `round` is Algorithm 1's outer loop body.

    prompts_of, objectives_of, tasks_of: each client's prompts, numbers of objectives (all if not given), and task.
    score(prompts, rollout, client) gives raw rewards [n, M], as `Session.score` does.
    State: theta [d], kl_coef, calibration, rounds_done, server.state, and `state` of every client.
    """

    def __init__(
        self, policy: Policy, prompts_of: Sequence[Sequence[Any]], names: Sequence[str], score: Callable[..., Tensor],
        method: Method, config: Config, objectives_of: Sequence[Sequence[int]] | None = None,
        tasks_of: Sequence[int] | None = None, exchange: Any = None,
    ) -> None:  # fmt: skip
        self.policy, self.names, self.score, self.method, self.config = policy, list(names), score, method, config
        self.group_size = responses_per_prompt(config, method.estimator)
        self.exchange = exchange or Alone()
        p = mgda.preference_vector(config.preference, len(names))
        self.clients = []
        for c, prompts in enumerate(prompts_of):
            own = sorted(objectives_of[c] if objectives_of else range(len(names)))  # servers compare rows
            if len(own) < len(names) and method.server.equal_objectives:
                raise ValueError(f"client_objectives: {method.name} compares clients on all objectives; leave it out")
            if method.needs_primary and 0 not in own:
                raise ValueError(f"client_objectives: client {c} lacks {names[0]}, which {method.name} goes by; add it")
            if not p[own].sum() > 0:
                raise ValueError(f"preference: client {c} holds only objectives of weight 0; give it another one")
            self.clients.append(Client(c, prompts, own, p[own] / p[own].sum(), tasks_of[c] if tasks_of else 0))
        self.server = method.server(config, method.aggregation)
        self.theta = policy.adapter.vector()  # θ_0
        self.kl_coef, self.rounds_done = config.kl_coef, 0
        self.calibration: rewards.Calibration | None = None

    def calibrate(self) -> None:
        """Fix every objective's mean and scale, once, from samples of the base policy."""
        sums = {client.index: self.sums(client) for client in self.exchange.mine(self.clients)}
        self.calibration = rewards.combine_sums(list(self.exchange.merged(sums).values()))

    def sums(self, client: Client) -> tuple[Tensor, Tensor, Tensor]:
        """What a client sends for it, of responses of the base policy."""
        with self.policy.adapter.disabled():
            _, raw = self.respond(client, Purpose.CALIBRATION)
        self.method.aggregation.numbers(client, raw, 1)  # raises for rewards that the average cannot use
        return rewards.calibration_sums(raw)

    def round(self) -> Round:
        """One communication round. Raises ValueError if no client's update can be used."""
        if self.calibration is None:
            self.calibrate()
        t, config = self.rounds_done, self.config
        cohort, dropped = self.cohort()
        message, arrived, faults = self.local_runs(cohort)
        for c, part in arrived.items():
            self.clients[c].state = part.state

        uploads = [part.upload for part in arrived.values()]
        self.theta, *shares = self.server.step(self.theta, uploads)  # of the clients, of their trainings
        self.policy.adapter.assign(self.theta)
        record = Round(t, message, arrived, faults, dropped, *shares, self.kl_coef, self.server.exchanged)
        kl = float(np.mean([upload.numbers["kl"] for upload in uploads]))
        self.kl_coef = ppo.adapt_kl(self.kl_coef, kl, len(uploads) * config.batch_size, config.kl_target)
        self.rounds_done += 1
        return record

    def local_runs(self, cohort: Sequence[Client]) -> tuple[dict[str, Tensor], dict[int, Contribution], dict[int, str]]:
        """What the server sends to a cohort, the contributions that arrive by client, why others do not."""
        self.policy.adapter.assign(self.theta)
        work, ahead = tee(self.batches(self.exchange.mine(cohort)))  # the same batches, each made once
        arrived, faults = {}, {}
        message = {"theta": self.theta} | self.server.broadcast(self, ahead, faults)
        del ahead  # which would keep them all
        for client, batch, raw in work:
            given = client, self.policy, batch, raw, message, self.method, self.config, self.rounds_done
            try:
                arrived[client.index] = contribution(*given)
            except NotFinite as error:
                faults[client.index] = str(error)
        return message, self.gathered(arrived, faults), faults

    def cohort(self) -> tuple[list[Client], int]:
        """The clients of this round, and how many sampled ones vanish from it."""
        config, n, t = self.config, len(self.clients), self.rounds_done
        chosen = fedavg.sample_clients(n, config.clients_per_round or n, stream(config.seed, Purpose.COHORT, t))
        staying = fedavg.staying(chosen, config.client_dropout, stream(config.seed, Purpose.DROPOUT, t))
        return [self.clients[c] for c in staying], len(chosen) - len(staying)

    def respond(self, client: Client, purpose: Purpose, S: int = 1, t: int | None = None) -> tuple[Rollout, Tensor]:
        """A client's responses from the adapter as it stands, S to a prompt, and their raw rewards [B, M].

        t: what the draws depend on, the round if not given.
        """
        size, t = self.config.batch_size, self.rounds_done if t is None else t
        rng = stream(self.config.seed, purpose, t, client.index)
        prompts = [p for p in client.draw(size // S, rng) for _ in range(S)]
        rollout = self.policy.sample([p.token_ids for p in prompts], rng.random((size, self.policy.max_new_tokens)))
        return replace(rollout, group_size=S), self.score(prompts, rollout, client)

    def batches(
        self, cohort: Sequence[Client], purpose: Purpose = Purpose.TRAINING, t: int | None = None
    ) -> Iterator[tuple[Client, Batch, Tensor]]:
        """In turn each client, its batch with the calibrated scores of its objectives, and its raw rewards [B, M].

        All are sampled and made at the θ where the adapter stands at the first one.
        """
        calibration = self.calibration.pooled() if self.method.trainings.one_scale else self.calibration
        micro, hidden = self.config.micro_batch_size, self.method.estimator.reads_hidden
        theta = self.policy.adapter.vector()
        for client in cohort:
            self.policy.adapter.assign(theta)
            rollout, raw = self.respond(client, purpose, self.group_size, t)
            scores = calibration.apply(raw)[:, client.objectives]  # [B, m]
            yield client, ppo.prepare(self.policy, rollout, scores, self.kl_coef, micro, hidden), raw

    def gathered(self, results: dict[int, Any], faults: dict[int, str]) -> dict[int, Any]:
        """The results of all processes, by client; `faults` gains everybody's. Raises ValueError if none is left."""
        faults |= self.exchange.merged(faults)
        results = {c: result for c, result in self.exchange.merged(results).items() if c not in faults}
        if not results:
            client, fault = next(iter(faults.items()))
            raise ValueError(f"no client's update can be used; client {client}: {fault}")
        return results


def responses_per_prompt(config: Config, estimator: Estimator) -> int:
    """S, or the estimator's own if the settings leave it open. Raises ValueError if groups cannot be made."""
    S = config.group_size or estimator.group_size
    if S == 1 < estimator.group_size:
        raise ValueError("group_size: a group of 1 has nothing to compare with; use at least 2, or --advantages critic")
    if config.batch_size % S:
        raise ValueError(f"group_size: {S} does not divide batch_size, {config.batch_size}, which counts responses")
    return S
