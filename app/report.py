"""What runs print, and the figures of summary.json. [ours]

Figures are on held-out prompts, in raw units. Every prompt is answered S times before and after training, from the same
uniforms; gains are paired by prompt, and every standard error is clustered by prompt.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from app import ranks
from app.metrics import Evaluation, clustered
from app.session import Session


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
    config, counts = session.config, session.counts
    sizes = sorted(map(len, session.prompts_of))
    where = f"of {sizes[0]} to {sizes[-1]} prompts ({config.split})" if sizes[-1] else "elsewhere"
    own = bool(session.client_names) and session.held_out[0].owner(config.split) is not None
    parts = [part for part in (config.method, config.advantages, config.weights, config.aggregation) if part]
    return "\n".join([
        f"{' '.join(parts)} on {config.model}, {session.device}, {config.dtype}, seed {config.seed}"
        + f", {ranks.size()} processes" * (ranks.size() > 1),
        f"  objectives  {', '.join(session.names)}; preference {config.preference or 'uniform'}",
        f"  prompts     {counts['kept']:,} kept of {counts['rows']:,} rows ({counts['duplicates']} duplicates, "
        f"{counts['too_long']} too long), {len(session.held_out)} of them held out",
        *["  clients' own prompts are held out, and stand in samples.jsonl"] * own,
        f"  clients     {len(sizes)} {where} "
        + shorten(", ".join(session.client_names), 90),
        f"  rounds      {config.rounds} of {config.batch_size} responses, {session.federation.group_size} to a prompt",
        f"  run         {out}",
    ])  # fmt: skip


def summarise(session: Session, after: Evaluation) -> dict[str, Any]:
    """The contract for scripts, summary.json: raw units, gains paired by prompt."""
    config, calibration = session.config, session.federation.calibration
    before, lines = session.before, session.lines
    objectives = {
        name: {
            "before": clustered(before.scores[..., j]),
            "after": clustered(after.scores[..., j]),
            "gain": clustered((after.scores - before.scores)[..., j]) | {"n_prompts": len(session.held_out)},
            "calibration": {"mean": float(calibration.mean[j]), "scale": float(calibration.scale[j])},
        }
        for j, name in enumerate(session.names)
    }
    weights = [f"lambda/{name}" for name in session.names]
    cohort = config.clients_per_round or config.clients
    uploaded = sum((cohort - m["dropped_clients"]) * m["upload_bytes"] for m in lines)
    return {
        "method": config.method,
        "seed": config.seed,
        "seconds": time.perf_counter() - session.started,
        "processes": ranks.size(),
        "rounds": config.rounds,
        "preference": config.preference,
        "mean_lambda": [float(np.nanmean([m[key] for m in lines])) for key in weights if lines and key in lines[0]],
        "inputs": session.inputs | {"the starting adapter": session.start},
        "upload_bytes_per_client_round": lines[-1]["upload_bytes"] if lines else 0,
        "upload_bytes_per_client": uploaded / config.clients,
        "upload_bytes_total": uploaded,
        "download_bytes_per_client_round": lines[-1]["download_bytes"] if lines else 0,
        "base_model": session.base_model,
        "client_names": session.client_names,
        "kl": clustered(after.kl),
        "objectives": objectives,
    }


def by_client(session: Session, after: Evaluation, personal: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Each client's task and objectives, and the primary one on held-out prompts of its kind, under each adapter."""
    lines = []
    for client, task in zip(session.federation.clients, session.tasks, strict=True):
        kind = session.of_kind(client.index)
        stages = {"before": session.before.scores[kind], "after": after.scores[kind]}
        stages |= {"personal": personal[client.index].scores} if personal else {}
        lines.append({
            "client": client.index, "task": task, "prompts": len(client.prompts), "held_out": len(kind),
            "subsets": sorted({prompt.subset for prompt in client.prompts}),
            "objectives": [session.names[j] for j in client.objectives],
            "primary": {stage: clustered(scores[..., 0]) for stage, scores in stages.items()},
        })  # fmt: skip
    return lines


def client_table(session: Session, lines: Sequence[dict[str, Any]]) -> list[str]:
    """The primary objective by client."""
    stages = list(lines[0]["primary"])
    rows = [["client", "task", "subsets", "trains on", "asked", *stages]]
    for line in lines:
        figures = [plus_minus(line["primary"][stage], "") for stage in stages]
        counts = [str(line["prompts"]), str(line["held_out"])]
        rows.append([str(line["client"]), line["task"], shorten("+".join(line["subsets"]), 30), *counts, *figures])
    title = f"{session.names[0]} on held-out prompts of the clients' kinds, under the base model, the global adapter"
    return ["", title + ", the client's own" * ("personal" in stages), *aligned(rows)]


def table(session: Session, summary: dict[str, Any]) -> str:
    """The closing table."""
    rows = [["", "before", "after", "gain", "gain / error", "gain / base sd"]]
    for name, o in summary["objectives"].items():
        gain, error = o["gain"]["mean"], o["gain"]["standard_error"]
        ratio, scaled = gain / error if error else math.nan, gain / o["calibration"]["scale"]
        rows.append([name, *(plus_minus(o[k]) for k in ("before", "after", "gain")), f"{ratio:.1f}", f"{scaled:+.2f}"])
    notes = ["gains are over the base model without --adapter"] if session.config.adapter else []
    if best := summary["best"]:
        gains = ", ".join(f"{name} {plus_minus(gain)}" for name, gain in best["gain"].items())
        notes.append(f"best after round {best['round']}, chosen on half of the held-out prompts; on the rest: {gains}")
    return "\n".join([
        "",
        f"held out: {len(session.held_out)} prompts x {session.config.eval_samples} responses; ± is a standard error "
        "clustered by prompt, gains are paired",
        *aligned(rows),
        f"KL to the base model {plus_minus(summary['kl'], '', 2)} nats per response",
        *notes,
        f"uploads {summary['upload_bytes_per_client_round']:,.0f} bytes per client and round (downloads "
        f"{summary['download_bytes_per_client_round']:,.0f}), {summary['upload_bytes_total']:,.0f} in all; "
        f"{summary['seconds']:.0f} s",
        *(client_table(session, summary["by_client"]) if "by_client" in summary else []),
    ])  # fmt: skip


def samples(session: Session, after: Evaluation) -> list[dict[str, Any]]:
    """The lines of samples.jsonl: each held-out prompt, and its first answer with its raw scores, before and after."""
    lines = []
    for i, prompt in enumerate(session.held_out):
        line = {"prompt": prompt.text, "subset": prompt.subset, "question": prompt.messages[-1]["content"]}
        for stage, answers in (("before", session.before), ("after", after)):
            scores = dict(zip(session.names, answers.scores[i, 0].tolist(), strict=True))
            line[stage] = {"response": answers.texts[i], "scores": scores}
        lines.append(line)
    return lines


def show_samples(samples: Sequence[dict[str, Any]], n: int = 4) -> str:
    """The first samples, as text."""
    lines = [""]
    for sample in samples[:n]:
        lines.append(sample["question"].strip())
        for stage in ("before", "after"):
            scores = ", ".join(f"{name} {score:.2f}" for name, score in sample[stage]["scores"].items())
            lines.append(f"  {stage:6}  {' '.join(sample[stage]['response'].split())}   [{scores}]")
    return "\n".join(lines) + "\n"


def predictor_table(summary: dict[str, Any]) -> str:
    """The closing table of a predictor: every group's alignment, then the figures of the unseen ones."""
    columns = [*summary["sides"], "mean answer", "uniform", "federated, overlap", "mean answer, overlap"]
    rows = [["", "questions", *columns]]
    for group, figures in summary["groups"].items():
        cells = [f"{figures[name]:.3f}" for name in columns]
        rows.append([group + " *" * figures["unseen"], str(figures["questions"]), *cells])
    lines = ["alignment, 1 - Jensen-Shannon distance to a group's answers; * took no part in training", *aligned(rows)]
    for side, figures in summary["sides"].items():
        values = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        lines.append(f"{side}, unseen groups: {values}")
    worth = "given 15 of their own answers {own:.3f}, given another group's {other:.3f}"
    return "\n".join([*lines, f"federated, unseen groups: {worth.format(**summary['context'])}"])
