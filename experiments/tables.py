"""From rows to statements: intervals, paired tests, tables in Markdown. [ours]

A row holds the settings and figures of one run, a group the rows of one label. Over n seeds ± is half a 95 % interval,
t₀.₉₇₅,ₙ₋₁ · s / √n. Groups are compared by the paired t-test, adjusted after Holm (1979).

If a group has runs at several KL coefficients κ, differences are at equal KL: of each seed both figures are read at the
middle of the log KLs that both methods reached, by linear interpolation between runs, if there are such KLs.
"""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from app import plots

NOTE = (
    "In brackets: p of the paired t-test, p after Holm over the lines of a column, and the least true difference that "
    "the plain test finds in 80 % of cases; then how many seeds have a positive one; at equal κ: over all seeds and κ."
)
LABELS = {"kl": "KL (nats per response)", "worst_gain": "worst gain (deviations)", "log_10_epsilon": "log₁₀ ε"}
FELL = -0.3  # deviations of the base policy's reward
Row = dict[str, Any]
Groups = dict[str, list[Row]]  # rows by label


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval (Student's t), NaN for a single value."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def at_equal_kl(a: Sequence[Row], b: Sequence[Row], figure: str) -> tuple[list[float], np.ndarray, list[float]]:
    """By seed: KLs and a − b, of its only runs or at the middle of the log KLs of both; a − b of the means over κ."""
    kls, differences, plain = [], [], []
    for seed in dict.fromkeys(row["seed"] for row in a):
        of = [[(math.log(row.get("kl") or 1.0), row[figure]) for row in rows if row["seed"] == seed] for rows in (a, b)]
        (kl_a, of_a), (kl_b, of_b) = (zip(*sorted(points), strict=True) for points in of)
        alone = len(kl_a) == len(kl_b) == 1
        plain.append(float(np.mean(of_a) - np.mean(of_b)))
        low, high = max(kl_a[0], kl_b[0]), min(kl_a[-1], kl_b[-1])
        if alone or low <= high:
            at = (low + high) / 2
            kls += [] if alone else [math.exp(at)]
            differences.append(float(np.interp(at, kl_a, of_a) - np.interp(at, kl_b, of_b)))
    return kls, np.array(differences), plain


def paired(d: np.ndarray) -> tuple[float, float, float, float]:
    """Of differences d by seed: mean, half-width of its 95 % interval, p of the paired t-test, and the least true
    difference that the test finds with 80 %. NaN if nothing varies.
    """
    if len(d) < 2 or np.ptp(d) == 0.0:
        return float(d.mean()) if len(d) else math.nan, math.nan, math.nan, math.nan
    mean, half = interval(d)
    seen = half * (1 + stats.t.ppf(0.8, len(d) - 1) / stats.t.ppf(0.975, len(d) - 1))
    return mean, half, float(stats.ttest_1samp(d, 0.0).pvalue), float(seen)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; a NaN stays NaN, and still counts as a test."""
    adjusted, running = [math.nan] * len(p_values), 0.0
    for step, i in enumerate(np.argsort(p_values)):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = math.nan if math.isnan(p_values[i]) else running
    return adjusted


def number(value: float, sign: str = "") -> str:
    """Three significant digits below 0.1, three decimals below 100, else an integer; NaN is –. sign: "+" to show it."""
    form = ".3g" if abs(value) < 0.1 else ".3f" if abs(value) < 100 else ",.0f"
    return "–" if math.isnan(value) else format(value, sign + form)


def cell(rows: Sequence[Row], figure: str) -> str:
    """mean ± half the 95 % interval; the mean alone for fewer than three seeds, or if only some of the rows have it.

    A figure NAME:median or NAME:least is that of the seeds, NAME:fell the share of them below FELL.
    """
    figure, _, statistic = figure.partition(":")
    values = [row[figure] for row in rows if not math.isnan(row.get(figure, math.nan))]
    if not values:
        return "–"
    if statistic:
        of_seeds = {"median": np.median, "least": np.min, "fell": lambda values: np.mean(np.array(values) < FELL)}
        return number(of_seeds[statistic](values))
    mean, half = interval(values)
    if len(values) < len(rows):
        return f"{number(mean)} ({len(values)} of {len(rows)})"
    alike = len({row["seed"] for row in rows}) < 3 or not half > 1e-12
    return number(mean) if alike else f"{number(mean)} ± {number(half)}"


def by_kappa(groups: Groups) -> Groups:
    """A group for each κ of a label that has several."""
    apart: Groups = {}
    for label, rows in groups.items():
        kappas = {row.get("kl_coef") for row in rows}
        for row in rows:
            apart.setdefault(f"{label} @ κ = {row['kl_coef']:g}" if len(kappas) > 1 else label, []).append(row)
    return apart


def mean_line(points: Sequence[Sequence[Row]], x: str, y: str) -> tuple:
    """A line of a `Panel`: the means over the seeds of x and y, with half the 95 % interval of y."""
    means = [(np.mean([row[x] for row in rows]), *interval([row[y] for row in rows])) for rows in points if rows]
    return tuple(np.reshape(means, (-1, 3)).T)


def picture(groups: Groups, x: str, ys: Sequence[str], path: Path) -> None:
    """Figures by another: a panel for each y and eight lines. Labels that differ behind " @ " are a line's points."""
    lines: dict[str, list] = {}
    for label, rows in groups.items():
        lines.setdefault(label.partition(" @ ")[0], []).append([row for row in rows if x in row])
    some = [list(lines.items())[i : i + 8] for i in range(0, len(lines), 8)]
    names = {figure: LABELS.get(figure, figure.replace("_", " ")) for figure in (x, *ys)}
    contents = [(y, {label: mean_line(points, x, y) for label, points in each}) for y, each in product(ys, some)]
    plots.panels([plots.Panel(names[x], names[y], "", drawn) for y, drawn in contents], path)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table. Figures that head a column lose their underscores."""
    head = [text.replace("_", " ") for text in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def means(groups: Groups, figures: Sequence[str]) -> str:
    """A table with a line per group and a column per figure."""
    return markdown(["", *figures], [[label, *(cell(rows, f) for f in figures)] for label, rows in groups.items()])


def differences(groups: Groups, figures: Sequence[str], pairs: Sequence[tuple[str, str]]) -> str:
    """A table with a line per pair (a, b) and a column per figure: a − b ± half its 95 % interval, and as NOTE says."""
    lines = [[f"{a} − {b}"] for a, b in pairs]
    for figure in figures:
        found = [at_equal_kl(groups[a], groups[b], figure) for a, b in pairs]
        tests = [paired(d) for _, d, _ in found]
        corrections = holm([p for _, _, p, _ in tests])
        for line, (kls, d, plain), (mean, half, p, seen), holms in zip(lines, found, tests, corrections, strict=True):
            n = len(plain)
            cell = f"{number(mean, '+')} ± {number(half)} ({p:.2g}; {holms:.2g}; {number(seen)})"
            cell += f", {(d > 0).sum()} of {n} up" if len(d) == n else f", common KL on {len(d)} of {n} seeds"
            cell += f", at KL {np.mean(kls):.1f}" if kls else ""
            mean, half = interval(plain)
            line.append(cell + (f"; at equal κ {number(mean, '+')} ± {number(half)}" if kls or len(d) < n else ""))
    return markdown(["difference", *figures], lines)
