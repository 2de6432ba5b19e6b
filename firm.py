"""FIRM, Algorithm 1: Federated In-client Regularized Multi-objective alignment (arXiv 2511.16992).

    server: θ_0 ← fresh adapter (B = 0, so π_θ0 is the base model π_ref); rewards calibrated once (run.py)
    for t = 0 … T − 1, `Federation.round`                                   [paper: T = 16]
        broadcast θ_t to the round's clients
        each client c, on its own prompts, `local_update`:
            sample responses y ~ π_θt(· | x), score R_j(x, y), j = 1 … M
            log π_old, log π_ref, and per objective advantages Â_j on the client's own critic
            repeat K times                                                  [paper: K = 3]
                J  ← rows g_j = ∇_θ L_j(θ), PPO's clipped loss of objective j
                λ* ← argmin over the simplex of λᵀĜλ + (β/2)‖λ − p‖²,  Ĝ = JJᵀ / tr(JJᵀ)
                θ  ← one optimizer step along −Σ_j λ*_j g_j
                critic ← one step towards its returns
            upload θ_c: d numbers, whatever M is (and n_c and a mean KL)
        θ_{t+1} ← θ_t + η_s Σ_c w_c (θ_c − θ_t),  w_c ∝ prompts held by c
        κ, the KL coefficient, adapts to the clients' mean KL               [code: RiC]

A method is a few swappable parts (`Method`): how scores become advantages, how gradients become weights, how uploads
become the next θ. MGDA is FIRM with β = 0, `linear` has fixed weights, and `baselines.py` has the rest: fsmgda makes a
local run per objective and uploads them all, fedcmoo's server picks one λ per round from the clients' gradients.

One simulation detail changes nothing that a client would compute alone, up to rounding at an edge of the sampler's
CDF: the round's clients share θ_t, so their responses are sampled in one batch (see `rollout.py`). Everything after
that is client by client, in turn.

[ours] fresh Adam on every client and round (its moments are never averaged), η_s, the critic that stays at home.
The gradients that the server's diagnostics look at (drift, stationarity) are the simulation's: no client sends them.
Left out on purpose: secure aggregation, stragglers, differential privacy.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fedavg
import mgda
import ppo
from app.stopwatch import phase
from evidence import monitor
from lora import Adapter
from ppo import Advantages, PPOConfig, ppo_advantages
from rollout import Policy, Rollout


@dataclass
class FIRMConfig:
    """The federation, and FIRM's own settings."""

    rounds: int = field(default=16, metadata={"help": "T, communication rounds [paper: 16]"})
    clients: int = field(default=8, metadata={"help": "C, clients that hold prompts [paper: 8]"})
    clients_per_round: int | None = field(
        default=None, metadata={"help": "clients sampled per round; all if not given"}
    )
    batch_size: int = field(default=16, metadata={"help": "prompts per client and round [paper: 16]"})
    beta: float = field(default=0.01, metadata={"help": "weight of the regulariser [paper: 0.01]; 0 is MGDA"})
    preference: list[float] | None = field(
        default=None, metadata={"help": "p, one weight per objective, the regulariser's centre; uniform if not given"}
    )
    lr: float = field(default=2e-4, metadata={"help": "client learning rate"})
    gram: str = field(
        default="normalised",
        metadata={"help": "the QP's Gram: normalised by its trace [paper], raw, or cross (of two half-batches)"},
    )
    optimizer: str = field(
        default="adam", metadata={"help": "client optimizer: adam (fresh every round), adam-keep or sgd"}
    )
    server_lr: float = field(default=1.0, metadata={"help": "server rate; 1 is plain FedAvg"})
    max_grad_norm: float | None = field(default=None, metadata={"help": "clip the combined gradient to this norm"})

    def __post_init__(self) -> None:
        for name in ("rounds", "clients", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.clients_per_round is not None and not 1 <= self.clients_per_round <= self.clients:
            raise ValueError(
                f"clients_per_round: {self.clients_per_round} must lie between 1 and clients, {self.clients}"
            )
        for name in ("beta", "lr"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be a finite number >= 0")
        if self.gram not in ("normalised", "raw", "cross"):
            raise ValueError(f"gram: {self.gram!r} is none of normalised, raw, cross")
        if self.gram == "cross" and self.batch_size < 2:
            raise ValueError("gram: cross needs two half-batches; use a batch_size of at least 2")
        if self.optimizer not in ("adam", "adam-keep", "sgd"):
            raise ValueError(f"optimizer: {self.optimizer!r} is none of adam, adam-keep, sgd")
        for name in ("server_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name}: {value} must be a positive number")
        if self.preference is not None:
            mgda.preference_vector(self.preference, len(self.preference))  # normalised where it is used


def all_objectives(M: int, config: FIRMConfig) -> list[Tensor]:
    """One local run on all M objectives: rewards = scores @ I."""
    return [torch.eye(M)]


def regularised_weights(Ghat: Tensor, config: FIRMConfig) -> Tensor:
    """FIRM's λ*: the regularised min-norm QP on the client's own gradients. Ghat [M, M] -> [M]."""
    return mgda.solve(Ghat, config.beta, config.preference)


def fixed_weights(Ghat: Tensor, config: FIRMConfig) -> Tensor:
    """λ = p, whatever the gradients are: linear scalarisation of separately whitened objectives."""
    return mgda.preference_vector(config.preference, len(Ghat))


def federated_average(
    theta: Tensor, uploads: Tensor, prompts_held: Tensor, config: FIRMConfig
) -> tuple[Tensor, Tensor]:
    """θ + η_s Σ_c w_c (θ_c − θ), and [1.0], the weight of a client's one upload.

    theta [d], uploads [C, 1, d] (one adapter per client), prompts_held [C].
    """
    step = fedavg.average(uploads[:, 0] - theta, prompts_held)
    return theta + config.server_lr * step, torch.ones(1, dtype=torch.float64)


@dataclass(frozen=True)
class Method:
    """A federated multi-objective method: swappable parts on one engine. The defaults are FIRM.

    runs(M, config): a matrix R [M, k] for each local run of a client, which trains on the k rewards scores @ R and
        uploads one adapter; k is the same for all runs. FIRM makes one run, on all M.
    advantages(critic, scores [B, k], …): scores to advantages, see `ppo_advantages`.
    weights(Ĝ [k, k], config): the client's λ [k], once per optimizer step; Ĝ from `qp_matrix`.
    server_weights(J [C, M, d], prompts_held [C], state, ledger, rng): where it is given, the server's λ [M], once per
        round, from all clients' gradients at θ_t; it takes the place of `weights`. `state` lives as long as the run.
    aggregate(theta, uploads [C, runs, d], prompts_held, config): the next θ, and how much each run counted [runs].
    """

    name: str
    runs: Callable[[int, FIRMConfig], list[Tensor]] = all_objectives
    advantages: Callable[..., Advantages] = ppo_advantages
    weights: Callable[[Tensor, FIRMConfig], Tensor] = regularised_weights
    server_weights: Callable[..., Tensor] | None = None
    aggregate: Callable[[Tensor, Tensor, Tensor, FIRMConfig], tuple[Tensor, Tensor]] = federated_average


FIRM = Method("firm")
MGDA = replace(FIRM, name="mgda", weights=lambda Ghat, config: mgda.solve(Ghat, 0.0, config.preference))
LINEAR = replace(FIRM, name="linear", weights=fixed_weights)


@phase("update")
def local_update(
    client: "Client", policy: Policy, theta: Tensor, batch: Rollout, scores: Tensor, kl_coef: float, method: Method,
    config: FIRMConfig, ppo_config: PPOConfig,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """What one client does in one round, from θ_t to its upload.

    theta [d]; batch of B rows; scores [B, M] calibrated, or the k rewards of one local run (M stands for k then).
    Returns the upload [d], the adapter itself, and what `monitor.update` makes of it.
    Raises ValueError where a gradient is not finite: that ends the run.
    """
    adapter = policy.adapter
    adapter.assign(theta)
    optimizer = client.optimizer(adapter.parameters, config)
    logp_old, logp_ref, advantages = appraise(client, policy, batch, scores, kl_coef, method, ppo_config)

    steps = []
    for epoch in range(ppo_config.epochs):
        parts = 2 if epoch == 0 or config.gram == "cross" else 1  # half-batches, for diagnostics or the cross Gram
        halves, hidden, log = ppo.policy_gradients(policy, batch, logp_old, advantages.whitened, ppo_config, parts)
        if epoch == 0:
            at_theta_t = halves
        J = halves.sum(0)  # [M, d]
        G = mgda.gram(J)  # [M, M]
        lam = method.weights(qp_matrix(G, halves, config), config)  # [M]; FIRM: mgda.solve(Ĝ, β, p)
        step = optimizer_step(optimizer, adapter, lam.to(J) @ J, config.max_grad_norm)  # [d], Δθ as taken
        ppo.fit_critic(client.critic, client.critic_optimizer, hidden, advantages, batch.mask, ppo_config.value_clip)
        steps.append(log | monitor.step(J, G, lam, step, advantages, kl_coef))

    if config.optimizer == "adam-keep":
        client.moments = optimizer.state_dict()["state"]
    return adapter.vector(), monitor.update(steps, at_theta_t, batch, logp_old, logp_ref, advantages)


def qp_matrix(G: Tensor, halves: Tensor, config: FIRMConfig) -> Tensor:
    """Ĝ [M, M], what the QP is solved on: G = JJᵀ over its trace [paper], or a variant for the ablations."""
    if config.gram == "raw":
        return G
    return mgda.normalise(mgda.cross_gram(halves) if config.gram == "cross" else G)


@phase("reference")
def appraise(
    client: "Client", policy: Policy, batch: Rollout, scores: Tensor, kl_coef: float, method: Method,
    ppo_config: PPOConfig,
) -> tuple[Tensor, Tensor, Advantages]:  # fmt: skip
    """What a batch is worth before the first step: log π_old [B, L], log π_ref [B, L], and the advantages."""
    rows = ppo_config.micro_batch_size
    logp_old, _, hidden = policy.logprobs_in_pieces(batch, rows)  # [B, L], entropy, [B, L, H]
    with policy.adapter.disabled():
        logp_ref, _, _ = policy.logprobs_in_pieces(batch, rows)  # [B, L]
    advantages = method.advantages(client.critic, scores, batch, logp_old, logp_ref, hidden, kl_coef, ppo_config)
    return logp_old, logp_ref, advantages


def objective_gradients(
    client: "Client", policy: Policy, theta: Tensor, batch: Rollout, scores: Tensor, kl_coef: float, method: Method,
    ppo_config: PPOConfig,
) -> Tensor:  # fmt: skip
    """J [M, d] at θ_t for a server that picks λ: up to rounding, the gradients of the client's first step."""
    policy.adapter.assign(theta)
    logp_old, _, advantages = appraise(client, policy, batch, scores, kl_coef, method, ppo_config)
    return ppo.policy_gradients(policy, batch, logp_old, advantages.whitened, ppo_config)[0][0]


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


class Client:
    """What never leaves a client: its prompts, its critic, and its optimizer's moments if those are kept.

    Of a method that makes several local runs, each run has a Client of its own, with the same prompts.
    """

    def __init__(
        self, index: int, prompts: Sequence[Any], hidden_size: int, M: int, config: PPOConfig, device: torch.device
    ) -> None:  # fmt: skip
        self.index, self.prompts = index, prompts
        self.critic = ppo.Critic(hidden_size, M, device)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr)
        self.moments: dict[int, dict[str, Tensor]] = {}  # of the policy's optimizer

    def draw(self, size: int, rng: np.random.Generator) -> list[Any]:
        """`size` of this client's prompts, none twice before each was taken once; every round draws afresh."""
        n = len(self.prompts)
        order = np.concatenate([rng.permutation(n) for _ in range(-(-size // n))])[:size]
        return [self.prompts[i] for i in order]

    def optimizer(self, parameters: list[Tensor], config: FIRMConfig) -> torch.optim.Optimizer:
        """The optimizer of one local update: fresh, or with the moments of this client's last round."""
        if config.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=config.lr)
        optimizer = torch.optim.Adam(parameters, lr=config.lr)
        if config.optimizer == "adam-keep" and self.moments:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self.moments})
        return optimizer

    def state(self) -> dict[str, Tensor]:
        """All that changes on a client, by dotted names."""
        critic_moments = self.critic_optimizer.state_dict()["state"]
        tensors = {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        for owner, moments in (("critic_adam", critic_moments), ("adam", self.moments)):
            tensors |= {f"{owner}.{i}.{name}": t for i, entry in moments.items() for name, t in entry.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        moments: dict[str, dict] = {"critic_adam": {}, "adam": {}}
        for key, tensor in tensors.items():
            owner, _, rest = key.partition(".")
            if owner in moments:
                i, name = rest.split(".")
                moments[owner].setdefault(int(i), {})[name] = tensor
        self.critic.load_state_dict(
            {k.removeprefix("critic."): t for k, t in tensors.items() if k.startswith("critic.")}
        )
        self.critic_optimizer.load_state_dict({**self.critic_optimizer.state_dict(), "state": moments["critic_adam"]})
        self.moments = moments["adam"]


def stream(seed: int, *keys: int) -> np.random.Generator:
    """An independent random stream per (seed, purpose, …); no order of calls and no restart can change it.

    The keys after the purpose are the round and the client, or a held-out prompt's index.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=keys))


CLIENT_SAMPLING, TRAINING, CALIBRATION, EVALUATION, SERVER = 1, 2, 3, 4, 5  # what a stream is for: its first key


class Federation:
    """The server and its simulated clients. `round` is Algorithm 1's outer loop body.

    `score(prompts, rollout)` gives raw rewards [N, M] and `calibrate` maps them to the units that PPO trains on;
    both are handed down, since nothing here knows of texts. State: theta [d], kl_coef, the clients, the round, and what
    the server remembers. `grams` keeps the last round's inner products, so that λ can be solved again under another β.
    """

    def __init__(
        self, policy: Policy, shares: Sequence[Sequence[Any]], names: Sequence[str],
        score: Callable[[Sequence[Any], Rollout], Tensor], calibrate: Callable[[Tensor], Tensor],
        config: FIRMConfig, ppo_config: PPOConfig, max_new_tokens: int, method: Method = FIRM, seed: int = 0,
    ) -> None:  # fmt: skip
        self.policy, self.names, self.score, self.calibrate = policy, list(names), score, calibrate
        self.config, self.ppo_config, self.method, self.seed = config, ppo_config, method, seed
        self.max_new_tokens = max_new_tokens
        self.run_rewards = method.runs(len(self.names), config)  # R [M, k] of every local run
        self.runs = [
            [Client(c, p, policy.hidden_size, R.shape[1], ppo_config, policy.device) for c, p in enumerate(shares)]
            for R in self.run_rewards
        ]
        self.clients = self.runs[0]
        self.theta = policy.adapter.vector()  # θ_0
        self.kl_coef = ppo_config.kl_coef
        self.rounds_done = 0
        self.server_state: dict[str, Tensor] = {}  # what the method's server remembers between rounds
        self.mean_lambda: Tensor | None = None  # λ̄ [M] of the last round
        self.grams: dict[str, Tensor] = {}

    def rollout(self, cohort: Sequence[Client], t: int, purpose: int) -> tuple[list[list[Any]], Rollout]:
        """Every cohort client's batch of prompts, and one response to each, sampled in one batch."""
        size, L = self.config.batch_size, self.max_new_tokens
        streams = [stream(self.seed, purpose, t, client.index) for client in cohort]
        prompts = [client.draw(size, rng) for client, rng in zip(cohort, streams, strict=True)]
        uniforms = np.concatenate([rng.random((size, L)) for rng in streams])  # [N, L]
        return prompts, self.policy.sample([p.token_ids for batch in prompts for p in batch], uniforms)

    def round(self) -> dict[str, float]:
        """One communication round. Returns its metrics, by names that never change.

        Raises ValueError where every client's upload is broken.
        """
        started, t, size = time.perf_counter(), self.rounds_done, self.config.batch_size
        chosen = fedavg.sample_clients(
            len(self.clients), self.config.clients_per_round or len(self.clients), stream(self.seed, CLIENT_SAMPLING, t)
        )
        cohort = [self.clients[c] for c in chosen]
        self.policy.adapter.assign(self.theta)  # broadcast θ_t
        prompts, rollout = self.rollout(cohort, t, TRAINING)
        raw = self.score([p for batch in prompts for p in batch], rollout)  # [N, M]
        scores = self.calibrate(raw).to(self.policy.device, torch.float32)  # [N, M]

        row_slices = [slice(i * size, (i + 1) * size) for i in range(len(cohort))]
        prompts_held = torch.tensor([len(client.prompts) for client in cohort], dtype=torch.float64)
        ledger = fedavg.Ledger()
        ledger.down({"theta": self.theta}, scalars=1)  # and κ

        method = self.method
        if method.server_weights:
            lam = self._server_lambda(cohort, prompts_held, rollout, scores, row_slices, ledger)
            method = replace(method, weights=lambda Ghat, config: lam)

        uploads, logs = [], []
        for client, rows in zip(cohort, row_slices, strict=True):
            batch = rollout.rows(rows)
            by_run = [
                local_update(
                    run[client.index], self.policy, self.theta, batch, scores[rows] @ R.to(scores), self.kl_coef,
                    method, self.config, self.ppo_config,
                )
                for run, R in zip(self.runs, self.run_rewards, strict=True)  # FIRM: one run, R = I
            ]  # fmt: skip
            uploads.append(torch.stack([upload for upload, _ in by_run]))
            logs.append([log for _, log in by_run])

        uploads = torch.stack(uploads)  # [C, runs, d]
        ledger.up({"theta": uploads[0]}, scalars=2)  # and prompts held, mean KL
        finite = fedavg.finite(uploads).cpu()  # [C]
        if not finite.any():
            raise ValueError("lr: every client's update is broken (NaN or infinite); lower lr")
        self.theta, mixing = method.aggregate(self.theta, uploads[finite], prompts_held[finite], self.config)
        self.policy.adapter.assign(self.theta)

        metrics = monitor.rewards_and_kl(self.names, raw, rollout, logs, self.kl_coef)
        agreement, self.mean_lambda, self.grams = monitor.agreement(
            self.names, self.run_rewards, mixing, logs, uploads, prompts_held * finite, self.policy.adapter,
            self.mean_lambda,
        )  # fmt: skip
        metrics |= agreement | ledger.metrics() | {"rejected_clients": int((~finite).sum())}
        self.kl_coef = ppo.adapt_kl(self.kl_coef, metrics["kl"], len(rollout), self.ppo_config)
        self.rounds_done += 1
        return {"round": t, **metrics, "seconds": time.perf_counter() - started}

    def _server_lambda(
        self, cohort: Sequence[Client], prompts_held: Tensor, rollout: Rollout, scores: Tensor, row_slices: list[slice],
        ledger: fedavg.Ledger,
    ) -> Tensor:  # fmt: skip
        """λ [M] of a method whose server picks it, from every client's gradients at θ_t."""
        J = [
            objective_gradients(
                client, self.policy, self.theta, rollout.rows(rows), scores[rows], self.kl_coef, self.method,
                self.ppo_config,
            )
            for client, rows in zip(cohort, row_slices, strict=True)
        ]  # fmt: skip
        rng = stream(self.seed, SERVER, self.rounds_done)
        return self.method.server_weights(torch.stack(J), prompts_held, self.server_state, ledger, rng)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a restart needs beside the settings: tensors, and a few JSON values."""
        tensors = {"theta": self.theta} | {f"server.{name}": t for name, t in self.server_state.items()}
        if self.mean_lambda is not None:
            tensors["mean_lambda"] = self.mean_lambda
        for r, run in enumerate(self.runs):
            for client in run:
                tensors |= {f"run{r}.client{client.index}.{name}": t for name, t in client.state().items()}
        shape = [len(self.runs), len(self.clients), len(self.names)]
        return tensors, {"rounds_done": self.rounds_done, "kl_coef": self.kl_coef, "shape": shape}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave. Raises ValueError where the checkpoint is of another federation."""
        shape = [len(self.runs), len(self.clients), len(self.names)]
        if tensors["theta"].shape != self.theta.shape or values["shape"] != shape:
            raise ValueError("resume: the checkpoint is of another federation; resume with its own settings")
        under = lambda prefix: {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.theta, self.mean_lambda = tensors["theta"].to(self.policy.device), tensors.get("mean_lambda")
        self.rounds_done, self.kl_coef, self.server_state = values["rounds_done"], values["kl_coef"], under("server.")
        for r, run in enumerate(self.runs):
            for client in run:
                client.restore(under(f"run{r}.client{client.index}."))
        self.policy.adapter.assign(self.theta)
