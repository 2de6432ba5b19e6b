"""What `--diagnostics` adds to a round's metrics, from gradients at θ_t that no client sends. [ours]

    drift          how much of the federation's direction is disagreement in λ alone
    stationarity   ‖Jᵀλ‖² of the whole federation, estimated on independent halves
    grams/         the inner products behind both, and those of every step, from which λ can be solved again

All clients must hold the same objectives. Of a method with one loss (morlhf) stationarity is not Pareto stationarity.
The price: a forward and k backward passes over every batch, and memory for the halves' gradients of all clients.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import mgda
import ppo
from clients import Round, Update
from rollout import Policy, Rollout
from settings import UpdateSettings


def drift(gram: Tensor, lambdas: Tensor, weights: Tensor) -> float:
    """‖Σ w_c J_cᵀ(λ_c − λ̄)‖ / ‖Σ w_c J_cᵀλ_c‖, with λ̄ = Σ w_c λ_c; NaN if the step is zero.

    With unequal λ_c the federation comes to rest where Σ w_c J_cᵀλ_c = 0, which is not Pareto-stationary; this part
    keeps it away. gram [C, M, C, M] of all clients' gradients at one θ, lambdas [C, M], weights [C] of any sum.
    """
    w = (weights / weights.sum())[:, None]
    parts = w * (lambdas - (w * lambdas).sum(0)), w * lambdas
    lost, step = (float(torch.einsum("cm,cmdn,dn->", v, gram, v).clamp_min(0.0).sqrt()) for v in parts)
    return lost / step if step > 0 else float("nan")


def stationarity(gram: Tensor, lambdas: Tensor, sizes: Sequence[int]) -> float:
    """‖Jᵀλ‖² estimated on independent halves, λ_aᵀ J_a J_bᵀ λ_a, mean over the two choices of the half a.

    gram [2, M, 2, M] of the halves' gradients, which add up to J; lambdas [2, M], each chosen on one half; sizes: rows
    of each half. On one batch ‖Jᵀλ‖² is biased upward by the squared noise of J. Two halves have independent noise, so
    a λ chosen elsewhere makes no bias, and the estimate may be negative. NaN if a half is empty.
    """
    mean = sum(lam @ gram[0, :, 1] @ lam for lam in lambdas) / 2.0
    return float(mean * sum(sizes) ** 2 / (sizes[0] * sizes[1])) if min(sizes) else float("nan")


def halves(rollout: Rollout) -> tuple[slice, slice]:
    """The rows of the two halves of a batch. No group is cut, since an advantage contains its siblings' scores."""
    cut = len(rollout) // rollout.group_size // 2 * rollout.group_size
    return slice(0, cut), slice(cut, len(rollout))


def half_gradients(policy: Policy, update: Update, config: UpdateSettings) -> Tensor:
    """The gradients of both halves of a batch where the adapter stands, [2, k, d], 0 if empty; their sum is J."""
    batch, advantages = update.batch, update.advantages.normalised
    J = policy.adapter.vector().new_zeros(2, advantages.shape[2], policy.adapter.size)
    for i, rows in enumerate(halves(batch.rollout)):
        if rows.start < rows.stop:
            rollout = batch.rollout.rows(rows)  # cut to its own width l
            l, share = rollout.mask.shape[1], rollout.mask.sum() / batch.rollout.mask.sum()
            half = replace(batch, rollout=rollout, logp_old=batch.logp_old[rows, :l])
            J[i] = share * ppo.policy_gradients(policy, half, advantages[rows, :l], config).J
    return J


def observe(policy: Policy, record: Round, config: UpdateSettings) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A round's drift and stationarity, and the inner products that they came from; the adapter stays where it is.

    steps [C, trainings, K, k, k]   the Gram matrix JJᵀ of every optimizer step, as it is
    start [C, 2, l, C, 2, l]        of the half-batch gradients at θ_t of all clients and their l = trainings · k losses
    weights [C]                     the clients' shares of the average
    """
    clients, w, theta = [part.updates for part in record.arrived.values()], record.shares, policy.adapter.vector()
    policy.adapter.assign(record.message["theta"])
    J = torch.stack([torch.cat([half_gradients(policy, update, config) for update in of], 1) for of in clients])
    policy.adapter.assign(theta)
    start = mgda.gram(J.flatten(0, 2)).view(2 * J.shape[:3])  # of J [C, 2, l, d]
    lam = torch.stack([torch.stack([update.steps[0].lam for update in of]) for of in clients])  # [C, trainings, k]
    first = (record.training_shares[:, None] * lam).flatten(1)  # weights of the losses in the first step [C, l]
    whole = torch.einsum("c,chmdin,d->hmin", w, start, w)  # [2, l, 2, l], of the halves of Σ_c w_c J_c
    chosen = torch.stack([mgda.solve(mgda.normalise(whole[half, :, half]), 0.0) for half in (0, 1)])  # [2, l]
    sizes = [rows.stop - rows.start for rows in halves(clients[0][0].batch.rollout)]
    figures = {"drift": drift(start.sum((1, 4)), first, w), "stationarity": stationarity(whole, chosen, sizes)}
    steps = torch.stack([torch.stack([torch.stack([s.gram for s in u.steps]) for u in of]) for of in clients])
    return figures, {"steps": steps, "start": start, "weights": w}
