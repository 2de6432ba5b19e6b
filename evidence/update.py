"""What the update is worth: groups of responses against the critic, at equal KL too, and what is left to the front.

Experiments as those of `experiments.py`. [ours]
"""

import numpy as np

from app import plots
from evidence import rules
from evidence.lab import NAMES, Lab, front_of, sweep_volume
from evidence.rules import COMMON, KL_COEFS, PREFERENCES, ROUNDS
from evidence.statistics import BARS, LABELS, cell, column, gap_at_equal_kl, interval, number, paired, show

COLD = 0.5  # a sampling temperature, half of the training's


def groups(lab: Lab) -> None:
    """The critic against groups of 4 responses, at equal rollouts: at the common setting, and at equal KL."""
    swept = ("firm", "firm groups", "linear", "linear groups")  # over κ
    labels = [f"{m}{update}" for m in ("firm", "firm β=1", "firm β=10", "mgda", "linear") for update in ("", " groups")]
    setting, seeds, common = {"rounds": ROUNDS} | COMMON, lab.some(rules.seeds_of(10)), COMMON["kl_coef"]
    jobs = {
        (label, kl_coef): [setting | rules.variant(label) | {"kl_coef": kl_coef, "seed": s} for s in seeds]
        for label in labels for kl_coef in KL_COEFS
        if kl_coef == common or label in swept
    }  # fmt: skip
    rows, lines = lab.groups("groups", jobs), []
    figures = (*NAMES, "worst_gain", "kl", *(f"explained_variance_{name}" for name in NAMES))
    for label in labels:
        own, test = rows[label, common], ("", "")
        if label != rules.with_critic(label):
            gain, half, p = paired(own, rows[rules.with_critic(label), common], "worst_gain")
            test = (f"{gain:+.3f} ± {number(half)}", f"{p:.2g}")
        lines.append([label, *(cell(own, figure) for figure in figures), *test])
    head = ["method", *(LABELS[figure] for figure in figures), "worst gain, less the critic's", "p"]
    note = (
        f"{len(seeds)} seeds from {seeds[0]}, paired; ± is half a 95 % interval; equal rollouts. Explained variance: "
    )
    note += (
        "of Monte Carlo returns by the critic before it is fitted to them, pooled over clients, mean of rounds 4 to 16."
    )
    show(lab.results, "groups", head, lines, note)
    at_equal_kl(lab, {label: [rows[label, k] for k in KL_COEFS] for label in swept})


def at_equal_kl(lab: Lab, curves: dict[str, list[list[dict]]]) -> None:
    """The worst gain against KL: a curve over `KL_COEFS` per label, and how far two such curves lie apart."""
    lines, table = {}, []
    for label, curve in curves.items():
        gains = [interval(column(rows, "worst_gain")) for rows in curve]
        lines[label] = ([np.mean(column(rows, "kl")) for rows in curve], *zip(*gains, strict=True))
        critic = rules.with_critic(label)
        if label != critic:
            low, high, gap, *interval_of_gap = gap_at_equal_kl(curve, curves[critic])
            gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(gap, *interval_of_gap)
            table.append([f"{label} − {critic}", f"{low:.2f} to {high:.2f}", gap])
    panel = plots.Panel("KL to the base model (nats per response)", LABELS["worst_gain"], "", lines)
    plots.panels([panel], lab.results / "groups.png", note=BARS)
    note = f"Curves over κ = {', '.join(f'{k:g}' for k in KL_COEFS)}, of seed means joined by straight lines, compared "
    note += (
        "over the KL that both reach; in brackets the 95 % bootstrap interval, over seeds, the same for both curves."
    )
    show(lab.results, "equal_kl", ["worst normalised gain", "KL", "mean difference at equal KL"], table, note)


def cooled(lab: Lab, sweeps: dict[int, list[dict]]) -> None:
    """What keeps a sweep (each seed's rows) from the front: its policies as trained, and sampled at `COLD`."""
    preferences, kinds, volumes = lab.some(PREFERENCES), {"as trained": "", "colder": "cold_"}, []
    for row in (row for rows in sweeps.values() for row in rows):
        for kind in kinds.values():
            point = [row[f"{kind}{name}"] for name in NAMES]
            row[f"{kind}distance"] = float(np.linalg.norm(front_of(row) - point, axis=1).min())
    for label, kind in kinds.items():
        of_seeds = [{"hv": sweep_volume(rows, kind)} for rows in sweeps.values()]
        volumes.append(f"{cell(of_seeds, 'hv')} {label}")
    figures = [*NAMES, "kl", "distance", *(f"cold_{figure}" for figure in (*NAMES, "distance"))]
    points = [[rows[i] for rows in sweeps.values()] for i in range(len(preferences))]
    lines = [[f"{p:g}", *(cell(of_p, f) for f in figures)] for p, of_p in zip(preferences, points, strict=True)]
    head = ["p of helpful", *NAMES, "KL", "distance to the front", *(f"{name}, temperature {COLD:g}" for name in NAMES)]
    note = (
        f"{len(sweeps)} seeds from {min(sweeps)}; raw units; ± is half a 95 % interval; the distance is to the nearest "
    )
    note += f"vertex of the exact front. Normalised hypervolume: {', '.join(volumes)}."
    show(lab.results, "cooled", [*head, "distance"], lines, note)
