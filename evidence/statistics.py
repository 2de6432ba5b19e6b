"""From rows to statements: intervals, paired tests, tables, curves. [ours]

A row holds one run's settings and figures, see `lab.py`. Over n seeds ± is half a 95 % interval, t₀.₉₇₅,ₙ₋₁ · s / √n.
Two methods are compared by the differences of their runs with equal seeds (equal splits and adapters; equal prompts
and uniforms too where groups are of one size), with the paired t-test, and p-values are adjusted after Holm (1979) over
the methods of one figure. What a method has by construction and not by measurement, a figure that is 0 in every run
(fixed weights never move), is not drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from app import plots

BARS = "bars: 95 % intervals over the seeds"
LABELS = {
    "helpful": "helpful, held out (raw units)", "harmless": "harmless, held out (raw units)",
    "normalised_helpful": "normalised gain in helpful", "normalised_harmless": "normalised gain in harmless",
    "worst_gain": "worst normalised gain", "kl": "KL (nats per response)", "disagreement": "disagreement ‖λ_c − λ̄‖",
    "drift": "drift / step", "movement": "movement of λ̄ per round", "dispersion": "dispersion ‖θ_c − θ̄‖",
    "averaging_residual": "averaging residual / ‖mean(ΔW)‖", "same_disagreement": "disagreement / at β = 0, same Grams",
    "same_drift": "drift / at β = 0, same Grams", "twin_disagreement": "disagreement in λ₁ − λ₃",
    "same_twin_disagreement": "disagreement in λ₁ − λ₃ / at β = 0, same Grams", "upload_payload": "payload up (bytes)",
    "upload_adapters": "payload up / d", "download_adapters": "payload down / d", "upload_header": "header up",
    "download_header": "header down", "upload_scalars": "scalars up", "download_scalars": "scalars down",
    "trace_first": "tr G, first quarter of the rounds", "trace_last": "tr G, last quarter",
    "half_cosine": "cosine of two half-batches", "error": "‖λ − reference‖",
    "error_batch": "‖λ − reference‖, one batch", "error_cross": "‖λ − reference‖, two halves",
    "error_constant": "‖λ − reference‖, λ = p", "lambda1_batch": "λ₁, one batch", "lambda1_cross": "λ₁, two halves",
    "lambda1_reference": "λ₁, reference", "stationarity": "stationarity ‖Jᵀλ‖²",
    "gap_small": "share of steps with a gap ≤ 1e-6", "net_roughness_helpful": "roughness of helpful, net of sampling",
    "net_roughness_harmless": "roughness of harmless, net of sampling",
    "explained_variance_helpful": "explained variance of helpful", "explained_variance_harmless": "… of harmless",
}  # fmt: skip


def column(rows: list[dict], figure: str) -> list[float]:
    """One figure of every row."""
    return [row[figure] for row in rows]


def where(rows: list[dict], **wanted) -> list[dict]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def measured(groups: dict, figure: str) -> dict:
    """The groups of rows that have this figure, and not 0 in every run: that is so by construction only."""
    return {label: rows for label, rows in groups.items() if any(abs(x) > 1e-12 for x in column(rows, figure))}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval (Student's t); NaN for a single value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def paired(a: list[dict], b: list[dict], figure: str) -> tuple[float, float, float]:
    """Mean of a − b paired by seed, half-width of its 95 % interval, p-value of the paired t-test."""
    subtrahend = {row["seed"]: row[figure] for row in b}
    d = np.array([row[figure] - subtrahend[row["seed"]] for row in a])
    if len(d) < 2 or np.ptp(d) == 0.0:
        return float(d.mean()), float("nan"), float("nan")  # nothing to test
    return *interval(d), float(stats.ttest_1samp(d, 0.0).pvalue)


def gap_at_equal_kl(ours: list[list[dict]], other: list[list[dict]], draws: int = 2000) -> tuple[float, ...]:
    """How much more worst gain ours has than the other at equal KL: (lowest KL, highest KL, gap, its 95 % interval).

    Each is a curve, a group of rows per point with the same seeds in the same order: means of gain over means of KL,
    joined by straight lines. The gap is the mean over the KL that both curves reach, NaN where there is none; its
    interval is that of a bootstrap over seeds, drawn alike for all points of both curves.
    """

    def gap(seeds: np.ndarray) -> tuple[float, float, float]:
        kl, gain = (np.array([[np.array(column(rows, f))[seeds].mean() for rows in curve] for curve in (ours, other)])
                    for f in ("kl", "worst_gain"))  # fmt: skip
        low, high = kl.min(1).max(), kl.max(1).min()
        x = np.linspace(low, high, 101) if low < high else np.array([np.nan])
        curve = [np.interp(x, k[np.argsort(k)], g[np.argsort(k)]) for k, g in zip(kl, gain, strict=True)]
        return low, high, float((curve[0] - curve[1]).mean())

    n, rng = len(ours[0]), np.random.default_rng(0)
    spread = [gap(rng.integers(n, size=n))[2] for _ in range(draws)]
    return *gap(np.arange(n)), *np.quantile([g for g in spread if g == g] or [np.nan], [0.025, 0.975])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; a NaN stays NaN, and still counts as a test."""
    order, adjusted, running = np.argsort(p_values), [float("nan")] * len(p_values), 0.0
    for step, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = running if p_values[i] == p_values[i] else float("nan")
    return adjusted


def against(groups: dict[str, list[dict]], ours: str, figure: str) -> dict[str, tuple[str, str]]:
    """For every group: the paired difference ours − it with its 95 % interval, and the p-value after Holm.

    Holm's family is the baselines: other settings of our own method (labels like `firm β=1`) are not tested.
    """
    tests = {label: paired(groups[ours], rows, figure) for label, rows in groups.items() if label != ours}
    family = [label for label in tests if label.split()[0] != ours.split()[0]]
    corrected = dict(zip(family, holm([tests[label][2] for label in family]), strict=True))
    return {ours: ("", "")} | {
        label: (f"{number(d)} ± {number(half)}", f"{corrected[label]:.2g}" if label in corrected else "")
        for label, (d, half, _) in tests.items()
    }


def number(value: float) -> str:
    """Three significant digits below 0.1, three decimals below 100, else an integer; an int as it is, NaN as –."""
    if value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def cell(rows: list[dict], figure: str) -> str:
    """mean ± half the 95 % interval over the seeds."""
    if len(rows) == 1:
        return number(rows[0][figure])
    mean, half = interval(column(rows, figure))
    return f"{number(mean)} ± {number(half)}" if half > 0 else number(mean)


def show(results: Path, name: str, head: Sequence[str], lines: Sequence[Sequence], note: str = "") -> None:
    """Print a table in Markdown, and keep it as NAME.md."""
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))
    text += f"\n\n{note}\n" if note else "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text(text, "utf-8")
    print(f"\n{name}\n{text}")


def table(
    results: Path, name: str, keys: Sequence[str], groups: dict[tuple, list[dict]], figures: Sequence[str],
    note: str = "",
) -> None:  # fmt: skip
    """One line per group: what it is, without what is the same of all, then a cell per figure."""
    differ = [i for i in range(len(keys)) if len({key[i] for key in groups}) > 1]
    head = [*(keys[i] for i in differ), *(LABELS.get(figure, figure) for figure in figures)]
    lines = [[*(key[i] for i in differ), *(cell(rows, f) for f in figures)] for key, rows in groups.items()]
    seeds = len(next(iter(groups.values())))
    note = f"{seeds} seeds; ± is half a 95 % interval. {note}" if seeds > 1 else note
    show(results, name, head, lines, note.strip())


def curves(groups: dict[tuple, list[dict]], x_label: str, figures: Sequence[str]) -> list[plots.Panel]:
    """A panel per figure; a group (label, x) is one point of the line `label`: its mean with its 95 % interval.

    The values of x stand at equal distances in the order of the groups, and lines a little apart where they share an x,
    so that the intervals of one do not hide those of another.
    """
    panels = []
    for figure in figures:
        lines: dict[str, tuple[list, list, list]] = {}
        drawn = measured(groups, figure)
        labels, ticks = (list(dict.fromkeys(key[i] for key in drawn)) for i in (0, 1))
        for (label, x), rows in drawn.items():
            beside = labels.index(label) - (len(labels) - 1) / 2 if len(drawn) > len(ticks) else 0
            point = (ticks.index(x) + 0.06 * beside, *interval(column(rows, figure)))
            for values, value in zip(lines.setdefault(label, ([], [], [])), point, strict=True):
                values.append(value)
        panels.append(plots.Panel(x_label, "", LABELS.get(figure, figure), lines, ticks=list(map(str, ticks))))
    return panels


def points(groups: dict[str, list[dict]], figures: Sequence[str]) -> list[plots.Panel]:
    """A panel per figure, one point with its 95 % interval per group."""
    return curves({(label, label): rows for label, rows in groups.items()}, "", figures)
