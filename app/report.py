"""What a run reports: the header, the closing table, the samples, and the figures behind them. [ours]

Figures are on held-out prompts, in raw units. Every prompt is answered S times before and after training, from the same
uniforms; gains are paired by prompt, and every standard error is clustered by prompt: the S responses to one prompt
are averaged first, since they are no independent evidence about other prompts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.stopwatch import Stopwatch, peak_memory


@dataclass
class Evaluation:
    """What a policy answered to n held-out prompts, S times each."""

    scores: Tensor  # [n, S, M] raw, float64
    kl: Tensor  # [n, S] nats per response
    texts: list[str]  # each prompt's first answer


def to_json(values: dict, **settings) -> str:
    """JSON with null where a figure does not exist (one objective has no cosine): NaN is not JSON."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), **settings)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A JSON object from each line; null is NaN."""
    return [json.loads(line, object_hook=nan_for_null) for line in file.read_text("utf-8").splitlines()]


def nan_for_null(found: dict[str, Any]) -> dict[str, Any]:
    """The inverse of what `to_json` does with NaN, as an object_hook."""
    return {key: math.nan if value is None else value for key, value in found.items()}


def clustered(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error clustered by prompt. values [n, S], S responses to each of n prompts."""
    by_prompt = values.double().mean(1)
    return float(by_prompt.mean()), float(by_prompt.std() / math.sqrt(len(by_prompt))) if len(
        by_prompt
    ) > 1 else math.nan


def header(session: Any, out: Path) -> str:
    """What is about to run, in a few lines."""
    config, policy, counts = session.config, session.policy, session.counts
    total = sum(p.numel() for p in policy.model.parameters())
    sizes = sorted(len(share) for share in session.shares)
    dropped = ", ".join(
        f"{counts[k]} {k.replace('_', ' ')}" for k in ("duplicates", "too_short", "too_long") if counts[k]
    )
    return "\n".join([
        f"{config.run.method} · {session.base_model}",
        f"  device      {session.device}, {config.rollout.dtype}, seed {config.firm.seed}",
        f"  adapter     {policy.adapter.size:,} trainable of {total:,} parameters "
        f"(rank {config.lora.lora_rank}, {len(policy.adapter.layers)} layers)",
        f"  objectives  {', '.join(session.names)}   preference {config.firm.preference or 'uniform'}"
        + (f"   beta {config.firm.beta:g}" if config.run.method == "firm" else ""),
        f"  prompts     {counts['kept']:,} kept of {counts['rows']:,} rows" + (f" ({dropped})" if dropped else "")
        + f", {len(session.held_out)} of them held out",
        f"  federation  {config.firm.clients} clients of {sizes[0]} to {sizes[-1]} prompts ({config.data.split}), "
        f"{config.firm.rounds} rounds",
        f"  run         {out}",
    ])  # fmt: skip


def progress_line(m: dict, names: Sequence[str]) -> str:
    """The bar's tail: rewards, KL and λ of the last round."""
    parts = [f"{name} {m[f'reward/{name}']:.3f}" for name in names] + [f"KL {m['kl']:.2f}"]
    return "  ".join(parts) + "  λ " + "/".join(f"{m[f'lambda/{name}']:.2f}" for name in names)


def summarise(session: Any, before: Evaluation, after: Evaluation, metrics: list[dict], seconds: float) -> dict:
    """The contract for scripts, summary.json: raw units, paired by prompt, errors clustered by prompt."""
    config, objectives = session.config, {}
    for j, name in enumerate(session.names):
        entry = {}
        for key, values in (("before", before.scores), ("after", after.scores), ("gain", None)):
            values = after.scores - before.scores if values is None else values
            entry[key] = dict(zip(("mean", "standard_error"), clustered(values[..., j]), strict=True))
        entry["gain"]["n_prompts"] = len(session.held_out)
        entry["calibration"] = {
            "mean": float(session.federation.calibration.mean[j]),
            "scale": float(session.federation.calibration.scale[j]),
        }
        objectives[name] = entry
    kl, kl_error = clustered(after.kl)
    cohort, M = config.firm.clients_per_round or config.firm.clients, len(session.names)
    return {
        "method": config.run.method,
        "seed": config.firm.seed,
        "seconds": seconds,
        "rounds": config.firm.rounds,
        "upload_bytes_per_client_round": metrics[-1]["upload_bytes"],
        "upload_bytes_total": cohort * sum(m["upload_bytes"] for m in metrics),
        "download_bytes_per_client_round": metrics[-1]["download_bytes"],
        "calibration_bytes_per_client": {"upload": 8 * 3 * M, "download": 8 * 2 * M},  # n, Σr, Σr²; mean, scale
        "base_model": session.base_model,
        "eval_samples": config.run.eval_samples,
        "kl": {"mean": kl, "standard_error": kl_error},
        "objectives": objectives,
    }


def table(session: Any, summary: dict) -> str:
    """The closing table."""
    n, S = len(session.held_out), session.config.run.eval_samples
    lines = [
        "",
        f"held out: {n} prompts x {S} responses; ± is a standard error clustered by prompt, gains are paired",
        f"{'':14}{'before':>16}{'after':>16}{'gain':>16}{'gain / error':>14}{'gain / base sd':>16}",
    ]
    for name, o in summary["objectives"].items():
        cells = [f"{o[k]['mean']:+.3f} ± {o[k]['standard_error']:.3f}" for k in ("before", "after", "gain")]
        ratio = o["gain"]["mean"] / o["gain"]["standard_error"] if o["gain"]["standard_error"] else math.nan
        lines.append(
            f"{name:14}"
            + "".join(f"{c:>16}" for c in cells)
            + f"{ratio:>14.1f}{o['gain']['mean'] / o['calibration']['scale']:>+16.2f}"
        )
    lines += [
        f"KL to the base model {summary['kl']['mean']:.2f} ± {summary['kl']['standard_error']:.2f} nats per response",
        f"uploads {summary['upload_bytes_per_client_round']:,} bytes per client and round "
        f"(downloads {summary['download_bytes_per_client_round']:,}), {summary['upload_bytes_total']:,} in all; "
        f"{summary['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def profile(watch: Stopwatch, rounds: int) -> dict:
    """What --profile leaves in summary.json: seconds per round and phase, peak memory."""
    kind, peak = peak_memory()
    return {"rounds": rounds, "seconds": dict(watch.seconds), "memory": kind, "peak_gib": peak}


def profile_table(profile: dict) -> str:
    """Where the rounds' time went, largest first."""
    total = sum(profile["seconds"].values())
    lines = ["", f"{'phase':12}{'s/round':>10}{'share':>8}   (of {profile['rounds']} rounds, {total:.1f} s)"]
    for name, seconds in sorted(profile["seconds"].items(), key=lambda item: -item[1]):
        lines.append(f"{name:12}{seconds / profile['rounds']:>10.3f}{seconds / total:>8.0%}")
    return "\n".join([*lines, f"peak {profile['memory']} {profile['peak_gib']:.2f} GiB"])


def comparison(rows: Sequence[dict], names: Sequence[str], n: int, S: int) -> str:
    """The closing table of a sweep: the base model, then one row per method and preference (see `sweep.figures`)."""
    shares = lambda values: "/".join(f"{x:.2f}" for x in values) if values else "–"  # noqa: E731
    wide = max(5 * len(names) + 2, 9)
    columns = [(j, max(len(name) + 2, 17)) for j, name in enumerate(names)]
    cell = lambda row, j: f"{row['mean'][j]:+.3f} ± {row['standard_error'][j]:.3f}"  # noqa: E731
    lines = [
        "",
        f"held out: {n} prompts x {S} responses; ± is a standard error clustered by prompt, KL is in nats per response",
        f"{'':10}{'p':>{wide}}{'mean λ':>{wide}}" + "".join(f"{names[j]:>{w}}{'gain':>8}" for j, w in columns)
        + f"{'KL':>7}{'MB up':>8}",
        f"{'base model':{10 + 2 * wide}}" + "".join(f"{cell(rows[0]['base'], j):>{w}}{'':8}" for j, w in columns)
        .rstrip(),
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"{row['method']:10}{shares(row['preference']):>{wide}}{shares(row['mean_lambda']):>{wide}}"
            + "".join(f"{cell(row, j):>{w}}{row['gain'][j]:>+8.3f}" for j, w in columns)
            + f"{row['kl']:>7.2f}{row['upload_bytes_per_client'] / 1e6:>8.2f}{' *' * row['dominated']}"
        )
    if any(row["dominated"] for row in rows):
        lines.append("* dominated by the base model: better in no objective")
    if any(row["method"] == "soups" for row in rows):
        lines.append(f"MB up: by one client in the whole run; for soups in the {len(names)} runs that its rows share")
    else:
        lines.append("MB up: by one client in the whole run")
    return "\n".join(lines)


def samples(session: Any, before: Evaluation, after: Evaluation) -> str:
    """samples.jsonl: each held-out prompt's first answer, before and after, with its raw scores."""
    lines = []
    for i, prompt in enumerate(session.held_out):
        line = {"prompt": prompt.text}
        for key, answers in (("before", before), ("after", after)):
            scores = dict(zip(session.names, answers.scores[i, 0].tolist(), strict=True))
            line[key] = {"response": answers.texts[i], "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def show_samples(session: Any, before: Evaluation, after: Evaluation) -> str:
    """A few held-out prompts, of different subsets first, answered before and after."""
    chosen, seen = [], set()
    for i, prompt in enumerate(session.held_out):
        if prompt.subset not in seen:
            chosen.append(i)
            seen.add(prompt.subset)
    chosen = (chosen + [i for i in range(len(session.held_out)) if i not in chosen])[: session.config.run.show]
    lines = [""]
    for i in chosen:
        lines.append(session.held_out[i].messages[-1]["content"].strip())
        for label, answers in (("before", before), ("after ", after)):
            scores = ", ".join(
                f"{n} {s:.2f}" for n, s in zip(session.names, answers.scores[i, 0].tolist(), strict=True)
            )
            lines.append(f"  {label}  {' '.join(answers.texts[i].split())}   [{scores}]")
    return "\n".join(lines) + "\n"
