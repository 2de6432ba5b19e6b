"""FedMOA in the reasoning world: what it gains in accuracy, which part earns what, what a saturated objective loses.

Experiments as those of `experiments.py`. [ours]

All at the settings of the preset fedmoa-tiny, on equal prompts, responses and rounds. What a method has of its own is
chosen on seeds of its own, six settings each: FedMOA's rate and γ, the fixed weights, FIRM's β. The judge is accuracy
on held-out prompts, whose references are right, as a mean over both severities.
"""

from itertools import product

import numpy as np

from app import plots
from evidence import rules
from evidence.lab import EIGHTHS, Lab
from evidence.rules import TUNING_SEEDS
from evidence.statistics import against, cell, column, interval, number, paired, show, where

SEVERITIES = (0.0, 0.7)
PRIMARY = [1.0, 0.0, 0.0]
FIXED = {"method": "linear", "advantages": "grpo"}
GRIDS = {  # what is tuned: the settings of its own, six each
    "fedmoa": [{"hyper_rate": rate, "accuracy_power": power} for rate, power in product((0.5, 1.0, 2.0), (1.0, 2.0))],
    "linear tuned": [
        {"preference": p} for p in ([1 / 3] * 3, [0.5, 0.25, 0.25], [0.7, 0.15, 0.15], [0.5, 0.5, 0.0],
                                    [0.8, 0.2, 0.0], PRIMARY)
    ],
    "firm": [{"beta": beta} for beta in (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)],
}  # fmt: skip
METHODS = {  # before what the tuning adds to them
    "fedmoa": {"method": "fedmoa"},
    "linear": FIXED,
    "linear primary": FIXED | {"preference": PRIMARY},
    "linear tuned": FIXED,
    "firm": {"method": "firm", "advantages": "grpo"},
    "fedmoa weights alone": {"method": "fedmoa", "aggregation": "fedavg"},
    "fedmoa average alone": {"method": "fedmoa", "weights": "fixed"},
    "fedmoa average, primary": {"method": "fedmoa", "weights": "fixed", "preference": PRIMARY},
    "fedmoa groups": {"method": "fedmoa", "advantages": "group"},
}
SHOWN = ("accuracy", "format", "length", "kl", "lambda_accuracy", "lambda_format", "lambda_length")


def tuned(lab: Lab) -> dict[str, dict]:
    """The best settings of every label that has a grid; the table that shows them all."""
    seeds, shared = lab.some(TUNING_SEEDS)[: 1 if lab.quick else None], {"preset": "fedmoa-tiny", "personal_rounds": 0}
    jobs = {
        (label, i): [shared | METHODS[label] | own | {"severity": s, "seed": n} for s in SEVERITIES for n in seeds]
        for label, grid in GRIDS.items() for i, own in enumerate(grid[:1] if lab.quick else grid)
    }  # fmt: skip
    rows, best, lines = lab.groups("fedmoa_tuning", jobs), {}, []
    for label, grid in GRIDS.items():
        scores = {i: np.mean(column(rows[label, i], "accuracy")) for i in range(len(grid)) if (label, i) in rows}
        best[label] = grid[max(scores, key=scores.get)]
        for i, score in scores.items():
            by_severity = [f"{np.mean(column(where(rows[label, i], severity=s), 'accuracy')):.3f}" for s in SEVERITIES]
            own = ", ".join(f"{name} {value}" for name, value in grid[i].items())
            lines.append([label, own, *by_severity, f"{score:.3f}" + " *" * (grid[i] == best[label])])
    head = ["method", "settings", *(f"accuracy, severity {s:g}" for s in SEVERITIES), "mean"]
    show(lab.results, "fedmoa_tuning", head, lines, f"Seeds {', '.join(map(str, seeds))}; * is what is used.")
    return best


def fedmoa(lab: Lab) -> None:
    """Global accuracy against fixed weights, FIRM's λ and the parts alone, at two severities of poor data."""
    best, seeds = tuned(lab), lab.some(rules.seeds_of(10))
    shared, jobs = {"preset": "fedmoa-tiny"}, {}
    for (label, changes), severity in product(METHODS.items(), SEVERITIES):
        own = best.get(label.split()[0] if label.startswith("fedmoa") else label, {}) | changes
        own |= {"personal_rounds": 4 if label in ("fedmoa", "linear") else 0, "severity": severity}
        jobs[label, severity] = [shared | own | {"seed": seed} for seed in seeds]
    rows, lines, personal = lab.groups("fedmoa", jobs), [], []
    for severity in SEVERITIES:
        of = {label: rows[label, severity] for label in METHODS}
        test = against(of, "fedmoa", "accuracy")
        for label, own in of.items():
            plain = "" if label == "fedmoa" else f"{paired(of['fedmoa'], own, 'accuracy')[2]:.2g}"
            lines.append(
                [f"{severity:g}", label, *(cell(own, f) for f in SHOWN), test[label][0], plain, test[label][1]]
            )
        for label in ("fedmoa", "linear"):
            for data in ("careful", "poor"):
                for row in of[label]:
                    row["gain"] = row[f"{data}_personal"] - row[f"{data}_after"]
                figures = (f"{data}_before", f"{data}_after", f"{data}_personal", "gain")
                personal.append([f"{severity:g}", label, data, *(cell(of[label], f) for f in figures)])
    head = ["severity", "method", "accuracy", "format", "length", "KL", "λ of accuracy", "of format", "of length",
            "accuracy, fedmoa − method", "p", "p (Holm)"]  # fmt: skip
    note = (
        f"{len(seeds)} seeds from {seeds[0]}, paired; ± is half a 95 % interval; λ in the last eighth of the rounds, "
    )
    note += "over the clients that hold the objective. Holm over the four baselines of a severity; settings as tuned."
    show(lab.results, "fedmoa", head, lines, note)
    head = ["severity", "method", "clients", "base model", "global adapter", "each client's own", "difference"]
    show(
        lab.results,
        "fedmoa_personal",
        head,
        personal,
        "Accuracy on held-out prompts of a client's kind, mean over clients.",
    )
    panels = []
    for severity in SEVERITIES:
        drawn = {}
        for label in METHODS:
            mean, half = interval(column(rows[label, severity], "accuracy"))
            drawn[label] = ([float(np.mean(column(rows[label, severity], "kl")))], [mean], [half])
        panels.append(plots.Panel("KL (nats per response)", "accuracy, held out", f"severity {severity:g}", drawn))
    plots.panels(panels, lab.results / "fedmoa.png")


def saturation(lab: Lab) -> None:
    """The share of an auxiliary that saturates, beside the same objective with its target out of reach."""
    seeds, drawn, lines, x = lab.some(rules.seeds_of(10)), [{}, {}, {}], [], np.arange(EIGHTHS) + 1.0
    jobs, own = {}, tuned(lab)["fedmoa"]
    for name in ("one_step", "six_steps"):
        objectives = ["py:worlds/reasoning.py:accuracy", f"auxiliary=py:worlds/reasoning.py:{name}"]
        setting = {"preset": "fedmoa-tiny", "method": "fedmoa", "personal_rounds": 0, "objectives": objectives}
        setting |= {"client_objectives": ["code=accuracy"]} | own  # which has no running values
        jobs[name] = [setting | {"seed": seed} for seed in seeds]
    found = lab.groups("saturation", jobs)
    for name, rows in found.items():
        for row in rows:
            row["fall"] = 0.5 - row["lambda_auxiliary"]  # from the preference's share
        lines.append([name, *(cell(rows, f) for f in ("reward_auxiliary@0", "reward_auxiliary", "zero_spread_auxiliary",
                                                      "lambda_auxiliary", "fall", "accuracy"))])  # fmt: skip
        for panel, kind in zip(drawn, ("lambda", "reward", "zero_spread"), strict=True):
            points = [interval(column(rows, f"{kind}_auxiliary@{i}")) for i in range(EIGHTHS)]
            panel[name] = (x, *zip(*points, strict=True))
    gap, half, p = paired(found["one_step"], found["six_steps"], "fall")
    ratio = np.mean(column(found["one_step"], "fall")) / np.mean(column(found["six_steps"], "fall"))
    head = ["auxiliary", "its reward, first eighth", "last eighth", "groups of equal reward", "its share, last eighth",
            "fall of the share, from 0.5", "accuracy"]  # fmt: skip
    note = (
        f"{len(seeds)} seeds from {seeds[0]}; means over the clients of mathematics. The fall of the saturated one is "
    )
    note += f"{ratio:.2f} times that of the control; difference {number(gap)} ± {number(half)} (p {p:.2g})."
    show(lab.results, "saturation", head, lines, note)
    titles = ("its share λ", "its reward", "share of groups of equal reward")
    contents = [plots.Panel("eighth of the rounds", y, "", lines) for y, lines in zip(titles, drawn, strict=True)]
    plots.panels(contents, lab.results / "saturation.png")
