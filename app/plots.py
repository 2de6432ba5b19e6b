"""The pictures. The only module that imports matplotlib; every function takes numbers and writes one PNG. [ours]

A method has one colour and one marker in every picture (`style`): a pair by its place in the registry. Colours stay
apart for colour-blind readers: Okabe and Ito's first, then Tol's "muted". More methods get other pairs of the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from app.files import write_bytes
from methods import METHODS

COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#661100", "#01665E", "#332288", "#EECC66",
    "#FF00FF", "#882255", "#44AA99", "#CC6677", "#117733", "#88CCEE", "#999933", "#AA4499",
]  # fmt: skip
MARKERS = "osD^vP*Xph<>"
FRONT, BASE = "exact Pareto front", "base model"
BLACK = {
    FRONT: {"color": "black", "linestyle": "-"},
    BASE: {"color": "black", "marker": "x", "markersize": 9, "markeredgewidth": 2, "linestyle": ""},
}


def style(label: str, position: int) -> dict[str, Any]:
    """Colour, marker and line of one label, as matplotlib's keyword arguments.

    A variant, `firm beta=1`, has its method's pair on a broken line with a hollow marker; other labels go by position.
    """
    if label in BLACK:
        return BLACK[label] | {"label": label}
    name, _, variant = label.replace(",", "").partition(" ")
    known = name in METHODS
    turn, i = divmod(list(METHODS).index(name) if known else position + len(METHODS), len(COLOURS))
    marker = MARKERS[(i + turn) % len(MARKERS)]
    drawn = {"color": COLOURS[i], "marker": marker, "markersize": 8 if marker == "*" else 5, "label": label}
    if not (known and variant):
        return drawn | {"linestyle": "-"}
    filled = ("none", "left", "bottom", "right", "top")[position % 5]
    return drawn | {"linestyle": ("--", ":", "-.")[position % 3], "fillstyle": filled, "markerfacecoloralt": "white"}


@dataclass
class Panel:
    """One pair of axes: `lines` maps a label to (x values, y values, half-widths of y or None, perhaps those of x).

    `limits` are those of y; `log` makes both axes logarithmic; `dots` leaves out the
    lines between the points; `notes` are texts at points, in a label's order.
    """

    x: str
    y: str
    title: str
    lines: dict[str, tuple]
    limits: tuple[float | None, float | None] = (None, None)
    dots: bool = False
    log: bool = False
    notes: dict[str, Sequence[str]] = field(default_factory=dict)


def panels(contents: Sequence[Panel], path: Path, size: float = 3.8) -> None:
    """Lines with error bars, side by side, each panel `size` inches wide; one legend under them all."""
    columns = 2 if len(contents) == 4 else min(3, len(contents))
    rows = -(-len(contents) // columns)
    inches = (size * columns, 0.9 * size * rows)
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, layout="constrained")
    for ax in axes.flat[len(contents) :]:
        ax.set_visible(False)
    labels, handles = list(dict.fromkeys(label for panel in contents for label in panel.lines)), {}
    for ax, panel in zip(axes.flat, contents, strict=False):
        for label, (x, y, half, *wide) in panel.lines.items():
            drawn = style(label, labels.index(label))
            if len(x) == 1 or (panel.dots and label != FRONT):
                drawn |= {"linestyle": ""}
            bars = {"yerr": half, "xerr": wide[0] if wide else None, "capsize": 2, "elinewidth": 0.8}
            handles[label] = ax.errorbar(x, y, **bars, clip_on=panel.log, **drawn)  # else whole at the limits
            for text, *point in zip(panel.notes.get(label, ()), x, y, strict=False):
                ax.annotate(text, point, xytext=(5, 5), textcoords="offset points", fontsize=7, color=drawn["color"])
        if panel.x.startswith("round"):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.log:
            ax.set(xscale="log", yscale="log")
        ax.set(ylim=panel.limits, xlabel=panel.x, ylabel=panel.y)
        ax.set_title(panel.title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    if len(labels) > 1:
        ncol = min(len(labels), 2 * columns)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=ncol, frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150, bbox_inches="tight")
    write_bytes(path, picture.getvalue())
    plt.close(figure)


def curve(metrics: Sequence[dict], key: str, done: int = 1, error: str | None = None) -> tuple:
    """A line of a `Panel`: a figure by round, of the rounds that have it, and its error."""
    measured = [m for m in metrics if key in m]
    return [m["round"] + done for m in measured], [m[key] for m in measured], error and [m[error] for m in measured]


def by_round(metrics: Sequence[dict], names: Sequence[str], out: Path) -> None:
    """A run's rewards.png and weights.png: rewards on training and held-out prompts, and KL; λ and disagreement."""
    contents, training, held_out = [], "training prompts", "held-out prompts ± standard error"
    for name in names:
        lines = {training: curve(metrics, f"reward/{name}", 0)}  # by the adapter that the round began with
        lines |= {held_out: curve(metrics, f"held_out/{name}", error=f"held_out_error/{name}")}
        lines = {label: line for label, line in lines.items() if line[0]}  # of clients elsewhere no reward is known
        contents += [Panel("rounds done", "mean reward (raw units)", name, lines)] * bool(lines)
    kl = {training: curve(metrics, "kl", 0)}
    contents.append(Panel("rounds done", "KL per response (nats)", "distance from the base model", kl))
    panels(contents, out / "rewards.png")
    if not any("lambda/disagreement" in m for m in metrics):
        return
    weights = {name: curve(metrics, f"lambda/{name}") for name in names}
    apart = {"disagreement": curve(metrics, "lambda/disagreement")}
    panels([
        Panel("round", "λ, mean over clients", "Weights of the objectives", weights, limits=(-0.02, 1.02)),
        Panel("round", "mean distance from λ̄", "Disagreement between clients", apart, limits=(0.0, None)),
    ], out / "weights.png")  # fmt: skip


def predictor(metrics: list[dict], start: dict[str, float], out: Path) -> None:
    """A predictor's curves.png; start: each side's alignment before training."""
    starts = [{"round": -1, **{f"alignment/{side}": value for side, value in start.items()}}]
    lines = {side: curve(starts + metrics, f"alignment/{side}") for side in start}
    losses = {side: curve(metrics, f"loss/{side}") for side in start}
    panels([
        Panel("round", "alignment, unseen groups", "How well unseen groups are known", lines),
        Panel("round", "loss", "Training loss, mean over clients and steps", losses),
    ], out / "curves.png")  # fmt: skip


def trade_off(rows: dict[str, list[dict]], front: np.ndarray | None, names: Sequence[str], path: Path) -> None:
    """Where runs stand, by label, from their summaries; front [K, 2] is the exact one if it is known.

    Every other objective against the first one, and the worst-served objective's gain against the KL.
    """

    def of(summaries: Sequence[dict[str, Any]], stage: str, key: str) -> np.ndarray:  # [n, M]
        return np.array([[each["objectives"][name][stage][key] for name in names] for each in summaries])

    first = next(iter(rows.values()))
    base, unit, axis = of(first, "before", "mean")[0], of(first, "calibration", "scale")[0], "base-policy deviations"
    if front is not None:
        unit, axis = front.max(0) - base, "1 is the ideal point"
    ps = [summary["preference"] for summary in first] if len(first) > 1 else []
    shown = {0, len(ps) // 2, len(ps) - 1}
    notes = {next(iter(rows)): [f"p = {p[0]:g}" if k in shown else "" for k, p in enumerate(ps)]}
    contents, gains = [], {BASE: ([0.0], [0.0], None)}
    for label, summaries in rows.items():
        gain, error = of(summaries, "gain", "mean") / unit, of(summaries, "gain", "standard_error") / unit  # [n, M]
        worst = np.arange(len(gain)), gain.argmin(1)
        kl, kl_error = ([s["kl"][key] for s in summaries] for key in ("mean", "standard_error"))
        gains[label] = (kl, gain[worst], error[worst], kl_error)
    for j in range(1, len(names)):
        lines = {} if front is None else {FRONT: (*front.T, None)}
        lines[BASE] = ([base[0]], [base[j]], None)
        for label, summaries in rows.items():
            mean, error = (of(summaries, "after", key)[:, [0, j]].T for key in ("mean", "standard_error"))
            lines[label] = (*mean, error[1], error[0])
        axes = (f"{names[0]} (raw units)", f"{names[j]} (raw units)", "Bars: one standard error over held-out prompts")
        contents.append(Panel(*axes, lines, dots=len(names) > 2, notes=notes))
    axes = ("KL to the base model (nats per response)", f"worst gain ({axis})", "What the worst-served objective gains")
    contents.append(Panel(*axes, gains, dots=True, notes=notes))
    panels(contents, path, size=4.8)
