"""What a round leaves in metrics.jsonl: one flat line of figures, made from its record (`clients.Round`). [ours]

A figure of one objective is `KIND/NAME`; no other figure begins with one of these kinds and a slash, but for
`lambda/disagreement` (so that no objective may have that name); a figure of a loss on several objectives joins their
names by +, which no name has. A figure of one client is `KIND/clientN`, of one of its objectives `KIND/NAME/clientN`.
With --eval_every some lines have `held_out/NAME`, `held_out_error/NAME` and `held_out_kl`, of the adapter after the
round. Nothing that trains reads what is here, and but for `kl`, the adapters' figures and the bytes a server could not
make it from the uploads.

`zero_spread/NAME` is the share of the groups whose responses all have the same reward, and so no advantage.

Means over clients are plain, except where the server's own average is meant: the averaging residual weighs clients as
it does. All of it is of the clients whose uploads arrived; `rejected` says why others were left out. `kl_weight` is
κ Σ_j λ_j / max(σ_j, 0.1): what the KL weighs in a step after whitening. A method is measured by its own losses:
`first_order_gain` of morlhf and fsmgda is that of a local training's own loss.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import ppo
from app.stopwatch import phase
from clients import Client, Round, Update
from lora import Adapter


def disagreement(lambdas: Tensor) -> float:
    """mean_c ‖λ_c − λ̄‖, the client disagreement [paper]; of the clients' adapters, their dispersion. lambdas [C, M].

    0 for one client. NaN stands for an objective that a client does not hold: it counts neither in λ̄ nor in the
    distance.
    """
    return float((lambdas - lambdas.nanmean(0)).nan_to_num().norm(dim=1).mean())


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


def pair_cosines(G: Tensor) -> Tensor:
    """The cosine of every pair of objectives [M (M − 1) / 2], from their Gram matrix [M, M]: below 0 they conflict.

    A zero gradient has cosine 0 with everything.
    """
    norms = G.diagonal().clamp_min(0.0).sqrt()
    cosines = G / (norms[:, None] * norms).clamp_min(torch.finfo(G.dtype).tiny)
    i, j = torch.triu_indices(len(G), len(G), offset=1)
    return cosines[i, j]


def objective_weights(client: Client, updates: Sequence[Update], mixing: Tensor, M: int) -> Tensor:
    """What every objective weighed in a client's K steps, Σ_i m_i columns_i λ_i: [K, M], NaN where it holds none."""
    weights = sum(
        share * torch.stack([step.lam for step in update.steps]) @ training.columns.double().T
        for share, training, update in zip(mixing, client.trainings, updates, strict=True)
    )  # [K, m]
    whole = weights.new_full((len(weights), M), torch.nan)
    whole[:, client.objectives] = weights
    return whole


def by_loss(record: Round, names: Sequence[str]) -> dict[str, float]:
    """Figures of every loss: one of an objective by its name, one of several as their names joined by +.

    The scale is a mean over the clients that have the loss; the explained variance is pooled over all their tokens: 1 −
    Var(R − V) / Var(R), R the Monte Carlo return and V what the critic said before it was fitted to it.
    """
    scales, values, returns, silent = (defaultdict(list) for _ in range(4))
    for client, updates in zip(record.cohort, record.updates, strict=True):
        for training, update in zip(client.trainings, updates, strict=True):
            made, real = update.advantages, update.batch.rollout.mask.bool()
            S, scores = update.batch.rollout.group_size, update.batch.scores
            for j, column in enumerate(training.columns.T):
                label = "+".join(names[client.objectives[i]] for i in column.nonzero().flatten())
                scales[label].append(float(made.scale[j]))
                if S > 1:
                    groups = scores[:, j].unflatten(0, (-1, S))  # [B / S, S]
                    silent[label].append(float((groups == groups[:, :1]).all(1).double().mean()))
                if made.values is not None:
                    values[label].append(made.values[real][:, j])
                    returns[label].append(made.returns[real][:, j])
    figures = {f"advantage_scale/{label}": float(np.mean(scale)) for label, scale in scales.items()}
    figures |= {f"zero_spread/{label}": float(np.mean(share)) for label, share in silent.items()}
    pooled = {label: (torch.cat(values[label]), torch.cat(returns[label])) for label in values}
    return figures | {f"explained_variance/{label}": ppo.explained_variance(*pair) for label, pair in pooled.items()}


@phase("metrics")
def line(record: Round, names: Sequence[str], adapter: Adapter) -> dict[str, float]:
    """A round's line of metrics.jsonl."""
    raw, rollouts = torch.cat(record.raw), [updates[0].batch.rollout for updates in record.updates]
    updates = [update for of_client in record.updates for update in of_client]
    steps = [step for update in updates for step in update.steps]
    metrics = {"round": record.number}
    metrics |= {f"reward/{name}": value for name, value in zip(names, raw.nanmean(0).tolist(), strict=True)}
    spread = (raw - raw.nanmean(0)).square().nanmean(0).sqrt()
    metrics |= {f"reward_sd/{name}": value for name, value in zip(names, spread.tolist(), strict=True)}
    metrics |= {"kl": float(np.mean([upload.kl for upload in record.uploads])), "kl_coef": record.kl_coef}
    scales = [update.advantages.scale.cpu().clamp_min(ppo.SCALE_FLOOR) for update in updates for _ in update.steps]
    weighed = [float((step.lam / scale).sum()) for step, scale in zip(steps, scales, strict=True)]
    metrics["kl_weight"] = record.kl_coef * float(np.mean(weighed))
    for figure in ("entropy", "clip_fraction", "approx_kl", "first_order_gain"):
        metrics[figure] = float(np.mean([getattr(step, figure) for step in steps]))
    cosines = [pair_cosines(step.gram) for step in steps if len(step.gram) > 1]  # where there is a pair
    metrics["cosine"] = float(np.mean([float(pairs.mean()) for pairs in cosines])) if cosines else math.nan
    metrics["lowest_cosine"] = float(np.mean([float(pairs.min()) for pairs in cosines])) if cosines else math.nan
    metrics["logp_gap"] = float(np.mean([update.batch.logp_gap() for update in updates]))
    metrics |= by_loss(record, names)
    metrics["ended"] = float(torch.cat([rollout.ended for rollout in rollouts]).double().mean())
    metrics["response_tokens"] = float(torch.cat([rollout.mask.sum(1) for rollout in rollouts]).double().mean())
    metrics |= agreement(record, names, adapter) | record.ledger.metrics() | by_client(record, names)
    metrics |= {"rejected_clients": len(record.faults), "dropped_clients": record.dropped}
    if record.faults:
        metrics["rejected"] = {f"client{c}": fault for c, fault in record.faults.items()}
    return metrics | {"seconds": record.seconds}


def by_client(record: Round, names: Sequence[str]) -> dict[str, float]:
    """Of every client: its mean reward and mean λ of each objective that it holds, its KL, its share of the average."""
    metrics = {}
    parts = zip(record.cohort, record.raw, record.updates, record.uploads, record.shares.tolist(), strict=True)
    for client, raw, updates, upload, share in parts:
        lam = objective_weights(client, updates, record.mixing, len(names)).mean(0)  # [M]
        own = {"kl": upload.kl, "share": share}
        for j in client.objectives:
            own |= {f"reward/{names[j]}": float(raw[:, j].mean()), f"lambda/{names[j]}": float(lam[j])}
        metrics |= {f"{figure}/client{client.index}": value for figure, value in own.items()}
    return metrics


def agreement(record: Round, names: Sequence[str], adapter: Adapter) -> dict[str, float]:
    """How far the clients agree, on λ and on the adapter."""
    trained = zip(record.cohort, record.updates, strict=True)
    lambdas = torch.stack([objective_weights(*each, record.mixing, len(names)) for each in trained])  # [C, K, M]
    metrics = {f"lambda/{name}": value for name, value in zip(names, lambdas.nanmean((0, 1)).tolist(), strict=True)}
    metrics["lambda/disagreement"] = float(np.mean([disagreement(step) for step in lambdas.unbind(1)]))
    thetas = torch.stack([record.mixing.to(upload.thetas) @ upload.thetas for upload in record.uploads])  # [C, d]
    residual, norm = averaging_residual([adapter.split(theta) for theta in thetas], record.shares, adapter.config.scale)
    metrics |= {"adapter/dispersion": disagreement(thetas), "adapter/averaging_residual": residual}
    return metrics | {"adapter/norm": norm}
