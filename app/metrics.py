"""What is measured: the policy on held-out prompts, and a round's line in metrics.jsonl. [ours]

A line is flat. `KIND/NAME` is a figure of one objective, `KIND/clientN` of one client, `KIND/NAME/clientN` of both. A
loss on several objectives goes by their names joined with +. With --eval_every some lines have `held_out/NAME`,
`held_out_error/NAME` and `held_out_kl`, of the adapter after the round.

A round's figures are only logged. Of them a real server knows κ, the KLs, shares, bytes, and figures of the adapters.

Means over clients are plain. All figures are of the clients whose uploads arrived; `rejected` says why others were left
out. `zero_spread/NAME` is the share of groups whose responses all have the same reward, and so no advantage.
`first_order_gain` is what a step promises to the loss that gains least (`clients.Step`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clients import Client, Purpose, Round, stream
from data import Prompt
from fedavg import n_bytes
from firm import Federation
from rewards import Calibration

EVAL_BATCH = 256  # rows


@dataclass
class Evaluation:
    """What a policy answered to n held-out prompts, S times each."""

    scores: Tensor  # [n, S, M] raw, float64
    kl: Tensor  # [n, S] nats per response
    texts: list[str]  # each prompt's first answer
    gap: float = 0.0  # the largest difference of a token's log-prob at sampling and in training, in nats


def evaluate(federation: Federation, prompts: dict[int, Prompt], bar: Callable = iter) -> Evaluation:
    """Answer prompts, by number, `eval_samples` times each with the adapter as it stands.

    The draws depend on a prompt's number only, so two adapters answer from the same random numbers. bar: wraps the loop
    to show progress.
    """
    config, policy, exchange, parts = federation.config, federation.policy, federation.exchange, {}
    S, L = config.eval_samples, config.max_new_tokens
    asked, size = [prompt for prompt in prompts.values() for _ in range(S)], max(EVAL_BATCH // S, 1) * S
    u = np.concatenate([stream(config.seed, Purpose.EVALUATION, i).random((S, L)) for i in prompts])  # [n·S, L]
    for start in bar(exchange.mine(range(0, len(asked), size))):
        rows = asked[start : start + size]
        rollout = policy.sample([prompt.token_ids for prompt in rows], u[start : start + size])
        rollout = replace(rollout, group_size=S)
        micro = config.micro_batch_size or config.batch_size  # what training has room for
        logp, hidden = policy.logprobs_in_pieces(rollout, micro)
        with policy.adapter.disabled():
            _, hidden_ref = policy.logprobs_in_pieces(rollout, micro)
        kl = policy.expected_kl(hidden, hidden_ref, rollout.mask)
        gap = float(((rollout.sampled_logp - logp).abs() * rollout.mask).max())
        parts[start] = federation.score(rows, rollout), kl, gap, policy.texts(rollout)[0]
    scores, kl, gaps, texts = zip(*exchange.merged(parts).values(), strict=True)
    n = len(prompts)
    scores, kl, texts = torch.cat(scores).view(n, S, -1), torch.cat(kl).cpu().view(n, S), sum(texts, [])
    return Evaluation(scores, kl, texts[::S], max(gaps))


def clustered(values: Tensor) -> dict[str, float]:
    """Mean and its standard error clustered by prompt. values [n, S], S responses to each of n prompts.

    The S responses to one prompt are averaged first, since they are not independent evidence about other prompts.
    """
    by_prompt = values.double().mean(1)
    n = len(by_prompt)
    error = float(by_prompt.std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": float(by_prompt.mean()), "standard_error": error}


def best_round(held_out: dict[int, Tensor], before: Tensor, calibration: Calibration) -> tuple[int, Tensor] | None:
    """The best of the evaluated rounds, by their scores [n, S, M], and its gains [n / 2, S, M] over the base model's.

    A round is as good as its least gain, in base-policy standard deviations, on one half of the held-out prompts; the
    gains returned are those on the other half. None if there is nothing to choose from.
    """
    varying = ~calibration.constant
    if len(held_out) < 2 or len(before) < 4 or not varying.any():
        return None
    chosen, rest = torch.randperm(len(before), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    gains = {t: scores - before for t, scores in held_out.items()}  # [n, S, M]
    worst = {t: (gain[chosen].mean((0, 1)) / calibration.scale)[varying].min() for t, gain in gains.items()}
    best = max(worst, key=worst.get)
    return best, gains[best][rest]


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Area that `points` [n, 2] dominate above `reference` [2], both objectives maximised (Zitzler and Thiele 1999).

    A point that is not above the reference in both objectives contributes nothing.
    """
    area = height = 0.0
    for x, y in sorted((np.reshape(points, (-1, 2)) - reference).tolist(), reverse=True):  # from right to left
        if x > 0.0 and y > height:
            area += x * (y - height)  # the strip that no point further right has covered
            height = y
    return area


def normalised_hypervolume(points: np.ndarray, base: np.ndarray, front: np.ndarray) -> float:
    """(HV − HV_base) / (HV_front − HV_base): 0 is the base model alone, 1 the whole exact front.

    points [n, 2], base [2], front [K, 2] a polyline from left to right, counted with all points between its vertices.
    The reference point is the componentwise minimum of the base model and the front's nadir `front.min(0)`.
    """
    reference = np.minimum(base, np.min(front, axis=0))
    x, y = (np.asarray(front) - reference).T
    whole = x[0] * y[0] + float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())  # left of the front, and under it
    start = float(np.prod(base - reference))
    return (hypervolume(points, reference) - start) / (whole - start)


def disagreement(lambdas: Tensor) -> float:
    """mean_c ‖λ_c − λ̄‖, the client disagreement [paper]; of the clients' adapters, their dispersion. lambdas [C, M].

    NaN stands for an objective that a client does not hold: it counts neither in λ̄ nor in the distance.
    """
    return float((lambdas - lambdas.nanmean(0)).nan_to_num().norm(dim=1).mean())


def pair_cosines(G: Tensor) -> Tensor:
    """The cosine of every pair of objectives [M (M − 1) / 2], from their Gram matrix [M, M]; of a zero gradient, 0."""
    norms = G.diagonal().clamp_min(0.0).sqrt()
    cosines = G / (norms[:, None] * norms).clamp_min(torch.finfo(G.dtype).tiny)
    i, j = torch.triu_indices(len(G), len(G), offset=1)
    return cosines[i, j]


def objective_weights(client: Client, record: Round, c: int, M: int) -> Tensor:
    """What every objective weighed in client c's K steps, Σ_i training_shares_i mix_i λ_i: [K, M], NaN if not held.

    `minimum` and `maximum` mix by no matrix; of them it is p.
    """
    weights = sum(
        share * torch.stack([step.lam for step in update.steps]) @ update.mix.double().T
        for share, update in zip(record.training_shares, record.arrived[c].updates, strict=True)
    )  # [K, m]
    whole = weights.new_full((len(weights), M), torch.nan)
    whole[:, client.objectives] = weights
    return whole


def by_loss(record: Round, clients: Sequence[Client], names: Sequence[str]) -> dict[str, float]:
    """Figures of every loss, as means over the clients that have it.

    The explained variance is 1 − Var(R − V) / Var(R), R the Monte Carlo return and V what the critic said before it was
    fitted to it, with the variances over all tokens of a client, averaged over clients.
    """
    figures, variances = defaultdict(list), defaultdict(list)
    for c, part in record.arrived.items():
        for update in part.updates:
            advantages = update.advantages
            scores, S, real = update.batch.scores, update.batch.rollout.group_size, update.batch.rollout.mask.bool()
            for j, column in enumerate(update.mix.T):
                label = "+".join(names[clients[c].objectives[i]] for i in column.nonzero().flatten())
                figures[f"advantage_scale/{label}"].append(float(advantages.scale[j]))
                if S > 1:
                    groups = scores[:, j].unflatten(0, (-1, S))  # [B / S, S]
                    silent = (groups == groups[:, :1]).all(1).double().mean()
                    figures[f"zero_spread/{label}"].append(float(silent))
                if advantages.values is not None:
                    returns, values = (x[real][:, j].double() for x in (advantages.returns, advantages.values))
                    variances[label].append([x.var(correction=0) for x in (returns - values, returns)])
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    for label, pairs in variances.items():
        unexplained, total = torch.tensor(pairs, dtype=torch.float64).mean(0)
        means[f"explained_variance/{label}"] = float(1.0 - unexplained / total)  # NaN if the return does not vary
    return means


def line(record: Round, clients: Sequence[Client], names: Sequence[str]) -> dict[str, float]:
    """A round's line of metrics.jsonl: of clients elsewhere, only what they sent is known."""
    parts = list(record.arrived.values())
    metrics = {"round": record.number, "kl": float(np.mean([part.upload.numbers["kl"] for part in parts]))}
    metrics["kl_coef"] = record.kl_coef
    if all(part.updates for part in parts):
        metrics |= inside(record, clients, names)
    for (c, part), share in zip(record.arrived.items(), record.shares.tolist(), strict=True):
        metrics |= {f"kl/client{c}": part.upload.numbers["kl"], f"share/client{c}": share}
    thetas = [record.training_shares.to(x) @ x for x in (part.upload.tensors["theta"] for part in parts)]  # [d] each
    metrics |= {"adapter/dispersion": disagreement(torch.stack(thetas))} | bill(record)
    metrics |= {"rejected_clients": len(record.faults), "dropped_clients": record.dropped}
    if record.faults:
        metrics["rejected"] = {f"client{c}": fault for c, fault in record.faults.items()}
    return metrics


def inside(record: Round, clients: Sequence[Client], names: Sequence[str]) -> dict[str, float]:
    """What a simulation sees of its clients' rewards and steps, and a server does not."""
    parts = list(record.arrived.values())
    updates, batches = [u for part in parts for u in part.updates], [part.updates[0].batch for part in parts]
    steps, rollouts = [step for update in updates for step in update.steps], [batch.rollout for batch in batches]
    raw = torch.cat([part.raw for part in parts])
    spread = (raw - raw.nanmean(0)).square().nanmean(0).sqrt()
    metrics = {f"reward/{name}": value for name, value in zip(names, raw.nanmean(0).tolist(), strict=True)}
    metrics |= {f"reward_sd/{name}": value for name, value in zip(names, spread.tolist(), strict=True)}
    for figure in ("entropy", "clip_fraction", "approx_kl", "first_order_gain"):
        metrics[figure] = float(np.mean([getattr(step, figure) for step in steps]))
    pairs = [[pair_cosines(s.gram) for u in part.updates for s in u.steps if len(s.gram) > 1] for part in parts]
    cosines = [float(torch.cat(of).mean()) for of in pairs if of] or [math.nan]  # by client
    metrics["cosine"] = float(np.mean(cosines))
    metrics["cosine_error"] = float(np.std(cosines, ddof=1)) / len(cosines) ** 0.5 if len(cosines) > 1 else math.nan
    gaps = [((b.rollout.sampled_logp - b.logp_old).abs() * b.rollout.mask).max() for b in batches]
    metrics["logp_gap"] = float(torch.stack(gaps).mean())
    metrics |= by_loss(record, clients, names)
    metrics["ended"] = float(torch.cat([rollout.ended for rollout in rollouts]).double().mean())
    metrics["response_tokens"] = float(torch.cat([rollout.mask.sum(1) for rollout in rollouts]).double().mean())
    lambdas = torch.stack([objective_weights(clients[c], record, c, len(names)) for c in record.arrived])  # [C, K, M]
    metrics |= {f"lambda/{name}": value for name, value in zip(names, lambdas.nanmean((0, 1)).tolist(), strict=True)}
    metrics["lambda/disagreement"] = float(np.mean([disagreement(step) for step in lambdas.unbind(1)]))
    for (c, part), lam in zip(record.arrived.items(), lambdas.mean(1), strict=True):
        for j in clients[c].objectives:
            metrics[f"reward/{names[j]}/client{c}"] = float(part.raw[:, j].mean())
            metrics[f"lambda/{names[j]}/client{c}"] = float(lam[j])
    return metrics


def bill(record: Round) -> dict[str, float]:
    """Bytes of one client, the mean over clients: tensors as they are, named numbers at 8 bytes."""
    (up, down), uploads = record.exchanged, [part.upload for part in record.arrived.values()]
    up += float(np.mean([n_bytes(upload.tensors, len(upload.numbers)) for upload in uploads]))
    return {"upload_bytes": up, "download_bytes": down + n_bytes(record.message, 1)}  # 1: κ
