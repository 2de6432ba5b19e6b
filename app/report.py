"""What a run reports: the header, the closing table, the samples, and the figures behind them. [ours]

Figures are on held-out prompts, in raw units. Every prompt is answered S times before and after training, from the same
uniforms; gains are paired by prompt, and every standard error is clustered by prompt: the S responses to one prompt
are averaged first, since they are no independent evidence about other prompts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from app import ranks
from app.session import Evaluation, Session
from settings import Config

FROM_ADAPTER = "gains are over the base model without --adapter"


def clustered(values: Tensor) -> dict[str, float]:
    """Mean and its standard error clustered by prompt. values [n, S], S responses to each of n prompts."""
    by_prompt = values.double().mean(1)
    n = len(by_prompt)
    error = float(by_prompt.std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": float(by_prompt.mean()), "standard_error": error}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of one text table, the first column left, the others right, two spaces apart at least."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def plus_minus(figure: dict[str, float], sign: str = "+", digits: int = 3) -> str:
    """A figure and its standard error."""
    return f"{figure['mean']:{sign}.{digits}f} ± {figure['standard_error']:.{digits}f}"


def header(session: Session, out: Path) -> str:
    """What is about to run, in a few lines."""
    config, policy, counts = session.config, session.policy, session.counts
    total = sum(p.numel() for p in policy.model.parameters())
    sizes = sorted(len(share) for share in session.shares)
    parts = (config.run.advantages, config.run.weights, config.run.aggregation)  # in the place of the method's own
    dropped = [f"{counts[k]} {k.replace('_', ' ')}" for k in ("duplicates", "too_short", "too_long") if counts[k]]
    left = counts["kept"] - len(session.held_out) - sum(sizes)
    split = shorten(f"{config.data.split}: {', '.join(session.client_names)}".removesuffix(": "), 90)
    model = session.base_model
    if not config.rollout.model:
        model = f"the {config.run.world} world's own tiny model, since no --model is given ({model})"
    return "\n".join([
        " · ".join([config.run.method, *(part for part in parts if part), model]),
        f"  device      {session.device}, {config.rollout.dtype}, seed {config.firm.seed}"
        + f", {ranks.size()} processes" * (ranks.size() > 1),
        f"  adapter     {policy.adapter.size:,} trainable of {total:,} parameters "
        f"(rank {config.lora.lora_rank}, {len(policy.adapter.layers)} layers)"
        + (f", from {config.run.adapter}" if config.run.adapter else ""),
        f"  objectives  {', '.join(session.names)}   preference {config.firm.preference or 'uniform'}"
        + (f"   beta {config.firm.beta:g}" if config.run.method == "firm" else ""),
        f"  prompts     {counts['kept']:,} kept of {counts['rows']:,} rows"
        + (f" ({', '.join(dropped)})" if dropped else "") + f", {len(session.held_out)} of them held out"
        + (f", {left} of no client left out" if left else ""),
        f"  federation  {config.firm.clients} clients of {sizes[0]} to {sizes[-1]} prompts ({split}), "
        f"{config.firm.rounds} rounds of {config.firm.batch_size} responses each, "
        f"{session.federation.group_size} to a prompt",
        f"  run         {out}",
    ])  # fmt: skip


def progress_line(m: dict[str, float], names: Sequence[str]) -> str:
    """The bar's tail: rewards, KL and λ of the last round."""
    parts = [f"{name} {m[f'reward/{name}']:.3f}" for name in names] + [f"KL {m['kl']:.2f}"]
    return "  ".join(parts) + "  λ " + "/".join(f"{m[f'lambda/{name}']:.2f}" for name in names)


def summarise(
    session: Session, before: Evaluation, after: Evaluation, metrics: Sequence[dict[str, float]], seconds: float
) -> dict[str, Any]:
    """The contract for scripts, summary.json: raw units, paired by prompt, errors clustered by prompt."""
    config, calibration = session.config, session.federation.calibration
    objectives = {
        name: {
            "before": clustered(before.scores[..., j]),
            "after": clustered(after.scores[..., j]),
            "gain": clustered((after.scores - before.scores)[..., j]) | {"n_prompts": len(session.held_out)},
            "calibration": {"mean": float(calibration.mean[j]), "scale": float(calibration.scale[j])},
        }
        for j, name in enumerate(session.names)
    }
    cohort, M = config.firm.clients_per_round or config.firm.clients, len(session.names)
    return {
        "method": config.run.method,
        "seed": config.firm.seed,
        "seconds": seconds,
        "processes": ranks.size(),
        "rounds": config.firm.rounds,
        "upload_bytes_per_client_round": metrics[-1]["upload_bytes"] if metrics else 0,
        "upload_bytes_total": sum((cohort - m.get("dropped_clients", 0)) * m["upload_bytes"] for m in metrics),
        "download_bytes_per_client_round": metrics[-1]["download_bytes"] if metrics else 0,
        "calibration_bytes_per_client": {"upload": 8 * 3 * M, "download": 8 * 2 * M},  # n, mean, squares; mean, scale
        "base_model": session.base_model,
        "client_names": session.client_names,
        "eval_samples": config.run.eval_samples,
        "kl": clustered(after.kl),
        "objectives": objectives,
    }


def held_out_figures(session: Session, found: Evaluation) -> dict[str, float]:
    """What an evaluation during the training adds to its round's line."""
    figures = {"held_out_kl": float(found.kl.mean())}
    for j, name in enumerate(session.names):
        own = clustered(found.scores[..., j])
        figures |= {f"held_out/{name}": own["mean"], f"held_out_error/{name}": own["standard_error"]}
    return figures


def worst_served(session: Session, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The client and the objective of the least mean reward, in units of the base policy's deviation, on the client's
    own prompts in the last quarter of the rounds, of those that took part then; None where fewer than two did, or where
    nothing was trained before. An objective that was constant under the base policy has no say.

    The least of many noisy means is lower than that client's true one, and prompts differ before any training.
    """
    last, calibration, means = lines[-max(len(lines) // 4, 1) :], session.federation.calibration, {}
    for client in session.federation.clients:
        for j in (j for j in client.objectives if not calibration.constant[j]):
            key = f"reward/{session.names[j]}/client{client.index}"
            if own := [line[key] for line in last if key in line]:
                means[client.index, j] = sum(own) / len(own)
    if len({client for client, _ in means}) < 2 or len(lines) < 2:
        return None
    gain = lambda c, j: (means[c, j] - float(calibration.mean[j])) / float(calibration.scale[j])  # noqa: E731
    c, j = min(means, key=lambda each: gain(*each))
    others = [mean for (i, k), mean in means.items() if k == j and i != c]
    return {
        "client": c, "name": session.client_names[c] if session.client_names else "", "objective": session.names[j],
        "reward": means[c, j], "mean_of_others": sum(others) / len(others) if others else None, "others": len(others),
        "prompts": session.federation.clients[c].prompts_held, "rounds": len(last),
    }  # fmt: skip


def best_round(session: Session, before: Evaluation, after: Evaluation, directory: Path) -> dict[str, Any] | None:
    """Of the adapters that --eval_every kept, and the last one, the best by its worst-served objective: chosen on one
    half of the held-out prompts, by the least gain in units of the base policy's deviation, and reported on the rest.

    An objective that was constant under the base policy has no say. None for fewer than four held-out prompts.
    """
    last, calibration, n = session.config.firm.rounds, session.federation.calibration, len(session.held_out)
    files = {t: directory / f"round{t:04d}" / "held_out.safetensors" for t in range(1, last + 1)}
    kept = {t: load_file(file)["scores"] for t, file in files.items() if file.is_file()}
    if not kept or n < 4 or calibration.constant.all():
        return None
    scores = kept | {last: after.scores}
    chosen, rest = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tensor_split(2)
    gains = {t: (found - before.scores)[chosen].mean((0, 1)) / calibration.scale for t, found in scores.items()}
    best = max(gains, key=lambda t: float(gains[t][~calibration.constant].min()))
    own = scores[best][rest] - before.scores[rest]
    return {"round": best, "gain": {name: clustered(own[..., j]) for j, name in enumerate(session.names)}}


def called(client: int, names: Sequence[str]) -> str:
    """A client by its number, and by its name where that says more."""
    return f"client {client}" + (f" ({names[client]})" if names and names[client] != str(client) else "")


def by_client(
    session: Session, before: Evaluation, after: Evaluation, personal: Sequence[Evaluation] | None
) -> list[dict[str, Any]]:
    """Of every client: its task, what it holds, and the primary objective on held-out prompts of its kind, under the
    base model, the global adapter and its own.
    """
    found, primary = [], session.primary
    for client, task in zip(session.federation.clients, session.tasks, strict=True):
        chosen = session.of_kind(client.index)
        line = {"client": client.index, "task": task, "prompts": client.prompts_held, "held_out": len(chosen)}
        line["subsets"] = sorted({prompt.subset for prompt in client.prompts})
        line["objectives"] = [session.names[j] for j in client.objectives]
        line["primary"] = {
            "before": clustered(before.scores[chosen][..., primary]),
            "after": clustered(after.scores[chosen][..., primary]),
        }
        if personal:
            line["primary"]["personal"] = clustered(personal[client.index].scores[..., primary])
        found.append(line)
    return found


def client_table(session: Session, found: Sequence[dict[str, Any]]) -> str:
    """The primary objective by task, a plain mean over its clients, then by client."""
    stages = list(found[0]["primary"])
    name = session.names[session.primary]
    rows = [["", "trains on", "holds", "asked", *stages]]
    for task in sorted(set(session.tasks)):
        own = [line for line in found if line["task"] == task]
        means = [sum(line["primary"][stage]["mean"] for line in own) / len(own) for stage in stages]
        rows.append([task, str(sum(line["prompts"] for line in own)), "", "", *(f"{mean:.3f}" for mean in means)])
        for line in own:
            kind = line["subsets"][0] if len(line["subsets"]) == 1 else f"{len(line['subsets'])} subsets"
            figures = [plus_minus(line["primary"][stage], "") for stage in stages]
            who = f"  {called(line['client'], session.client_names)}: {kind}"
            rows.append([who, str(line["prompts"]), "+".join(line["objectives"]), str(line["held_out"]), *figures])
    note = "under the base model, the global adapter" + ", and the client's own" * ("personal" in stages)
    return "\n".join(
        ["", f"{name} on held-out prompts of the clients' kinds (all where there is none), {note}", *aligned(rows)]
    )


def table(session: Session, summary: dict[str, Any]) -> str:
    """The closing table."""
    rows = [["", "before", "after", "gain", "gain / error", "gain / base sd"]]
    for name, o in summary["objectives"].items():
        gain, error = o["gain"]["mean"], o["gain"]["standard_error"]
        ratio, scaled = gain / error if error else math.nan, gain / o["calibration"]["scale"]
        rows.append([name, *(plus_minus(o[k]) for k in ("before", "after", "gain")), f"{ratio:.1f}", f"{scaled:+.2f}"])
    n, S = len(session.held_out), session.config.run.eval_samples
    notes = [FROM_ADAPTER] * bool(session.config.run.adapter)
    if worst := summary["worst_served"]:
        last = "round" if worst["rounds"] == 1 else f"{worst['rounds']} rounds"
        line = f"worst served on its own {worst['prompts']} prompts, in the last {last}: "
        line += f"{called(worst['client'], session.client_names)}, {worst['objective']} {worst['reward']:.3f}"
        if n_others := worst["others"]:
            line += f"; {'the other has' if n_others == 1 else f'{n_others} others have'} {worst['mean_of_others']:.3f}"
        notes.append(line)
    if best := summary["best"]:
        gains = ", ".join(f"{name} {plus_minus(gain)}" for name, gain in best["gain"].items())
        line = f"best after round {best['round']}, chosen on half of the held-out prompts"
        notes.append(f"{line}; on the rest it gains {gains}")
    elif session.config.run.eval_every:
        notes.append(
            "best round: none, as it takes one within --eval_every, four held-out prompts, and rewards that vary"
        )
    return "\n".join([
        "",
        f"held out: {n} prompts x {S} responses; ± is a standard error clustered by prompt, gains are paired",
        *aligned(rows),
        f"KL to the base model {plus_minus(summary['kl'], '', 2)} nats per response",
        *notes,
        f"uploads {summary['upload_bytes_per_client_round']:,} bytes per client and round (downloads "
        f"{summary['download_bytes_per_client_round']:,}), {summary['upload_bytes_total']:,} in all; "
        f"{summary['seconds']:.0f} s",
    ])  # fmt: skip


def profile(found: dict[str, Any]) -> str:
    """What --profile found: where the rounds' time went, largest first, and the peak memory."""
    rounds, total = found["rounds"], sum(found["seconds"].values())
    rows = [["phase", "s/round", "share"]]
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
        rows.append([name, f"{seconds / rounds:.3f}", f"{seconds / total:.0%}"])
    end = f"of {rounds} rounds, {total:.1f} s; peak {found['memory']} {found['peak_gib']:.2f} GiB"
    return "\n".join(["", *aligned(rows), end])


def comparison(rows: Sequence[dict[str, Any]], names: Sequence[str], config: Config) -> str:
    """The closing table of a sweep: the base model, then one row per method and preference (see `sweep.figures`)."""

    def cells(figures: dict[str, Any], gains: Sequence[str]) -> list[str]:
        parts = zip(figures["mean"], figures["standard_error"], gains, strict=True)
        return [cell for mean, error, gain in parts for cell in (f"{mean:+.3f} ± {error:.3f}", gain)]

    shares = lambda values: "/".join(f"{x:.2f}" for x in values) if values else "–"  # noqa: E731
    lines = [["", "p", "mean λ", *(head for name in names for head in (name, "gain")), "KL", "MB up", ""]]
    lines.append(["base model", "", "", *cells(rows[0]["base"], [""] * len(names)), "", "", ""])
    for row in rows:
        figures = [f"{row['kl']:.2f}", f"{row['upload_bytes_per_client'] / 1e6:.2f}", "*" * row["dominated"]]
        middle = cells(row, [f"{gain:+.3f}" for gain in row["gain"]])
        lines.append([row["method"], shares(row["preference"]), shares(row["mean_lambda"]), *middle, *figures])
    notes = ["* dominated by the base model: better in no objective"] if any(row["dominated"] for row in rows) else []
    notes += [FROM_ADAPTER] * bool(config.run.adapter)
    mixed = f"; for soups in the {len(names)} runs that its rows share" * any(r["method"] == "soups" for r in rows)
    return "\n".join([
        "",
        f"held out: {config.data.held_out} prompts x {config.run.eval_samples} responses; ± is a standard error "
        "clustered by prompt, KL nats per response",
        *aligned(lines),
        *notes,
        f"MB up: by one client in the whole run{mixed}",
    ])  # fmt: skip


def samples(session: Session, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """The lines of samples.jsonl: each held-out prompt, and its first answer with its raw scores, before and after."""
    lines = []
    for i, prompt in enumerate(session.held_out):
        line = {"prompt": prompt.text}
        for stage, answers in (("before", before), ("after", after)):
            scores = dict(zip(session.names, answers.scores[i, 0].tolist(), strict=True))
            line[stage] = {"response": answers.texts[i], "scores": scores}
        lines.append(line)
    return lines


def show_samples(session: Session, samples: Sequence[dict[str, Any]]) -> str:
    """A few of the samples, of different subsets first."""
    subsets = [prompt.subset for prompt in session.held_out]
    order = sorted(range(len(subsets)), key=lambda i: (subsets.index(subsets[i]) < i, i))
    lines = [""]
    for i in order[: session.config.run.show]:
        lines.append(session.held_out[i].messages[-1]["content"].strip())
        for stage in ("before", "after"):
            scores = ", ".join(f"{name} {score:.2f}" for name, score in samples[i][stage]["scores"].items())
            lines.append(f"  {stage:6}  {' '.join(samples[i][stage]['response'].split())}   [{scores}]")
    return "\n".join(lines) + "\n"
