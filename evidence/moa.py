"""FedMOA in the reasoning world: what it gains in accuracy, which part earns what, what a saturated objective loses.

Experiments as those of `experiments.py`. [ours]

All at the settings of the preset fedmoa-tiny, on equal prompts, responses and rounds. What a method has of its own is
chosen on seeds of its own, six settings each: FedMOA's rate and γ, the fixed weights, FIRM's β and p. The judge is
accuracy on held-out prompts, whose references are right, as a mean over both severities.
"""

from itertools import product

import numpy as np

from app import plots
from evidence import rules
from evidence.lab import EIGHTHS, Lab
from evidence.rules import TUNING_SEEDS
from evidence.statistics import BARS, cell, column, holm, interval, number, paired, show, where

SEVERITIES = (0.0, 0.7)
PRIMARY = [1.0, 0.0, 0.0]
FIXED = {"method": "linear", "advantages": "grpo"}
GRIDS = {  # what is tuned: the settings of its own, six each
    "fedmoa": [{"hyper_rate": rate, "accuracy_power": power} for rate, power in product((1.0, 2.0, 4.0), (1.0, 2.0))],
    "linear tuned": [
        {"preference": p} for p in ([1 / 3] * 3, [0.5, 0.25, 0.25], [0.7, 0.15, 0.15], [0.5, 0.5, 0.0],
                                    [0.8, 0.2, 0.0], PRIMARY)
    ],
    "firm": [
        {"beta": beta, "preference": p} for beta, p in product((0.1, 1.0, 10.0), ([1 / 3] * 3, [0.8, 0.2, 0.0]))
    ],
}  # fmt: skip
PARTS = {  # what each part earns: the label with it, the label without it
    "the average, with equal weights": ("fedmoa average alone", "linear"),
    "the average, with the primary alone": ("fedmoa average, primary", "linear primary"),
    "the average, with moving weights": ("fedmoa", "fedmoa weights alone"),
    "moving weights for equal ones": ("fedmoa weights alone", "linear"),
    "moving weights for equal ones, with the average": ("fedmoa", "fedmoa average alone"),
    "moving weights for tuned ones": ("fedmoa weights alone", "linear tuned"),
    "moving weights for the primary alone, with the average": ("fedmoa", "fedmoa average, primary"),
    "groups over their own deviation for plain ones": ("fedmoa", "fedmoa groups"),
}
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
PERSONAL = ("fedmoa", "linear tuned")
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
            own = ", ".join(f"{name} {np.round(value, 2)}" for name, value in grid[i].items())
            lines.append([label, own, *by_severity, f"{score:.3f}" + " *" * (grid[i] == best[label])])
    head = ["method", "settings", *(f"accuracy, severity {s:g}" for s in SEVERITIES), "mean"]
    show(lab.results, "fedmoa_tuning", head, lines, f"Seeds {', '.join(map(str, seeds))}; * is what is used.")
    return best


def fedmoa(lab: Lab) -> None:
    """Global accuracy against fixed weights, FIRM's λ and the parts alone, at two severities of poor data."""
    best, seeds = tuned(lab), TUNING_SEEDS[:1] if lab.quick else rules.seeds_of(10)  # each makes a world first
    shared, jobs = {"preset": "fedmoa-tiny"}, {}
    for seed, severity, label in product(seeds, SEVERITIES, METHODS):  # whole seeds first, see `preference_sweeps`
        own = best.get(label.split()[0] if label.startswith("fedmoa") else label, {}) | METHODS[label]
        own |= {"personal_rounds": 4 if label in PERSONAL else 0, "severity": severity, "seed": seed}
        jobs.setdefault((label, severity), []).append(shared | own)
    lab.rows("fedmoa", [of_label[i] for i in range(len(seeds)) for of_label in jobs.values()])
    rows = lab.groups("fedmoa", jobs)
    baselines = [label for label in METHODS if not label.startswith("fedmoa")]
    differences(lab, "fedmoa", rows, {label: ("fedmoa", label) for label in baselines}, len(seeds))
    differences(lab, "fedmoa_parts", rows, PARTS, len(seeds))
    personal = []
    for severity, label, data in product(SEVERITIES, PERSONAL, ("careful", "poor")):
        for row in rows[label, severity]:
            row["gain"] = row[f"{data}_personal"] - row[f"{data}_after"]
        figures = (f"{data}_before", f"{data}_after", f"{data}_personal", "gain")
        personal.append([f"{severity:g}", label, data, *(cell(rows[label, severity], f) for f in figures)])
    head = ["severity", "method", "clients", "base model", "global adapter", "each client's own", "difference"]
    note = "Accuracy on held-out prompts of a client's kind, whose references are right; means over the clients."
    show(lab.results, "fedmoa_personal", head, personal, note)
    lines = [
        [f"{severity:g}", label, *(cell(rows[label, severity], figure) for figure in SHOWN)]
        for severity, label in product(SEVERITIES, METHODS)
    ]
    head = ["severity", "method", "accuracy", "format", "length", "KL", "λ of accuracy", "of format", "of length"]
    note = "λ in the last eighth of the rounds, mean over the clients that hold the objective; settings as tuned."
    show(lab.results, "fedmoa_methods", head, lines, note)
    x, panels = range(len(METHODS)), []
    for figure, y in (("accuracy", "accuracy, held out"), ("kl", "KL (nats per response)")):
        lines = {}
        for severity in SEVERITIES:
            points = [interval(column(rows[label, severity], figure)) for label in METHODS]
            lines[f"severity {severity:g}"] = (x, *zip(*points, strict=True))
        panels.append(plots.Panel("", y, "", lines, ticks=list(METHODS)))
    plots.panels(panels, lab.results / "fedmoa.png", note=BARS)


def differences(lab: Lab, name: str, rows: dict[tuple, list[dict]], pairs: dict[str, tuple[str, str]], n: int) -> None:
    """A table of paired differences in held-out accuracy, a line per severity and pair of labels; one Holm family."""
    found = {
        (severity, what): paired(rows[one, severity], rows[other, severity], "accuracy")
        for severity, (what, (one, other)) in product(SEVERITIES, pairs.items())
    }
    corrected = holm([p for _, _, p in found.values()])
    lines = []
    for ((severity, what), (mean, half, _)), p in zip(found.items(), corrected, strict=True):
        one, other = (cell(rows[label, severity], "accuracy") for label in pairs[what])
        lines.append([f"{severity:g}", what, one, other, f"{mean:+.3f} ± {number(half)}", f"{p:.2g}"])
    note = f"{n} seeds, paired; ± is half a 95 % interval; Holm over all {len(lines)} lines."
    what, with_it, without = ("fedmoa less …", "fedmoa", "that") if name == "fedmoa" else ("part", "with it", "without")
    show(lab.results, name, ["severity", what, f"accuracy, {with_it}", without, "difference", "p (Holm)"], lines, note)


def saturation(lab: Lab) -> None:
    """The share of an auxiliary that saturates, beside the same objective with its target out of reach.

    Both count right running values, up to one or up to six. With batches four times as large as the preset's: at 64
    responses h is mostly noise, and what it does cannot be seen within 10 seeds. Twice: as tuned, where the weights
    forget within some 10 rounds, and with a pull that lets them remember all of the run, chosen on the tuning's seeds.
    """
    seeds = TUNING_SEEDS[:1] if lab.quick else rules.seeds_of(10)
    drawn, lines, x = [{}, {}, {}], [], np.arange(EIGHTHS) + 1.0
    jobs, own, notes = {}, tuned(lab)["fedmoa"], []
    variants = {"": own, ", slow pull": own | {"hyper_rate": 2.0, "hyper_pull": 0.02}}
    for (variant, changes), name in product(variants.items(), ("one_step", "six_steps")):
        objectives = ["py:worlds/reasoning.py:accuracy", f"auxiliary=py:worlds/reasoning.py:{name}"]
        setting = {"preset": "fedmoa-tiny", "method": "fedmoa", "personal_rounds": 0, "objectives": objectives}
        setting |= {"client_objectives": ["code=accuracy"]}  # which has no running values
        setting |= {"batch_size": 256, "rounds": 24} | changes
        jobs[name + variant] = [setting | {"seed": seed} for seed in seeds]
    found = lab.groups("saturation", jobs)
    for name, rows in found.items():
        for row in rows:
            row["fall"] = 0.5 - row["lambda_auxiliary"]  # from the preference's share
        lines.append([name, *(cell(rows, f) for f in ("reward_auxiliary@0", "reward_auxiliary", "zero_spread_auxiliary",
                                                      "lambda_auxiliary", "fall", "accuracy"))])  # fmt: skip
        for panel, kind in zip(drawn, ("lambda", "reward", "zero_spread"), strict=True):
            points = [interval(column(rows, f"{kind}_auxiliary@{i}")) for i in range(EIGHTHS)]
            panel[name] = (x, *zip(*points, strict=True))
    for variant in variants:
        rows, control = found["one_step" + variant], found["six_steps" + variant]
        gap, half, p = paired(rows, control, "fall")
        ratio = np.mean(column(rows, "fall")) / np.mean(column(control, "fall"))
        notes.append(f"by {number(gap)} ± {number(half)} more, {ratio:.1f} times as much (p {p:.2g}){variant}")
    head = ["auxiliary", "its reward, first eighth", "last eighth", "groups of equal reward", "its share, last eighth",
            "fall of the share, from 0.5", "accuracy"]  # fmt: skip
    note = f"{len(seeds)} seeds from {seeds[0]}; means over the clients of mathematics. "
    note += f"The saturated one's share falls more than the control's: {'; '.join(notes)}."
    show(lab.results, "saturation", head, lines, note)
    titles = ("λ of the auxiliary", "its reward", "groups of equal reward")
    contents = [plots.Panel("eighth of the rounds", y, "", lines) for y, lines in zip(titles, drawn, strict=True)]
    plots.panels(contents, lab.results / "saturation.png", note=BARS)
