"""The chat model's experiment: does an objective fall under fixed weights where it does not under FIRM? [ours]

It needs the files that the preset `smollm2` names, on the hub or here, and takes hours: `all` leaves it out. A gain's
error is over held-out prompts, of one run; that of the cosine is over the clients of a round, each with its own batch.
"""

import math
from pathlib import Path

import numpy as np

import run
from app.files import read_lines
from app.options import PRESETS
from app.plots import Panel, panels
from experiments.lab import Experiment, settings_of
from experiments.tables import Groups, Row, markdown
from settings import Config

SEEDS, TUNING = [{"seed": seed} for seed in (40, 41, 42)], {"seed": 101}
ONE = SEEDS[0]  # what only one seed has
NAMES = ("helpful", "harmless")
BY_ROUND = ("cosine", "cosine_error", "lambda/disagreement", "lambda/helpful", *(f"reward/{name}" for name in NAMES))


def measure(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job: gains over the base model, their errors, and figures of every round, NAME@ROUND."""
    out = directory / "run"
    summary = run.train(Config(**PRESETS["smollm2"] | {"threads": 1} | job | {"out": str(out)}), progress=False)
    row = {"kl": summary["kl"]["mean"], "kl_error": summary["kl"]["standard_error"], "seconds": summary["seconds"]}
    for name, figures in summary["objectives"].items():
        mean, error = (figures["gain"][key] for key in ("mean", "standard_error"))
        row |= {f"gain_{name}": mean, f"error_{name}": error, f"errors_{name}": mean / (error or math.nan)}
    for line in read_lines(out / "metrics.jsonl"):
        row |= {f"{figure}@{line['round']}": line[figure] for figure in BY_ROUND}
    return [row]


def each_run(groups: Groups, path: Path) -> str:
    """A line for every run; a picture of their gains, and of the rounds, as means over a label's seeds."""
    lines, gains, cosines, disagreements = [], {}, {}, {}
    for label, rows in groups.items():
        for row in rows:
            cells = [f"{row[f'gain_{n}']:+.3f} ± {row[f'error_{n}']:.3f} ({row[f'errors_{n}']:+.1f})" for n in NAMES]
            lines.append([label, str(row["seed"]), *cells, f"{row['kl']:.2f} ± {row['kl_error']:.2f}"])
        of = {f: [[row[k] for row in rows] for k in rows[0] if k.startswith(f"{f}@")] for f in BY_ROUND}  # [T][runs]
        (x, dx), (y, dy) = ([[row[f"{kind}_{name}"] for row in rows] for kind in ("gain", "error")] for name in NAMES)
        gains[label], rounds = (x, y, dy, dx), range(len(of["cosine"]))
        cosines[label] = rounds, np.mean(of["cosine"], 1), np.linalg.norm(of["cosine_error"], axis=1) / len(rows)
        disagreements[label] = rounds, np.mean(of["lambda/disagreement"], 1), None
    panels([
        Panel(*(f"{name}, gain (raw units)" for name in NAMES), "A point a run, ± standard errors", gains, dots=True),
        Panel("round", "cosine of the gradients", "Mean over clients ± standard error", cosines),
        Panel("round", "mean distance from λ̄", "Disagreement between clients", disagreements),
    ], Path(f"{path}.png"))  # fmt: skip
    return markdown(["", "seed", *(f"{name}, gain ± error (gain / error)" for name in NAMES), "KL ± error"], lines)


MEANS = ["gain_helpful", "gain_harmless", "kl"]
NOTE = "Of one run the error is a standard error over the held-out prompts. Over runs:"
EXPERIMENTS = {
    "chat_tuning": Experiment(
        measure, {f"rate {lr:g}": {"lr": lr, "method": "linear"} for lr in (5e-4, 1e-3, 2e-3)}, [TUNING],
        MEANS, more=each_run, note=f"The rate of the greatest worst gain is the preset's. {NOTE}",
    ),
    "chat": Experiment(
        measure,
        {label: settings_of(label) for label in ("firm", "linear")}
        | {label: settings_of(label) | ONE for label in ("mgda", "firm β=1")}
        | {f"linear p={p}": {"method": "linear", "preference": [p, round(1 - p, 1)]} | ONE for p in (0.1, 0.9)},
        SEEDS, [*MEANS, "seconds"], {"FIRM less fixed weights": [("firm", "linear")]}, MEANS, more=each_run,
        note=NOTE,
    ),
}  # fmt: skip
