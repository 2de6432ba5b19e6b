"""What a round leaves in the log: from one step, to one local update, to the federation's metrics. [ours]

`diagnostics.py` has the measures, each a pure function; here they are applied to what a round has at hand, so that
`firm.py` stays the algorithm. Nothing here changes training, and nothing here is sent: a server that wanted these
figures would have to ask for more than an upload.

Means over clients are plain, except where the server's own average is meant: drift, averaging residual and stationarity
weigh clients by the prompts they hold; these and dispersion leave rejected clients out. A method is measured by its own
losses: morlhf has only one, so its `stationarity` is that of Σ_j p_j R_j and no Pareto stationarity, and its
`first_order_gain`, like fsmgda's, is that of a local run's own loss. `kl_weight` is κ Σ_j λ_j / max(σ_j, 0.1): what the
KL weighs in a step after whitening. The price: where a batch is one micro-batch, twice the backward passes in the first
epoch; and the gradients at θ_t of all clients held until the round ends.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mgda
import ppo
from app.stopwatch import phase
from evidence import diagnostics
from lora import Adapter
from ppo import Advantages
from rollout import Rollout


@phase("monitor")
def step(J: Tensor, G: Tensor, lam: Tensor, moved: Tensor, advantages: Advantages, kl_coef: float) -> dict[str, Any]:
    """What to remember of one optimizer step. J [k, d], G [k, k], lam [k], moved [d] is Δθ as taken."""
    scale = advantages.scale.cpu().clamp_min(ppo.SCALE_FLOOR)
    return {
        "lambda": lam,
        "gram": G,
        "cosine": diagnostics.mean_cosine(G),
        "first_order_gain": diagnostics.first_order_gain(J, moved),
        "kl_weight": kl_coef * float((lam / scale).sum()),
    }


@phase("monitor")
def update(
    steps: list[dict[str, Any]], at_theta_t: Tensor, batch: Rollout, logp_old: Tensor, logp_ref: Tensor,
    advantages: Advantages,
) -> dict[str, Any]:  # fmt: skip
    """What to remember of one local update: `lambda` [K, M], `gram` [K, M, M], `halves` [2, M, d] at θ_t, `kl` [B],
    per-objective [M], and means over the steps.
    """
    stacked = {key: torch.stack([step[key] for step in steps]) for key in ("lambda", "gram")}
    log = {key: float(np.mean([step[key] for step in steps])) for key in steps[0].keys() - stacked.keys()}
    return log | stacked | {
        "halves": at_theta_t,
        "kl": diagnostics.sequence_kl(logp_old, logp_ref, batch.mask),
        "logp_gap": diagnostics.logp_gap(batch.sampled_logp, logp_old, batch.mask),
        "advantage_scale": advantages.scale,
        "explained_variance": ppo.explained_variance(advantages.values, advantages.returns, batch.mask),
    }  # fmt: skip


@phase("monitor")
def rewards_and_kl(
    names: Sequence[str], raw: Tensor, rollout: Rollout, logs: list[list[dict[str, Any]]], kl_coef: float
) -> dict[str, float]:
    """What the clients saw in a round: rewards (raw [N, M]), KL, and means over the local updates logs[client][run]."""
    every = [log for mine in logs for log in mine]
    metrics = {f"reward/{name}": float(raw[:, j].mean()) for j, name in enumerate(names)}
    metrics |= {f"reward_sd/{name}": float(raw[:, j].double().std(correction=0)) for j, name in enumerate(names)}
    metrics |= {"kl": float(torch.cat([mine[0]["kl"] for mine in logs]).mean()), "kl_coef": kl_coef}
    for key in ("kl_weight", "entropy", "clip_fraction", "approx_kl", "first_order_gain", "cosine", "logp_gap"):
        metrics[key] = float(np.mean([log[key] for log in every]))
    for key in ("advantage_scale", "explained_variance"):
        means = torch.stack([torch.cat([log[key] for log in mine]) for mine in logs]).mean(0).tolist()  # of every loss
        labels = names if len(means) == len(names) else [f"loss{i}" for i in range(len(means))]  # morlhf: one, the sum
        metrics |= {f"{key}/{name}": value for name, value in zip(labels, means, strict=True)}
    metrics["ended"] = float(rollout.ended.double().mean())
    metrics["response_tokens"] = float(rollout.mask.sum(1).double().mean())
    return metrics


@phase("monitor")
def agreement(
    names: Sequence[str], run_rewards: list[Tensor], mixing: Tensor, logs: list[list[dict[str, Any]]], uploads: Tensor,
    weights: Tensor, adapter: Adapter, last_lambda: Tensor | None,
) -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:  # fmt: skip
    """How far the clients agree in a round: on λ, on the adapter, and on where to go from θ_t.

    run_rewards: R [M, k] of every local run; mixing [runs]: how much each run counted; uploads [C, runs, d]; weights
    [C]: prompts held, 0 for a rejected client; last_lambda: λ̄ of the round before. Returns the metrics, λ̄ [M], and the
    inner products they came from:
        steps [C, runs, K, k, k]     the Gram matrix JJᵀ of every optimizer step, as it is
        start [C, 2, l, C, 2, l]     of the half-batch gradients at θ_t of all clients and their l = runs · k losses
        weights [C]
    """
    per_run = torch.stack([torch.stack([log["lambda"] for log in mine]) for mine in logs])  # [C, runs, K, k]
    R = torch.stack(run_rewards).double()  # [runs, M, k]
    lambdas = torch.einsum("r,rmi,crki->ckm", mixing, R, per_run)  # what every objective weighed  [C, K, M]
    mean = lambdas.mean((0, 1))  # [M]
    metrics = {f"lambda/{name}": value for name, value in zip(names, mean.tolist(), strict=True)}
    metrics["lambda/disagreement"] = float(np.mean([diagnostics.disagreement(step) for step in lambdas.unbind(1)]))
    metrics["lambda/movement"] = float("nan") if last_lambda is None else float((mean - last_lambda).norm())

    accepted = weights > 0
    theta_c = torch.einsum("r,crd->cd", mixing.to(uploads), uploads)[accepted]  # each client's adapter
    residual, norm = diagnostics.averaging_residual(
        [adapter.split(theta) for theta in theta_c], weights[accepted], adapter.config.scale
    )
    metrics["adapter/dispersion"] = diagnostics.dispersion(theta_c)
    metrics |= {"adapter/averaging_residual": residual, "adapter/norm": norm}

    halves = [mine[0]["halves"] if len(mine) == 1 else torch.cat([log["halves"] for log in mine], 1) for mine in logs]
    shape = (len(halves), *halves[0].shape[:2])  # C, 2, l; each client's own are [2, l, d]
    start = mgda.gram([own.flatten(0, 1) for own in halves]).view(*shape, *shape)
    first = (mixing[:, None] * per_run[:, :, 0]).flatten(1)  # weights of the losses in the first step  [C, l]
    metrics["lambda/drift"] = diagnostics.drift(start.sum((1, 4)), first, weights)
    federated = diagnostics.federated_gram(start, weights)  # [2, l, 2, l]
    own = torch.stack([mgda.solve(mgda.normalise(federated[half, :, half]), 0.0) for half in (0, 1)])  # [2, l]
    metrics["stationarity"] = diagnostics.half_batch_stationarity(federated, own, rows=len(logs[0][0]["kl"]))
    steps = torch.stack([torch.stack([log["gram"] for log in mine]) for mine in logs])
    return metrics, mean, {"steps": steps, "start": start, "weights": weights}
