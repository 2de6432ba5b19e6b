"""The methods FIRM is compared with: what changes in `firm.Method`, and nothing else.

To add one: `replace` a method with its own parts, and append it to `METHODS` (methods.py). What a server
remembers goes into its `state`, and a checkpoint keeps it.

    method    a client uploads per round     who picks λ, and from what                              takes p
    morlhf    d                              nobody: Σ_j p_j R_j is one reward, with one critic      yes
    fsmgda    M·d                            server, min-norm over the M averaged updates            no
    fedcmoo   (1 + e)·d, M(M+1) scalars      server, towards min-norm of compressed gradients        no
    soups     d, in each of M separate runs  nobody: the trained specialists are interpolated by p   yes
    minimum   d                              nobody: the least of a response's M rewards is its one  no
    maximum   d                              nobody: the greatest of them                            no
    adaptive  d, M scalars                   server: Σ_j α_j R_j is one reward, α from the past      no

MORLHF (the baseline of RiC). `linear` in `firm.py` whitens every objective before weighing it. MORLHF whitens the one
reward: an objective whose scores vary more counts for more.                                                      [code]

FSMGDA (Yang et al. 2023). Each client trains once per objective from θ_t, on the same responses [ours].         [paper]
    Δ_m = Σ_c w_c (θ_{c,m} − θ_t),  λ = argmin over the simplex ‖Σ_m λ_m Δ_m‖²,  θ_{t+1} = θ_t + η_s Σ_m λ_m Δ_m
It takes M times FIRM's local steps, and the min-norm point of M near-orthogonal updates of one length is √M times
shorter than each of them: tune η_s.

FedCMOO (arXiv 2410.16398). All clients use one λ in all their local steps of a round, from the estimated Gram Γ of
their mean gradient. N clients, G_c [M, d] the gradients of client c at θ_t, L_c their low-rank part, R_c = G_c − L_c
the rest, which stays at home:                                                                             [paper, code]
    1. up    L_c
    2. down  T, the low-rank part of Σ_c L_c, and the client's weight
    3. up    Γ_c = G_c G_cᵀ + K_c + K_cᵀ with K_c = (½ L_c + R_c)(T − L_c)ᵀ, and R_c R_cᵀ: symmetric, M(M+1) scalars
    4. down  λ, after 1000 steps of λ ← Π(λ − 0.001 Ĝ λ) from the last round's λ, Ĝ = Γ / (mean_i √(Γ_ii + 1e-4))²
where N² Γ = Σ_c Γ_c, plus (N − 1) Σ_c R_c R_cᵀ if Σ_c ‖L_c‖² ≤ 1.5² Σ_c ‖R_c‖².
If nothing is lost (e = 2M), N² Γ is exactly Σ_c Σ_b G_c G_bᵀ. Else Σ_c Γ_c misses R_c R_bᵀ for b ≠ c. The extra term
puts R_b = R_c: right for clients that agree, several times too large on the diagonal for independent noise. 1000 steps
go 1 − exp(−1) of the way for orthogonal gradients of equal norm: λ is an average over rounds, not this round's QP.
[ours]  K_c is added with its transpose (the code: twice R_c (T − L_c)ᵀ, which is not symmetric); N² (the code: N, which
        matters only beside 1e-4); G_c is scaled by N w_c first, which makes Γ the Gram of Σ_c w_c G_c; a diagonal that
        the estimate made negative counts as 0 in the scale; λ is uniform before the first round.

Rewarded Soups (Ramé et al. 2023): train one specialist per objective, then serve Σ_m p_m θ_m for any p.         [paper]
It averages A and B apart, so the served update is not the average of the specialists' products BA.

Minimum, maximum, adaptive (arXiv 2512.08786, 2604.04261). The extremes compare raw rewards, which must be in one unit;
because of the KL penalty one mean and scale then calibrates all M [ours]. α = softmax(−h / T), h_j the running mean of
objective j's raw reward: the objective that was served worst so far counts most. Σ_j α_j R_j adds calibrated rewards.
[paper: the three, abstracts only. ours: h moves by 0.3 a round, T = 0.1 in the rewards' unit, the first round has equal
α. The published rule is softmax((1 − h) / T) behind a gate: the plain mean while the fairness index is at least 0.9]

Left out on purpose: FedCMOO-Pref, FedCMOO's top-k compression and momentum (0 in the code), its reuse of G_c in the
first local step (the same gradient is computed again here), FSMGDA's compressed uploads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fedavg
import mgda
import ppo
from clients import Client, Purpose, stream
from fedavg import Server, Upload, n_bytes
from firm import LINEAR, Federation, Trainings, Weights, contexts

COMPRESSION = 1.0  # e: FedCMOO's message is about as large as this many adapters [code]
POWER_ITERATIONS = 2  # of the randomised SVD [code]
RESIDUAL_RATIO = 1.5  # ‖L‖ / ‖R‖ up to which the rests' cross terms are guessed [code]
STEP, STEPS = 0.001, 1000  # of the projected gradient that picks FedCMOO's λ [code]
TEMPERATURE, RATE = 0.1, 0.3  # of adaptive's α, and how far a round moves the running mean [ours]

ONE_LOSS = Weights("one loss", "", lambda context: torch.ones(1, dtype=torch.float64))
SCALARISED = Trainings("one, on Σ p_j R_j", lambda p, message: [p[:, None]], settings=("preference",))
SCALARISED_WITHOUT_P = replace(SCALARISED, settings=())
MORLHF = replace(LINEAR, name="morlhf", help="the one reward Σ p_j R_j", trainings=SCALARISED, weights=ONE_LOSS)
SOUPS = replace(MORLHF, name="soups", help="specialists mixed by p (with --sweep or --compare)", several_runs=True)


def interpolate(specialists: Tensor, preference: Sequence[float] | Tensor | None) -> Tensor:
    """Rewarded Soups: Σ_m p_m θ_m. specialists [M, d], preference [M] or None for uniform. Returns [d]. [paper]"""
    return fedavg.average(specialists, mgda.preference_vector(preference, len(specialists)))


class FSMGDAServer(Server):
    """Mixes M averaged updates by their min-norm weights."""

    equal_objectives = True

    def training_shares(self, updates: Tensor, weights: Tensor) -> Tensor:
        """FSMGDA's λ [M]: the min-norm weights of the averaged updates Δ_m; updates [C, M, d], weights [C]. [paper]

        If several λ are min-norm, or every update is zero, λ is the one nearest uniform. [ours]
        """
        mean = torch.stack([fedavg.average(of_all_clients, weights) for of_all_clients in updates.unbind(1)])  # [M, d]
        return mgda.solve(mgda.normalise(mgda.gram(mean)), beta=0.0)


EACH_ALONE = Trainings("one per objective", lambda p, message: list(torch.eye(len(p)).split(1, dim=1)))
FSMGDA = replace(
    MORLHF, name="fsmgda", help="a training per objective, server-side min-norm of the updates", trainings=EACH_ALONE,
    server=FSMGDAServer,
)  # fmt: skip


def factorise(X: Tensor, rank: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """X [r, n] ≈ left [r, k] @ right [k, n] with k = min(rank, r, n): randomised truncated SVD (Halko et al. 2011).

    Oversampled by a tenth, two power iterations [code]; exact if the rank is full. `right` has orthonormal rows, and
    left = X rightᵀ. The sketch is drawn on the CPU from `rng`: equal for every device.
    """
    rank = min(rank, *X.shape)
    if rank == min(X.shape):
        left, scale, right = torch.linalg.svd(X, full_matrices=False)
        return {"left": left * scale, "right": right}
    sketch = torch.from_numpy(rng.standard_normal((len(X), min(rank + rank // 10, *X.shape)))).to(X)
    basis = torch.linalg.qr(X.T @ sketch).Q  # [n, k + k/10], orthonormal columns
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(X.T @ torch.linalg.qr(X @ basis).Q).Q
    left, scale, right = torch.linalg.svd(X @ basis, full_matrices=False)
    return {"left": (left * scale)[:, :rank], "right": right[:rank] @ basis.T}


def compress(A: Tensor, e: float, rng: np.random.Generator) -> dict[str, Tensor]:
    """FedCMOO's low-rank factors of A [M, d]: e·d numbers, since they have about 2 √(dM) · rank. [code]

    A is first folded to be about square: every objective is cut into q rows of n numbers, zero-padded.
    """
    M, d = A.shape
    n = math.isqrt(d * M)
    folded = torch.nn.functional.pad(A, (0, -d % n)).reshape(-1, n)  # [M·q, n], q = ⌈d/n⌉
    return factorise(folded, max(1, int(0.5 * e * math.sqrt(d / M))), rng)  # rank ⌊e·d / (2 √(dM))⌋ = ⌊e/2 √(d/M)⌋


def expand(factors: dict[str, Tensor], M: int, d: int) -> Tensor:
    """The low-rank [M, d] that `compress` packed, in float64, without the padding."""
    return (factors["left"].double() @ factors["right"].double()).reshape(M, -1)[:, :d]  # [M, q·n] cut to [M, d]


def gram_terms(G: Tensor, low_rank: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange 3: a client's Γ_c and R Rᵀ [M, M], from G, low_rank (L) and T [M, d], all float64."""
    R = G - low_rank
    K = (0.5 * low_rank + R) @ (T - low_rank).T
    return G @ G.T + K + K.T, R @ R.T


def mean_gram(known: Tensor, rest: Tensor, captured: float) -> Tensor:
    """Server: the clients' Γ_c and R Rᵀ [N, M, M], and Σ_c ‖L_c‖², to the estimated Gram [M, M] of the mean."""
    N = len(known)
    total = known.sum(0)
    if captured <= RESIDUAL_RATIO**2 * float(rest.sum(0).trace()):
        total = total + (N - 1) * rest.sum(0)
    return total / N**2


def estimate_gram(G: Tensor, e: float, rng: np.random.Generator) -> tuple[Tensor, tuple[int, int]]:
    """Exchanges 1 to 3: the Gram [M, M], in float64 on the CPU, of mean_c G_c, G [N, M, d]; a client's bytes up and
    down. [paper]
    """
    N, M, d = G.shape
    messages = [compress(G_c, e, rng) for G_c in G]
    total, captured = torch.zeros(M, d, dtype=torch.float64, device=G.device), 0.0
    for message in messages:
        low_rank = expand(message, M, d)
        total += low_rank
        captured += float(low_rank.square().sum())
    answer = compress(total.to(G), e, rng)
    T = expand(answer, M, d)
    terms = [gram_terms(G_c.double(), expand(message, M, d), T) for G_c, message in zip(G, messages, strict=True)]
    known, rest = (torch.stack(parts).cpu() for parts in zip(*terms, strict=True))  # [N, M, M]
    return mean_gram(known, rest, captured), (n_bytes(messages[0], M * (M + 1)), n_bytes(answer, 1))


def descend(lam: Tensor, gram: Tensor) -> Tensor:
    """Exchange 4: projected-gradient steps on ½ λᵀĜλ from lam [M]; gram [M, M] is scaled to Ĝ first. [code]"""
    gram = gram / (gram.diagonal().clamp_min(0.0) + 1e-4).sqrt().mean().square()
    for _ in range(STEPS):
        lam = mgda.project_simplex(lam - STEP * (gram @ lam))
    return lam


def gradients_at_start(federation: Federation, work: Iterable[tuple], faults: dict[int, str]) -> dict[int, Tensor]:
    """Each client's gradients J [M, d] at θ_t, by its number; `faults` gains the clients that have none."""
    method, config, J = federation.method, federation.config, {}
    for client, batch, _ in work:
        (context,) = contexts(client, batch, {"theta": federation.theta}, method, config, federation.rounds_done)
        advantages = method.estimator.advantages(context.batch, context.state, config).normalised
        try:
            J[client.index] = ppo.policy_gradients(federation.policy, context.batch, advantages, config).J
        except ppo.NotFinite as error:
            faults[client.index] = str(error)
    return federation.gathered(J, faults)


class FedCMOOServer(Server):
    """Picks λ before the local runs, and remembers it as the next round's start."""

    equal_objectives = asks_first = True

    def broadcast(self, federation: Federation, work: Iterable[tuple], faults: dict[int, str]) -> dict[str, Tensor]:
        """The λ [M] of a round."""
        J = gradients_at_start(federation, work, faults)
        n = torch.tensor([len(federation.clients[c].prompts) for c in J], dtype=torch.float64)  # [N]
        G = torch.stack(list(J.values()))  # [N, M, d]
        G = G * (len(n) * n / n.sum()).to(G)[:, None, None]
        rng = stream(self.config.seed, Purpose.SERVER, federation.rounds_done)
        gram, self.exchanged = estimate_gram(G, COMPRESSION, rng)
        start = self.state.get("lambda", mgda.preference_vector(None, G.shape[1]))
        self.state["lambda"] = descend(start, gram)
        return {"lambda": self.state["lambda"]}


FEDCMOO = replace(
    LINEAR, name="fedcmoo", help="one lambda a round, by the server, from compressed gradients", server=FedCMOOServer,
    weights=Weights("server's", "", lambda context: context.message["lambda"]),
)  # fmt: skip


class AdaptiveServer(Server):
    """Weighs objectives by how badly they were served so far; state: the running mean reward h [M]."""

    equal_objectives = True

    @staticmethod
    def numbers(client: Client, raw: Tensor) -> dict[str, float]:
        """The mean raw reward of each objective, in the unit of T; raw [B, M]."""
        return {f"reward{j}": value for j, value in enumerate(raw.mean(0).tolist())}

    def broadcast(self, federation: Any, work: Iterable[tuple], faults: dict[int, str]) -> dict[str, Tensor]:
        """α [M]; before the first round equal weights."""
        h = self.state.get("mean_reward", torch.zeros(len(federation.names), dtype=torch.float64))
        return {"alpha": torch.softmax(-h / TEMPERATURE, 0)}

    def step(self, theta: Tensor, uploads: Sequence[Upload]) -> tuple[Tensor, Tensor, Tensor]:
        """FedAvg; h moves towards this round's mean rewards."""
        means = [[x for name, x in upload.numbers.items() if name.startswith("reward")] for upload in uploads]
        means = torch.tensor(means, dtype=torch.float64)  # [C, M]
        now = fedavg.average(means, fedavg.prompts_held(uploads))  # [M]
        self.state["mean_reward"] = (1 - RATE) * self.state["mean_reward"] + RATE * now if self.state else now
        return super().step(theta, uploads)


LEAST = replace(SCALARISED_WITHOUT_P, combine=lambda scores, mix: scores.amin(1, keepdim=True), one_scale=True)
GREATEST = replace(SCALARISED_WITHOUT_P, combine=lambda scores, mix: scores.amax(1, keepdim=True), one_scale=True)
BY_ALPHA = replace(SCALARISED_WITHOUT_P, mixes=lambda p, message: [message["alpha"][:, None]])
MINIMUM = replace(MORLHF, name="minimum", help="the least of a response's rewards", trainings=LEAST)
MAXIMUM = replace(MORLHF, name="maximum", help="the greatest of a response's rewards", trainings=GREATEST)
ADAPTIVE = replace(
    MORLHF, name="adaptive", help="the one reward Σ α_j R_j, α by how badly an objective is served", trainings=BY_ALPHA,
    server=AdaptiveServer,
)  # fmt: skip
