"""FIRM, Algorithm 1: Federated In-client Regularized Multi-objective alignment (arXiv 2511.16992).

    server: θ_0 ← fresh adapter (B = 0, so π_θ0 is the base model π_ref); rewards calibrated once
    for t = 0 … T − 1, `Federation.round`                                   [paper: T = 16]
        broadcast θ_t to the round's clients
        each client c, on its own prompts:
            sample responses y ~ π_θt(· | x), score R_j(x, y), j = 1 … M
            log π_old, log π_ref, and per objective advantages Â_j, by its learner: its own critic, or `grpo.py`
            repeat K times, `local_update`                                  [paper: K = 3]
                J  ← rows g_j = ∇_θ L_j(θ), PPO's clipped loss of objective j
                λ* ← argmin over the simplex of λᵀĜλ + (β/2)‖λ − p‖²,  Ĝ = JJᵀ / tr(JJᵀ)
                θ  ← one optimizer step along −Σ_j λ*_j g_j
            fit the critic, if any, to the returns of these responses, for the rounds to come
            upload θ_c: d numbers, whatever M is (and n_c and a mean KL)
        θ_{t+1} ← θ_t + η_s Σ_c w_c (θ_c − θ_t),  w_c ∝ prompts held by c
        κ, the KL coefficient, adapts to the clients' mean KL               [code: RiC]

A method is a few swappable parts on this engine (`Method`): who picks λ and from what, what is uploaded, what clients
weigh. `baselines.py` has those that FIRM is compared with, `fedmoa.py` one that moves p before a client's first step.

Two things are done for the whole cohort at once, since its clients share θ_t: responses are sampled in one batch, and a
reward model may score in one. Neither changes what a client would get alone, up to rounding (`rollout.py`). All else is
client by client on its own rows, a user's reward function too. Clients that fail or vanish: `fedavg.py`.

[ours] fresh Adam on every client and round (its moments are never averaged), η_s, the critic that stays at home.
Left out on purpose: secure aggregation, stragglers, differential privacy.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import clients
import fedavg
import mgda
import ppo
import rewards
from app.fields import Checked, Count, Index, NonNegative, Positive, Seed, Share, setting
from app.ranks import merged, of_this_process
from app.stopwatch import phase
from clients import (
    Client,
    ClientConfig,
    Contribution,
    LocalTraining,
    Responses,
    Round,
    Step,
    Update,
    gathered,
    leaving_out,
    stream,
)
from fedavg import Server, Upload
from ppo import PPO, Batch, Gradients, PPOConfig
from rollout import Policy


@dataclass
class FIRMConfig(Checked):
    """The federation, and FIRM's own settings."""

    rounds: Index = setting(16, "T, communication rounds [paper: 16]; 0 evaluates only")
    clients: Count = setting(8, "C, clients that hold prompts [paper: 8]")
    clients_per_round: Count | None = setting(None, "clients sampled per round; all if not given")
    client_dropout: Share = setting(0.0, "probability that a sampled client vanishes before its upload")
    batch_size: Count = setting(16, "responses per client and round [paper: 16]")
    group_size: Count | None = setting(
        None, "S, how many of them answer one prompt; if not given 4 with groups, 1 with a critic [paper: 1]"
    )
    beta: NonNegative = setting(0.01, "weight of the regulariser [paper: 0.01]; 0 is MGDA")
    preference: list[float] | None = setting(None, "p, a weight per objective; uniform if not given")
    primary: str | None = setting(None, "the objective that fedmoa's parts go by; the first if not given")
    gram: Literal["normalised", "raw", "cross"] = setting(
        "normalised", "the QP's Gram: normalised by its trace [paper], raw, or cross (of two half-batches)"
    )
    server_lr: Positive = setting(1.0, "server rate; 1 is plain FedAvg")
    seed: Seed = setting(0, "equal seeds give equal runs, bit for bit on a CPU")
    diagnostics: bool = setting(False, "also log drift and stationarity, and keep the Gram matrices in grams/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preference is not None:
            mgda.preference_vector(self.preference, len(self.preference))  # normalised where it is used


@dataclass
class TrainingConfig:
    """All settings that training reads."""

    firm: FIRMConfig
    client: ClientConfig
    ppo: PPOConfig


@dataclass(frozen=True)
class Method:
    """A federated multi-objective method: swappable parts on one engine. The defaults are FIRM's.

    weights(Ĝ [k, k], p [k], config): a client's λ [k] on the simplex, once per optimizer step; Ĝ from `qp_matrix`.
    trainings(p [M]): a matrix [M, k] per local training of a client, whose rewards are scores @ it; one k for all.
    combine(batch, training, state): that training's batch with its k rewards; state: the server's.
    learner: how a client learns (advantages, and what lasts of a round), `ppo.PPO` or one of `grpo.py`.
    server_weights(J [C, M, d], prompts_held [C], server): before the local updates, the server's λ [M] on the simplex
        from all gradients at θ_t, in the place of `weights`.
    server_mixing(updates [C, M, d], weights [C], server): after them, its λ [M] on the simplex from θ_{c,i} − θ_t
        of M local trainings: how much each counts.
    adapt(training, batch, J [k, d], settings): before the first step, what moves the training's preference.
    numbers(client, raw rewards [B, M], S to a prompt): named numbers that travel with the upload.
    client_weights(uploads, server): what each counts [C] in the server's average.
    aggregate(θ [d], uploads, server): the next θ.
    compares: whether objectives' rewards are compared with each other, so that one scale must serve them all.
    settings: the method's own, as a dataclass; its fields become flags. mixes: several runs, mixed afterwards (soups).
    """

    name: str
    help: str
    weights: Callable[[Tensor, Tensor, FIRMConfig], Tensor]
    takes_preference: bool = True
    trainings: Callable[[Tensor], list[Tensor]] = lambda p: [torch.eye(len(p))]  # one, on every objective
    combine: Callable[[Batch, LocalTraining, dict[str, Tensor]], Batch] = lambda batch, training, state: batch.combined(
        training.columns
    )
    learner: Callable[..., PPO] = PPO
    server_weights: Callable[[Tensor, Tensor, Server], Tensor] | None = None
    server_mixing: Callable[[Tensor, Tensor, Server], Tensor] | None = None
    adapt: Callable[[LocalTraining, Batch, Tensor, Any], None] | None = None
    numbers: Callable[[Client, Tensor, int], dict[str, float]] = lambda client, raw, S: {}
    client_weights: Callable[[Sequence[Upload], Server], Tensor] = lambda uploads, server: fedavg.prompts_held(uploads)
    aggregate: Callable[[Tensor, Sequence[Upload], Server], Tensor] = fedavg.federated_average
    compares: bool = False
    settings: Any = None
    mixes: bool = False

    @property
    def own_server(self) -> bool:
        """Whether the server picks λ, or averages in a way of its own."""
        return bool(self.server_weights or self.server_mixing or self.aggregate is not Method.aggregate)

    @property
    def needs_primary(self) -> bool:
        """Whether every client must hold the primary objective."""
        return self.adapt is not None or self.client_weights is not Method.client_weights


FIRM = Method("firm", "regularised min-norm weights", weights=lambda Ghat, p, config: mgda.solve(Ghat, config.beta, p))
MGDA = Method("mgda", "firm with beta 0", lambda Ghat, p, config: mgda.solve(Ghat, 0.0, p), takes_preference=False)
LINEAR = Method("linear", "fixed weights p", lambda Ghat, p, config: p)


@phase("update")
def local_update(
    training: LocalTraining, policy: Policy, theta: Tensor, batch: Batch, method: Method, config: TrainingConfig
) -> Update:
    """One local training in one round, from θ_t [d] to the adapter that its client uploads.

    batch: the client's responses with the k rewards of this training. Raises NotFinite where a gradient is not finite.
    """
    adapter, learner = policy.adapter, training.learner
    adapter.assign(theta)
    optimizer = training.optimizer(adapter.parameters, config.client)
    advantages = learner.advantages(batch)
    update = Update(theta, batch, advantages, steps=[])
    for epoch in range(config.ppo.epochs):
        observe = config.firm.diagnostics and epoch == 0
        halves = observe or config.firm.gram == "cross"
        gradients = ppo.policy_gradients(policy, batch, advantages.normalised, config.ppo, halves)  # with J [k, d]
        if method.adapt and epoch == 0:
            method.adapt(training, batch, gradients.J, method.settings)
        G = mgda.gram(gradients.J)  # [k, k]
        lam = method.weights(qp_matrix(G, gradients, config.firm), training.preference, config.firm)  # [k]
        gradient = lam.to(gradients.J) @ gradients.J  # [d], of Σ_j λ_j L_j: the step goes along its negative
        moved = clients.optimizer_step(optimizer, adapter, gradient, config.client.max_grad_norm)  # [d], Δθ as taken
        update.steps.append(Step.of(gradients, G, lam, moved))
        if observe:
            update.halves = gradients.halves
    learner.fit(batch, advantages)
    training.keep(optimizer, config.client, gradients.J if method.adapt else None)
    update.theta = adapter.vector()
    update.batch = replace(batch, hidden=None)  # most of its bytes, and nobody reads them any more
    return update


def qp_matrix(G: Tensor, gradients: Gradients, config: FIRMConfig) -> Tensor:
    """Ĝ [k, k], what the QP is solved on: G = JJᵀ over its trace [paper], or a variant for the ablations [ours]."""
    if config.gram == "raw":
        return G
    return mgda.normalise(mgda.cross_gram(gradients.halves) if config.gram == "cross" else G)


class Federation:
    """The server and its clients, simulated one after another. `round` is Algorithm 1's outer loop body.

    Of several processes each has the same federation, and trains its own clients of a round (app/ranks.py).

    shares: each client's prompts; held: the numbers of each client's objectives, all of them where not given; tasks:
    each client's task, a number.
    score(prompts, rollout, holdings) gives raw rewards [N, M], see `rewards.score`; nothing here knows of texts.
    State: theta [d], kl_coef, calibration, rounds_done, server_state, the clients' trainings (app/checkpoint.py).
    """

    def __init__(
        self, policy: Policy, shares: Sequence[Sequence[Any]], names: Sequence[str], score: Callable[..., Tensor],
        method: Method, config: TrainingConfig, held: Sequence[Sequence[int]] | None = None,
        tasks: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.names, self.score, self.method, self.config = policy, list(names), score, method, config
        p = mgda.preference_vector(config.firm.preference, len(self.names))
        held, tasks = held or [range(len(p)) for _ in shares], tasks or [0] * len(shares)
        primary = clients.primary_of(config.firm.primary, self.names)
        server = f"{method.name}'s server" if method.own_server else None
        clients.check_held(held, self.names, "diagnostics" if config.firm.diagnostics else server)
        if method.needs_primary:
            clients.check_primary(held, self.names, primary)
        learner = partial(method.learner, policy.hidden_size, config.ppo, policy.device)
        self.group_size = clients.responses_per_prompt(config.firm, method.learner)
        self.clients = [
            clients.make_client(c, prompts, objectives, p, method.trainings, learner, primary, task)
            for c, (prompts, objectives, task) in enumerate(zip(shares, held, tasks, strict=True))
        ]
        self.theta = policy.adapter.vector()  # θ_0
        self.kl_coef, self.rounds_done = config.ppo.kl_coef, 0
        self.server_state: dict[str, Tensor] = {}
        self.calibration: rewards.Calibration | None = None

    def calibrate(self) -> None:
        """Fix every objective's mean and scale, once, from base-policy samples (`rewards.calibration_sums`)."""
        mine, sums = of_this_process(self.clients), {}
        drawn = self.respond(mine, clients.CALIBRATION)
        for client, rows in zip(mine, drawn.rows, strict=True):
            self.method.numbers(client, drawn.raw[rows], 1)  # so that rewards it cannot use are found here
            sums[client.index] = rewards.calibration_sums(drawn.raw[rows])
        self.calibration = rewards.combine(list(merged(sums).values()))

    def round(self) -> Round:
        """One communication round. Raises ValueError where no client's update can be used."""
        started, t, method, config = time.perf_counter(), self.rounds_done, self.method, self.config
        seed, C, faults = config.firm.seed, len(self.clients), {}
        server = Server(config.firm.server_lr, self.server_state, stream(seed, clients.SERVER, t), method.settings)
        chosen = fedavg.sample_clients(C, config.firm.clients_per_round or C, stream(seed, clients.CLIENT_SAMPLING, t))
        staying = fedavg.staying(chosen, config.firm.client_dropout, stream(seed, clients.DROPOUT, t))
        cohort = [self.clients[c] for c in staying]

        self.policy.adapter.assign(self.theta)  # broadcast θ_t
        server.ledger.down({"theta": self.theta}, scalars=1)  # and κ
        mine = of_this_process(cohort)
        responses = self.respond(mine, clients.TRAINING, self.group_size)
        rewarded = [responses.raw[rows] for rows in responses.rows]
        work = list(zip(mine, self.prepare(mine, responses), rewarded, strict=True))
        if method.server_weights:
            work, lam = self.common_weights(work, server, faults)
            method = replace(method, weights=lambda *_: lam)

        arrived = {}
        for client, batch, raw in work:
            with leaving_out(client, faults):
                arrived[client.index] = self.contribution(client, batch, raw, method)
        arrived = gathered(arrived, faults)
        for c, made in arrived.items():
            self.clients[c].trainings = made.trainings
        uploads = [made.upload for made in arrived.values()]
        server.ledger.upload(uploads[0])

        server.weights = method.client_weights(uploads, server)  # [C]
        if method.server_mixing:
            moved = torch.stack([upload.thetas - self.theta for upload in uploads])  # [C, M, d]
            server.mixing = method.server_mixing(moved, server.weights, server)
        theta = method.aggregate(self.theta, uploads, server)
        if not torch.isfinite(theta).all():
            raise ValueError("server_lr: the server's new adapter is not finite; lower server_lr or lr")
        self.theta = theta
        self.policy.adapter.assign(theta)
        record = Round(
            number=t, cohort=[self.clients[c] for c in arrived], raw=[made.raw for made in arrived.values()],
            updates=[made.updates for made in arrived.values()], uploads=uploads, mixing=server.mixing,
            shares=server.weights / server.weights.sum(), kl_coef=self.kl_coef, ledger=server.ledger,
            seconds=time.perf_counter() - started, faults=faults, dropped=len(chosen) - len(staying),
        )  # fmt: skip

        kl = float(np.mean([upload.kl for upload in uploads]))
        self.kl_coef = ppo.adapt_kl(self.kl_coef, kl, len(uploads) * config.firm.batch_size, config.ppo)
        self.rounds_done += 1
        return record

    def contribution(self, client: Client, batch: Batch, raw: Tensor, method: Method) -> Contribution:
        """A client's part in the round: its local trainings from θ_t, and its upload. raw [B, M]. Raises NotFinite."""
        updates = []
        for training in client.trainings:
            rewarded = method.combine(batch, training, self.server_state)
            updates.append(local_update(training, self.policy, self.theta, rewarded, method, self.config))
        upload = client.upload(updates, batch, method.numbers(client, raw, self.group_size))
        return Contribution(raw, updates, upload, client.trainings)

    def common_weights(self, work: list[tuple], server: Server, faults: dict[int, str]) -> tuple[list[tuple], Tensor]:
        """The server's λ [M] from all clients' gradients at θ_t; work: (client, batch, raw) of those still in."""
        J = {}
        for client, batch, _ in work:
            with leaving_out(client, faults):
                J[client.index] = client.gradients(self.policy, batch, self.config.ppo)
        J = gathered(J, faults)
        held = fedavg.prompts_held([self.clients[c] for c in J])
        lam = self.method.server_weights(torch.stack(list(J.values())), held, server)  # from J [C, M, d]
        return [each for each in work if each[0].index in J], lam

    def respond(
        self, cohort: Sequence[Client], purpose: int, group_size: int = 1, number: int | None = None
    ) -> Responses:
        """Each client's batch of responses, so many to a prompt, from the adapter as it stands; their raw rewards.

        number: the round that the draws hang on, where it is not the federation's.
        """
        size, seed, t = self.config.firm.batch_size, self.config.firm.seed, self.rounds_done
        if not cohort:  # there are more processes than clients
            return Responses([], None, [], torch.empty(0, len(self.names)))
        streams = [stream(seed, purpose, t if number is None else number, client.index) for client in cohort]
        drawn = [p for client, rng in zip(cohort, streams, strict=True) for p in client.draw(size // group_size, rng)]
        prompts = [p for p in drawn for _ in range(group_size)]
        uniforms = np.concatenate([rng.random((size, self.policy.max_new_tokens)) for rng in streams])  # [N, L]
        rollout = replace(self.policy.sample([p.token_ids for p in prompts], uniforms), group_size=group_size)
        rows = [slice(i * size, (i + 1) * size) for i in range(len(cohort))]
        holdings = [(part, client.objectives, client.index) for part, client in zip(rows, cohort, strict=True)]
        return Responses(prompts, rollout, rows, self.score(prompts, rollout, holdings))

    def prepare(self, cohort: Sequence[Client], responses: Responses) -> list[Batch]:
        """Each client's batch at θ_t: calibrated scores of the objectives that it holds, log π_old, log π_ref."""
        calibration = self.calibration.pooled() if self.method.compares else self.calibration
        rollout, scores = responses.rollout, calibration.apply(responses.raw)  # [N, M]
        own = [(rollout.rows(r), scores[r][:, c.objectives]) for c, r in zip(cohort, responses.rows, strict=True)]
        keep_hidden = self.method.learner.reads_hidden
        return [ppo.prepare(self.policy, *rows, self.kl_coef, self.config.ppo, keep_hidden) for rows in own]
