"""What to watch: pure functions from gradients, weights, adapters and log-probs to numbers.

[ours] where no source is named.
Nothing here changes training; `monitor.py` applies most of these to what a round has at hand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def disagreement(lambdas: Tensor) -> float:
    """mean_c ‖λ_c − λ̄‖, the client disagreement [paper]. lambdas [C, M]; 0 for one client."""
    return float((lambdas - lambdas.mean(0)).norm(dim=1).mean())


def dispersion(thetas: Tensor) -> float:
    """mean_c ‖θ_c − θ̄‖, how far the clients' adapters lie from their mean. thetas [C, d]."""
    return float((thetas - thetas.mean(0)).norm(dim=1).mean())


def averaging_residual(thetas: Sequence[Sequence[Tensor]], weights: Tensor, scale: float) -> tuple[float, float]:
    """‖mean(ΔW) − scale · mean(B) mean(A)‖ and ‖mean(ΔW)‖, ΔW = scale · BA, over all layers (Frobenius).

    What averaging A and B separately loses, and what there is to lose. thetas: each client's [A₀, B₀, A₁, B₁, …], A
    [r, in] and B [out, r]; weights [C], of any sum. With a = A − mean(A) and b = B − mean(B), the residual is
    scale · mean(ba): matrices of rank C·r, so it needs no [out, in] matrix.
    """
    w = (weights / weights.sum()).to(thetas[0][0])
    residual, norm = torch.zeros(2, dtype=torch.float64, device=thetas[0][0].device).unbind()
    for layer in range(0, len(thetas[0]), 2):
        A, B = (torch.stack([theta[layer + i] for theta in thetas]) for i in (0, 1))  # [C, r, in], [C, out, r]
        a, b = (X - torch.einsum("c,cij->ij", w, X) for X in (A, B))
        residual += _product_norm(torch.cat(list(w[:, None, None] * b), 1), a.flatten(0, 1))
        norm += _product_norm(torch.cat(list(w[:, None, None] * B), 1), A.flatten(0, 1))
    return scale * float(residual) ** 0.5, scale * float(norm) ** 0.5


def _product_norm(P: Tensor, Q: Tensor) -> Tensor:
    """‖PQ‖² of P [out, n] and Q [n, in], through n × n matrices."""
    return ((P.T @ P) * (Q @ Q.T)).sum().double().clamp_min(0.0)


def drift(gram: Tensor, lambdas: Tensor, weights: Tensor) -> float:
    """‖Σ w_c J_cᵀ(λ_c − λ̄)‖ / ‖Σ w_c J_cᵀλ_c‖: how much of the federation's direction is disagreement alone.

    With unequal λ_c the federation comes to rest where Σ w_c J_cᵀλ_c = 0, which is not Pareto-stationary; this is the
    part that keeps it away. λ̄ = Σ w_c λ_c. gram [C, M, C, M] holds ⟨g_{c,i}, g_{c′,j}⟩ of all clients at one θ,
    lambdas [C, M], weights [C] of any sum. NaN where the step is zero.
    """
    w = weights / weights.sum()  # directions are gradients, before any optimizer
    mean = torch.einsum("c,cm->m", w, lambdas)
    norms = [
        max(float(torch.einsum("cm,cmdn,dn->", w[:, None] * v, gram, w[:, None] * v)), 0.0) ** 0.5
        for v in (lambdas - mean, lambdas)
    ]
    return norms[0] / norms[1] if norms[1] > 0 else float("nan")


def federated_gram(gram: Tensor, weights: Tensor) -> Tensor:
    """Inner products of the half-batch gradients of the whole federation, g_{h,j} = Σ_c w_c g_{c,h,j}.

    gram [C, 2, M, C, 2, M], weights [C] of any sum -> [2, M, 2, M]. A half's gradient is a sum over its tokens
    divided by those of the whole batch, so that the two halves add up to the gradient.
    """
    w = weights / weights.sum()
    return torch.einsum("c,chmdin,d->hmin", w, gram, w)


def half_batch_stationarity(gram: Tensor, lambdas: Tensor, rows: int) -> float:
    """‖Jᵀλ‖² estimated on independent halves, λ_aᵀ J_a J_bᵀ λ_a, mean over the two choices of the half a.

    gram [2, M, 2, M] from `federated_gram`; lambdas [2, M], each chosen on one half alone; rows, the size of the whole
    batch, whose halves' gradients add up to J. On one batch ‖Jᵀλ‖² is biased upward by the squared noise of J; two
    halves have independent noise, so for a λ chosen elsewhere this has no bias (a λ fitted to a half keeps a little,
    downward). It may be negative where the true value is near 0. NaN for a single row.
    """
    if rows < 2:
        return float("nan")
    cross = gram[0, :, 1, :]  # [M, M]
    mean = sum(lam @ cross @ lam for lam in lambdas) / 2.0
    return float(mean * rows**2 / ((rows + 1) // 2 * (rows // 2)))  # undoes the halves' shares, counted in rows


def roughness(curve: Sequence[float]) -> float:
    """√(mean squared second difference / 6) of a curve, in its own units: the noise around a smooth trend.

    A straight line has 0, and white noise of deviation σ around one has σ. NaN for fewer than 3 points.
    """
    x = torch.as_tensor(curve, dtype=torch.float64)
    return float((x[2:] - 2 * x[1:-1] + x[:-2]).square().mean().div(6.0).sqrt())


def mean_cosine(G: Tensor) -> float:
    """Mean cosine over the pairs of objectives, from their Gram matrix [M, M]: below 0 they conflict.

    A zero gradient has cosine 0 with everything. NaN for M = 1, where there is no pair.
    """
    norms = G.diagonal().clamp_min(0.0).sqrt()
    cosines = G / (norms[:, None] * norms).clamp_min(torch.finfo(G.dtype).tiny)
    i, j = torch.triu_indices(len(G), len(G), offset=1)
    return float(cosines[i, j].mean())


def first_order_gain(J: Tensor, step: Tensor) -> float:
    """min_j −⟨g_j, Δθ⟩, what the step really taken promises the worst-served objective; below 0 it loses.

    J [M, d] holds gradients of losses; step [d] is Δθ. With plain gradient descent along MGDA's λᵀJ it is never
    negative. With Adam it may be: the price of preconditioning.
    """
    return float((-(J @ step)).min())


def clip_fraction(ratio: Tensor, mask: Tensor, clip_range: float) -> float:
    """Share of the real tokens whose ratio left [1 − ε, 1 + ε]. ratio, mask [B, L]."""
    return float((((ratio - 1.0).abs() > clip_range) * mask).sum() / mask.sum())


def approx_kl(log_ratio: Tensor, mask: Tensor) -> float:
    """KL(π_old ‖ π_θ) per token, the k3 estimate ρ − 1 − log ρ ≥ 0 (Schulman 2020). log_ratio, mask [B, L]."""
    return float(((log_ratio.exp() - 1.0 - log_ratio) * mask).sum() / mask.sum())


def sequence_kl(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each response, the k1 estimate Σ_t (log π − log π_ref)_t, in nats. [B, L] each -> [B]."""
    return ((logp - logp_ref) * mask).sum(1)


def logp_gap(sampled: Tensor, trained: Tensor, mask: Tensor) -> float:
    """Largest |log π_sampler − log π_forward| over the real tokens. [B, L] each."""
    return float(((sampled - trained).abs() * mask).max())
