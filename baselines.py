"""The methods FIRM is compared with: what changes in `firm.Method`, and nothing else.

To add one: `replace` a method with its own parts, and append it to `settings.METHODS`; flags, help, sweeps, pictures
and tests find it there. What a server remembers goes into `server.state`, and a checkpoint keeps it.

    method    a client uploads per round     who picks λ, and from what                              takes p
    morlhf    d                              nobody: Σ_j p_j R_j is one reward, with one critic      yes
    fsmgda    M·d                            server, min-norm over the M averaged updates            no
    fedcmoo   (1 + e)·d, M(M+1) scalars      server, towards min-norm of compressed gradients        no
    soups     d, in each of M separate runs  nobody: the trained specialists are interpolated by p   yes
    minimum   d                              nobody: the least of a response's M rewards is its one  no
    maximum   d                              nobody: the greatest of them                            no
    adaptive  d, M scalars                   server: Σ_j α_j R_j is one reward, α from the past      no

`linear` (fixed weights) and `mgda` (β = 0) stand beside FIRM in `firm.py`.

MORLHF (the baseline of RiC). One PPO run on the scalar reward Σ_j p_j R_j, with one critic and one whitening. `linear`
whitens every objective before weighing it; here an objective whose scores vary more counts for more.             [code]

FSMGDA (Yang et al. 2023). Every client trains once per objective, each time from θ_t with a fresh optimizer, and
uploads M adapters. Δ_m = Σ_c w_c (θ_{c,m} − θ_t), λ = argmin over the simplex ‖Σ_m λ_m Δ_m‖², and
θ_{t+1} = θ_t + η_s Σ_m λ_m Δ_m.                                                                                 [paper]
A client's M runs share its responses [ours]. FSMGDA takes M times FIRM's local steps, and the min-norm point of M
near-orthogonal updates of one length is √M times shorter than each of them: tune η_s.

FedCMOO (arXiv 2410.16398). The server estimates the Gram of the mean gradient at θ_t from compressed gradients and
picks one λ, which all clients use in all their local steps of the round. With one row per objective:      [paper, code]
    1. up    C_c, the low-rank part of the gradients A_c [M, d] at θ_t; D_c = A_c − C_c stays at home
    2. down  S, the low-rank part of Σ_c C_c, and the client's weight
    3. up    Γ_c = A_c A_cᵀ + K_c + K_cᵀ with K_c = (½ C_c + D_c)(S − C_c)ᵀ, and D_c D_cᵀ: symmetric, M(M+1) scalars
    4. down  λ, after K_w steps of λ ← Π(λ − η_w G̃ λ) from the last round's λ, G̃ = G / (mean_i √(G_ii + 1e-4))²
where C² G = Σ_c Γ_c, plus (C − 1) Σ_c D_c D_cᵀ if Σ_c ‖C_c‖² ≤ 1.5² Σ_c ‖D_c‖².
Lossless (e = 2M), this is exactly Σ_c Σ_b A_c A_bᵀ. Else Σ_c Γ_c misses D_c D_bᵀ for b ≠ c, and what S lost. The extra
term puts D_b = D_c: right for clients that agree, several times too large on the diagonal for independent noise.
η_w K_w = 1 [code]: one round goes 1 − 1/e (e = 2.718…) of the way for orthogonal gradients of equal norm, and less
where they are alike, or shorter than 0.01 (there the 1e-4 rules). λ is an average over rounds, not this round's QP.
[ours]  K_c is added with its transpose (the code: twice D_c (S − C_c)ᵀ, which is not symmetric); C² (the code: C, which
        matters only beside 1e-4); A_c is scaled by C w_c first, so that G is the Gram of Σ_c w_c A_c; a diagonal that
        the estimate made negative counts as 0 in the scale; λ is uniform before the first round.
A client would keep A_c and take its first local step with it; the simulation computes the same gradient again.

Rewarded Soups (Ramé et al. 2023): train one specialist per objective, then serve Σ_m p_m θ_m for any p.         [paper]
It averages A and B apart, so the served update is not the average of the specialists' products BA.

Minimum, maximum, adaptive (arXiv 2512.08786, 2604.04261): groups' rewards become one on the reward side, as Σ_j R_j / M
does in MORLHF. The extremes compare raw rewards, which must be in one unit; for the KL penalty's sake all M are then
calibrated by one mean and scale [ours]. α = softmax(−h / T), h_j the running mean of objective j's raw reward, all in
one unit, that of T: who is served worst so far counts most. R_j is calibrated, as in MORLHF. [paper: the three,
abstracts only. ours: h decays by `adaptive_rate` a round; the first round has equal α]

Left out on purpose: FedCMOO-Pref, its top-k compression and momentum (0 in the code), FSMGDA's compressed uploads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fedavg
import mgda
from app.fields import Checked, Count, Positive, Share, setting
from clients import Client, LocalTraining
from fedavg import Ledger, Server, Upload
from firm import LINEAR
from ppo import Batch

POWER_ITERATIONS = 2  # of the randomised SVD [code]
RESIDUAL_RATIO = 1.5  # ‖C‖ / ‖D‖ up to which the residuals' cross terms are guessed [code]


def scalarised(p: Tensor) -> list[Tensor]:
    """One training on the one reward Σ_j p_j R_j: a list of one [M, 1]. [code: RiC]"""
    return [p[:, None]]


def one_per_objective(p: Tensor) -> list[Tensor]:
    """M trainings, each on one objective: the columns [M, 1] of the identity. [paper: FSMGDA]"""
    return list(torch.eye(len(p)).split(1, dim=1))


def min_norm_of_updates(updates: Tensor, weights: Tensor, server: Server) -> Tensor:
    """FSMGDA's λ [M]: the min-norm weights of the averaged updates Δ_m. [paper]

    updates [C, M, d], weights [C]. Where several λ are min-norm, or every update is zero, λ is the one nearest
    uniform. [ours]
    """
    mean = torch.stack([fedavg.average(of_all_clients, weights) for of_all_clients in updates.unbind(1)])  # [M, d]
    return mgda.solve(mgda.normalise(mgda.gram(mean)), beta=0.0)


MORLHF = replace(LINEAR, name="morlhf", help="the one reward Σ p_j R_j", trainings=scalarised)
FSMGDA = replace(
    LINEAR, name="fsmgda", help="a training per objective, server-side min-norm of the updates", takes_preference=False,
    trainings=one_per_objective, server_mixing=min_norm_of_updates,
)  # fmt: skip
SOUPS = replace(
    MORLHF, name="soups", help="a specialist per objective, mixed by p (with --sweep or --compare)", mixes=True
)


def interpolate(specialists: Tensor, preference: Sequence[float] | Tensor | None) -> Tensor:
    """Rewarded Soups: Σ_m p_m θ_m. specialists [M, d], preference [M] or None for uniform. Returns [d]. [paper]"""
    return fedavg.average(specialists, mgda.preference_vector(preference, len(specialists)))


@dataclass
class FedCMOOConfig(Checked):
    """FedCMOO's own settings."""

    fedcmoo_compression: Positive = setting(
        1.0, "fedcmoo: e, size of a compressed message in adapters [code: 1]; 2M is lossless"
    )
    fedcmoo_step: Positive = setting(
        0.001, "fedcmoo: step of the projected gradient that picks the weights [code: 0.001]"
    )
    fedcmoo_iterations: Count = setting(1000, "fedcmoo: steps of that projected gradient per round [code: 1000]")


def fold(A: Tensor) -> Tensor:
    """A [M, d] -> [M·q, n], about square: n = ⌊√(dM)⌋, every objective cut into q = ⌈d/n⌉ rows, zero-padded. [code]"""
    M, d = A.shape
    n = math.isqrt(d * M)
    q = -(-d // n)
    return torch.nn.functional.pad(A, (0, q * n - d)).reshape(M * q, n)


def factorise(X: Tensor, rank: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """X [r, n] ≈ left [r, k] @ right [k, n] with k = min(rank, r, n): randomised truncated SVD (Halko et al. 2011).

    Oversampled by a tenth, two power iterations [code]; exact where the rank is full. `right` has orthonormal rows and
    left = X rightᵀ, so all of X is projected onto one subspace of R^n, and (X − left right) rightᵀ = 0.
    The sketch is drawn on the CPU from `rng`: equal for every device.
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
    """The low-rank factors of A [M, d]: e·d numbers, since they have about 2 √(dM) · rank. [code]"""
    M, d = A.shape  # rank = ⌊e·d / (2 √(dM))⌋ = ⌊e/2 √(d/M)⌋
    return factorise(fold(A), max(1, int(0.5 * e * math.sqrt(d / M))), rng)


def expand(factors: dict[str, Tensor], M: int, d: int) -> Tensor:
    """The low-rank [M, d] that `compress` packed, in float64, without the padding."""
    return (factors["left"].double() @ factors["right"].double()).reshape(M, -1)[:, :d]  # [M, q·n] cut to [M, d]


def gram_terms(A: Tensor, low_rank: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """What one client computes once it holds S: Γ and D Dᵀ [M, M], see above. A, low_rank (C), S [M, d] in float64."""
    D = A - low_rank
    K = (0.5 * low_rank + D) @ (S - low_rank).T
    return A @ A.T + K + K.T, D @ D.T


def mean_gram(known: Tensor, residual: Tensor, captured: float) -> Tensor:
    """Server: the clients' Γ and D Dᵀ [C, M, M], and Σ_c ‖C_c‖², to G [M, M], the estimated Gram of the mean."""
    C = len(known)
    G = known.sum(0)
    if captured <= RESIDUAL_RATIO**2 * float(residual.sum(0).trace()):
        G = G + (C - 1) * residual.sum(0)
    return G / C**2


def estimate_gram(A: Tensor, e: float, ledger: Ledger, rng: np.random.Generator) -> Tensor:
    """Exchanges 1 to 3: the Gram [M, M], in float64 on the CPU, of mean_c A_c; A [C, M, d]. [paper]"""
    C, M, d = A.shape
    messages = [compress(A_c, e, rng) for A_c in A]
    ledger.up(messages[0])
    total, captured = torch.zeros(M, d, dtype=torch.float64, device=A.device), 0.0
    for message in messages:
        low_rank = expand(message, M, d)
        total += low_rank
        captured += float(low_rank.square().sum())
    answer = compress(total.to(A), e, rng)
    ledger.down(answer, scalars=1)
    S = expand(answer, M, d)
    terms = [gram_terms(A_c.double(), expand(message, M, d), S) for A_c, message in zip(A, messages, strict=True)]
    ledger.up({}, scalars=M * (M + 1))
    known, residual = (torch.stack(parts).cpu() for parts in zip(*terms, strict=True))  # [C, M, M]
    return mean_gram(known, residual, captured)


def descend(lam: Tensor, G: Tensor, settings: FedCMOOConfig) -> Tensor:
    """Exchange 4: K_w projected-gradient steps on ½ λᵀG̃λ from lam [M]; G [M, M] is scaled to G̃ first. [code]

    G = 0 leaves lam as it is. Raises ValueError where G is not finite.
    """
    if not torch.isfinite(G).all():
        raise ValueError("fedcmoo: the estimated Gram matrix is not finite; a gradient has overflowed or is NaN")
    G = G / (G.diagonal().clamp_min(0.0) + 1e-4).sqrt().mean().square()
    for _ in range(settings.fedcmoo_iterations):
        lam = mgda.project_simplex(lam - settings.fedcmoo_step * (G @ lam))
    return lam


def fedcmoo_weights(J: Tensor, prompts_held: Tensor, server: Server) -> Tensor:
    """The λ [M] of a round, from J [C, M, d] at θ_t and prompts_held [C]; the server remembers it as the next start."""
    C, M, _ = J.shape
    shares = C * prompts_held / prompts_held.sum()  # C w_c [C], of mean 1
    A = J * shares.to(J)[:, None, None]
    if not torch.isfinite(A).all():
        raise ValueError("fedcmoo: a client's gradient is not finite; it has overflowed or is NaN")
    G = estimate_gram(A, server.settings.fedcmoo_compression, server.ledger, server.rng)
    start = server.state.get("lambda", mgda.preference_vector(None, M))
    server.state["lambda"] = descend(start, G, server.settings)
    server.ledger.down({}, scalars=M)
    return server.state["lambda"]


FEDCMOO = replace(
    LINEAR, name="fedcmoo", help="one lambda a round, by the server, from compressed gradients", takes_preference=False,
    server_weights=fedcmoo_weights, settings=FedCMOOConfig(),
)  # fmt: skip


# ---- one reward of several, on the reward side -----------------------------------------------------------------


@dataclass
class AdaptiveConfig(Checked):
    """The adaptive aggregation's own settings."""

    adaptive_temperature: Positive = setting(
        0.1, "adaptive: T; 0.1 gives an objective whose mean reward is 0.1 lower e times the weight [ours]"
    )
    adaptive_rate: Share = setting(0.3, "adaptive: weight of the newest round in the running mean of rewards [ours]")


def smallest(batch: Batch, training: LocalTraining, state: dict[str, Tensor]) -> Batch:
    """Each response has the least of its rewards, on one scale, [B, M] -> [B, 1]. [paper]"""
    return replace(batch, scores=batch.scores.amin(1, keepdim=True))


def largest(batch: Batch, training: LocalTraining, state: dict[str, Tensor]) -> Batch:
    """Each response has the greatest of its rewards, on one scale, [B, M] -> [B, 1]. [paper]"""
    return replace(batch, scores=batch.scores.amax(1, keepdim=True))


def weighed(batch: Batch, training: LocalTraining, state: dict[str, Tensor]) -> Batch:
    """Each response has Σ_j α_j R_j, with the server's α [M], which becomes the training's column. [paper]"""
    if "alpha" in state:
        training.columns = state["alpha"][:, None]
    return batch.combined(training.columns)


def mean_rewards(client: Client, raw: Tensor, S: int) -> dict[str, float]:
    """What a client's upload says beside the adapter: its mean raw reward of each of its objectives, in their order.

    raw [B, M], in the unit of T.
    """
    own = raw[:, client.objectives]
    return {f"reward{j}": value for j, value in enumerate(own.mean(0).tolist())}


def adapt_alpha(theta: Tensor, uploads: Sequence[Upload], server: Server) -> Tensor:
    """The next θ [d], by FedAvg; the running means h [M] and the next round's α [M] go into the server's state."""
    means = torch.tensor([list(upload.numbers.values()) for upload in uploads]).double()  # [C, M]
    now, rate = fedavg.average(means, fedavg.prompts_held(uploads)), server.settings.adaptive_rate
    h = server.state["mean_reward"] = (1 - rate) * server.state["mean_reward"] + rate * now if server.state else now
    server.state["alpha"] = torch.softmax(-h / server.settings.adaptive_temperature, 0)
    server.ledger.down({}, scalars=len(h))
    return fedavg.federated_average(theta, uploads, server)


UNIFORM = replace(MORLHF, takes_preference=False)
MINIMUM = replace(UNIFORM, name="minimum", help="the least of a response's rewards", combine=smallest, compares=True)
MAXIMUM = replace(UNIFORM, name="maximum", help="the greatest of a response's rewards", combine=largest, compares=True)
ADAPTIVE = replace(
    UNIFORM, name="adaptive", help="the one reward Σ α_j R_j, α by how badly an objective is served", combine=weighed,
    numbers=mean_rewards, aggregate=adapt_alpha, settings=AdaptiveConfig(),
)  # fmt: skip
