"""The chat model's experiment: does an objective fall under fixed weights where it does not under FIRM? [ours]

It needs the files that the preset `smollm2` names, on the hub or here, and takes hours: `all` leaves it out. ± is a
standard error over held-out prompts, of one run. The cosine's is over the clients of a round, each with its own batch.
"""

from pathlib import Path

import numpy as np

import run
from app import plots
from app.files import read_lines
from app.options import PRESETS
from experiments.lab import Experiment, settings_of
from experiments.tables import Groups, Row, markdown
from settings import Config

SEEDS, TUNING = [{"seed": seed} for seed in (40, 41, 42)], {"seed": 101}
ONE = SEEDS[0]  # what only one seed has
NAMES = ("helpful", "harmless")
BY_ROUND = {"cosine": "cosine of the gradients", "lambda/disagreement": "disagreement of the clients' λ"}
BY_ROUND |= {f"reward/{name}": f"reward, {name}" for name in NAMES}


def measure(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job: gains over the base model, their errors, and figures of every round, NAME@ROUND."""
    out = directory / "run"
    summary = run.train(Config(**PRESETS["smollm2"] | {"threads": 1} | job | {"out": str(out)}), progress=False)
    row = {"kl": summary["kl"]["mean"], "kl_error": summary["kl"]["standard_error"], "seconds": summary["seconds"]}
    for name, figures in summary["objectives"].items():
        mean, error = (figures["gain"][key] for key in ("mean", "standard_error"))
        row |= {f"gain_{name}": mean, f"error_{name}": error, f"errors_{name}": mean / error}
    for line in read_lines(out / "metrics.jsonl"):
        row |= {f"{figure}@{line['round']}": line[figure] for figure in (*BY_ROUND, "cosine_error", "lambda/helpful")}
    return [row]


def each_run(groups: Groups, path: Path) -> str:
    """A line for every run, and a picture of the rounds, means over a label's seeds."""
    lines, curves = [], {figure: {} for figure in BY_ROUND}
    for label, rows in groups.items():
        for row in rows:
            gains = [f"{row[f'gain_{n}']:+.3f} ± {row[f'error_{n}']:.3f} ({row[f'errors_{n}']:+.1f})" for n in NAMES]
            lines.append([label, str(row["seed"]), *gains, f"{row['kl']:.2f} ± {row['kl_error']:.2f}"])
        rounds = range(sum(name.startswith("cosine@") for name in rows[0]))
        of = {f: np.array([[row[f"{f}@{t}"] for t in rounds] for row in rows]) for f in (*BY_ROUND, "cosine_error")}
        errors = {"cosine": np.linalg.norm(of["cosine_error"], axis=0) / len(rows)}
        for figure, drawn in curves.items():
            drawn[label] = rounds, of[figure].mean(0), errors.get(figure)
    plots.panels([plots.Panel("round", BY_ROUND[figure], "", of) for figure, of in curves.items()], Path(f"{path}.png"))
    return markdown(["", "seed", *(f"{name}, gain ± error (errors)" for name in NAMES), "KL"], lines)


EXPERIMENTS = {
    "chat_tuning": Experiment(
        measure, {f"rate {lr:g}": {"lr": lr, "method": "linear"} for lr in (5e-4, 1e-3, 2e-3)}, [TUNING],
        [f"gain_{name}" for name in NAMES] + ["kl"], more=each_run,
    ),
    "chat": Experiment(
        measure,
        {label: settings_of(label) for label in ("firm", "linear")}
        | {label: settings_of(label) | ONE for label in ("mgda", "firm β=1")},
        SEEDS, [f"{kind}_{name}" for kind in ("gain", "errors") for name in NAMES] + ["kl", "seconds"],
        {"FIRM less fixed weights": [("firm", "linear")]}, [f"gain_{name}" for name in NAMES] + ["kl"], more=each_run,
    ),
}  # fmt: skip
