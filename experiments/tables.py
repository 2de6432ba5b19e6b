"""From rows to statements: intervals, paired tests, tables in Markdown. [ours]

A row holds the settings and figures of one run, a group the rows of one label, a run per seed. Over n seeds ± is half a
95 % interval, t₀.₉₇₅,ₙ₋₁ · s / √n. Groups are compared by the paired t-test, adjusted after Holm (1979).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

NOTE = (
    "± is half a 95 % interval over the seeds. In brackets are two p of the paired t-test, plain and after Holm over "
    "the lines of a column. A figure that is 0 by construction is not compared."
)
Row = dict[str, Any]
Groups = dict[str, list[Row]]  # rows by label


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval (Student's t), NaN for a single value."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def paired(a: Sequence[Row], b: Sequence[Row], figure: str) -> tuple[float, float, float]:
    """Mean of a − b paired by seed, half-width of its 95 % interval, p of the paired t-test; NaN if nothing varies."""
    subtrahend = {row["seed"]: row[figure] for row in b}
    d = np.array([row[figure] - subtrahend[row["seed"]] for row in a])
    if len(d) < 2 or np.ptp(d) == 0.0:
        return float(d.mean()), math.nan, math.nan
    return *interval(d), float(stats.ttest_1samp(d, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; a NaN stays NaN, and still counts as a test."""
    adjusted, running = [math.nan] * len(p_values), 0.0
    for step, i in enumerate(np.argsort(p_values)):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = math.nan if math.isnan(p_values[i]) else running
    return adjusted


def measured(rows: Sequence[Row], figure: str) -> bool:
    """Whether any row has this figure and it is not 0; one that is always 0 is so by construction."""
    return any(abs(row.get(figure, math.nan)) > 1e-12 for row in rows)


def number(value: float, sign: str = "") -> str:
    """Three significant digits below 0.1, three decimals below 100, else an integer; NaN is –. sign: "+" to show it."""
    form = ".3g" if abs(value) < 0.1 else ".3f" if abs(value) < 100 else ",.0f"
    return "–" if math.isnan(value) else format(value, sign + form)


def cell(rows: Sequence[Row], figure: str) -> str:
    """mean ± half the 95 % interval; the mean alone for fewer than three seeds, or if only some of the rows have it."""
    values = [row[figure] for row in rows if not math.isnan(row.get(figure, math.nan))]
    if not values:
        return "–"
    mean, half = interval(values)
    if len(values) < len(rows):
        return f"{number(mean)} ({len(values)} of {len(rows)})"
    alike = len({row["seed"] for row in rows}) < 3 or not half > 1e-12
    return number(mean) if alike else f"{number(mean)} ± {number(half)}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table. Figures that head a column lose their underscores."""
    head = [text.replace("_", " ") for text in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def means(groups: Groups, figures: Sequence[str]) -> str:
    """A table with a line per group and a column per figure."""
    return markdown(["", *figures], [[label, *(cell(rows, f) for f in figures)] for label, rows in groups.items()])


def differences(groups: Groups, figures: Sequence[str], pairs: Sequence[tuple[str, str]]) -> str:
    """A table with a line per pair (a, b) and a column per figure: a − b ± half its 95 % interval (p; p after Holm)."""
    columns = []
    for figure in figures:
        # a column's tests are those of the pairs in which both groups have the figure
        family = [pair for pair in pairs if all(measured(groups[label], figure) for label in pair)]
        tests = [paired(groups[a], groups[b], figure) for a, b in family]
        cells = dict.fromkeys(pairs, "–")
        for pair, (d, half, p), corrected in zip(family, tests, holm([p for *_, p in tests]), strict=True):
            cells[pair] = f"{number(d, '+')} ± {number(half)} ({p:.2g}; {corrected:.2g})"
        columns.append(cells.values())
    lines = [[f"{a} − {b}", *cells] for (a, b), *cells in zip(pairs, *columns, strict=True)]
    return markdown(["difference", *figures], lines)
