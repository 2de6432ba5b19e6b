"""What `--diagnostics` adds to a round's metrics, from half-batch gradients at θ_t that no client sends. [ours]

    drift          how much of the federation's direction is disagreement in λ alone
    stationarity   ‖Jᵀλ‖² of the whole federation, estimated on independent halves
    grams/         the inner products behind both, and those of every step, so that λ can be solved again

Both weigh clients by the prompts they hold. Of morlhf, which has one loss only, stationarity is
that of Σ_j p_j R_j and no Pareto stationarity. The price: where a batch is one micro-batch, twice the backward passes
in the first epoch, and all clients' gradients at θ_t held until the round ends. What is trained stays bit for bit the
same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import mgda
from app.stopwatch import phase
from clients import Round


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


def half_batch_stationarity(gram: Tensor, lambdas: Tensor, first: int, second: int) -> float:
    """‖Jᵀλ‖² estimated on independent halves, λ_aᵀ J_a J_bᵀ λ_a, mean over the two choices of the half a.

    gram [2, M, 2, M] from `federated_gram`; lambdas [2, M], each chosen on one half alone; first and second, the rows
    of the halves, whose gradients add up to J. On one batch ‖Jᵀλ‖² is biased upward by the squared noise of J; two
    halves have independent noise, so for a λ chosen elsewhere this has no bias (a λ fitted to a half keeps a little,
    downward). It may be negative where the true value is near 0. NaN where there is no second half.
    """
    if not second:
        return float("nan")
    cross = gram[0, :, 1, :]  # [M, M]
    mean = sum(lam @ cross @ lam for lam in lambdas) / 2.0
    return float(mean * (first + second) ** 2 / (first * second))  # undoes the halves' shares, counted in rows


def roughness(curve: Sequence[float]) -> float:
    """√(mean squared second difference / 6) of a curve, in its own units: the noise around a smooth trend.

    A straight line has 0, and white noise of deviation σ around one has σ. NaN for fewer than 3 points.
    """
    x = torch.as_tensor(curve, dtype=torch.float64)
    return float((x[2:] - 2 * x[1:-1] + x[:-2]).square().mean().div(6.0).sqrt())


@phase("diagnostics")
def observe(record: Round) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A round's drift and stationarity, and the inner products that they came from:

    steps [C, trainings, K, k, k]   the Gram matrix JJᵀ of every optimizer step, as it is
    start [C, 2, l, C, 2, l]        of the half-batch gradients at θ_t of all clients and their l = trainings · k losses
    weights [C]                     the client's share of the average
    Clients must hold equal lists of objectives; `Federation` refuses others with diagnostics.
    """
    weights = record.shares
    halves = [torch.cat([update.halves for update in of_client], 1) for of_client in record.updates]  # [2, l, d] each
    shape = (len(halves), *halves[0].shape[:2])  # C, 2, l
    start = mgda.gram([own.flatten(0, 1) for own in halves]).view(*shape, *shape)
    lam = torch.stack([torch.stack([update.steps[0].lam for update in of_client]) for of_client in record.updates])
    first = (record.mixing[:, None] * lam).flatten(1)  # weights of the losses in the first step [C, l]
    federated = federated_gram(start, weights)  # [2, l, 2, l]
    own = torch.stack([mgda.solve(mgda.normalise(federated[half, :, half]), 0.0) for half in (0, 1)])  # [2, l]
    rollout = record.updates[0][0].batch.rollout
    figures = {
        "drift": drift(start.sum((1, 4)), first, weights),
        "stationarity": half_batch_stationarity(federated, own, rollout.half, len(rollout) - rollout.half),
    }
    grams = [torch.stack([step.gram for step in update.steps]) for of_client in record.updates for update in of_client]
    steps = torch.stack(grams).unflatten(0, lam.shape[:2])
    return figures, {"steps": steps, "start": start, "weights": weights}
