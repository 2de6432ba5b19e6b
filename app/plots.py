"""The pictures. The only module that imports matplotlib; every function takes numbers and writes one PNG. [ours]

A method has one colour and one marker in every picture, whatever else is drawn (`style`). Colours stay apart for
colour-blind readers: those of methods begin with Okabe and Ito's, all others are Tol's "muted".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from app.files import atomically
from settings import METHODS

METHOD_NAMES = list(METHODS)
METHOD_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#661100", "#01665E", "#332288"]
METHOD_COLOURS += ["#EECC66", "#FF00FF"]
COLOURS = ["#882255", "#44AA99", "#332288", "#CC6677", "#117733", "#88CCEE", "#999933", "#AA4499", "#DDCC77", "#222222"]
MARKERS = "osD^vP*Xph<>"
BLACK = {"color": "black"}  # the exact front, and the base model
BASE = BLACK | {"marker": "x", "markersize": 9, "markeredgewidth": 2, "linestyle": "", "label": "base model"}


def style(label: str, position: int) -> dict:
    """Colour, marker and line of one label, as matplotlib's keyword arguments.

    A label that is a method's name has that method's style, whatever its position among the labels of a picture. A
    variant of a method, `firm β=1`, has its colour, darker or not, and its marker, hollow or half hollow, on a broken
    line, by position. Any other label (an objective, a setting) has a colour and a marker by position.
    """
    name, _, variant = label.partition(" ")
    known = name in METHOD_NAMES
    palette = METHOD_COLOURS if known else COLOURS
    turn, i = divmod(METHOD_NAMES.index(name) if known else position, len(palette))  # beyond: other pairs of the same
    colour, marker = palette[i], MARKERS[(i + turn) % len(MARKERS)]
    found = {"color": colour, "marker": marker, "markersize": 8 if marker == "*" else 5, "label": label}
    if not (known and variant):
        return found | {"linestyle": "-"}
    if position % 2:
        found["color"] = tuple(0.5 * channel for channel in to_rgb(colour))
    found["fillstyle"] = ("none", "left", "bottom", "right", "top")[position % 5]
    return found | {"linestyle": ("--", ":", "-.")[position % 3], "markerfacecoloralt": "white"}


def save(figure: plt.Figure, path: Path) -> None:
    """Write the PNG whole or not at all, and close the figure."""
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def tidy(ax: plt.Axes, x: str, y: str, title: str) -> None:
    """Axis labels, a light grid, no box."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def front(
    exact: np.ndarray, points: dict[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str], path: Path
) -> None:
    """Where policies stand before the exact Pareto front.

    exact [K, 2], the front as a polyline; points maps a label to (mean [2], standard error [2]), drawn in order and
    joined by an arrow from the first to the last.
    """
    figure, ax = plt.subplots(figsize=(5.2, 4.2))
    ax.plot(*exact.T, label="exact Pareto front", **BLACK)
    for j, (label, (mean, error)) in enumerate(points.items()):
        drawn = (
            BASE | {"ecolor": "0.7"} if label == BASE["label"] else style(label, j) | {"linestyle": "", "capsize": 2}
        )
        ax.errorbar(*mean, xerr=error[0], yerr=error[1], elinewidth=1, **drawn)
    first, *_, last = (mean for mean, _ in points.values())
    ax.annotate("", last, first, arrowprops={"arrowstyle": "->", "color": "0.5", "shrinkA": 6, "shrinkB": 6})
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)  # below: no point lies there
    tidy(ax, f"{names[0]} (raw units)", f"{names[1]} (raw units)", "Held-out prompts; bars are one standard error")
    save(figure, path)


@dataclass
class Panel:
    """One pair of axes: `lines` maps a label to (x values, y values, half-widths of y or None).

    With `ticks` x values are positions of these names; `diagonal` adds the line y = x; `limits` are those of y.
    """

    x: str
    y: str
    title: str
    lines: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]]
    ticks: Sequence[str] | None = None
    diagonal: bool = False
    limits: tuple[float | None, float | None] = (None, None)


def panels(contents: Sequence[Panel], path: Path, legend: bool = True, note: str = "") -> None:
    """Lines with error bars, side by side; one legend under them all for labels of several panels; a note above."""
    columns = 2 if len(contents) == 4 else min(3, len(contents))
    rows, named = -(-len(contents) // columns), [panel.ticks or () for panel in contents]
    long = any(sum(map(len, ticks)) > 26 for ticks in named)  # names then, in no order that a line could follow
    size = (3.8 * columns, (3.2 + long * 0.06 * max(len(tick) for ticks in named for tick in ("", *ticks))) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(contents) :]:
        ax.set_visible(False)
    labels = list(dict.fromkeys(label for panel in contents for label in panel.lines))
    handles = {}
    for ax, panel in zip(axes.flat, contents, strict=False):
        if panel.diagonal:
            ax.axline((0, 0), slope=1, color="0.6", linestyle="--", linewidth=1)
        for label, (x, y, half) in panel.lines.items():
            drawn = style(label, labels.index(label)) | ({} if len(x) > 1 and not long else {"linestyle": ""})
            handles[label] = ax.errorbar(x, y, yerr=half, capsize=3, clip_on=False, **drawn)  # whole at limits
        if panel.ticks:
            turned = {"rotation": 40, "ha": "right"} if sum(map(len, panel.ticks)) > 26 else {}
            ax.set_xticks(range(len(panel.ticks)), panel.ticks, **turned)
            ax.set_xlim(-0.4, len(panel.ticks) - 0.6)
        elif panel.x.startswith("round"):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(*panel.limits)
        tidy(ax, panel.x, panel.y, panel.title)
    if note:
        figure.suptitle(note, fontsize=8, color="0.3")
    if legend and len(labels) > 1:
        ncol = min(len(labels), 2 * columns)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=ncol, frameon=False)
    save(figure, path)


def by_round(metrics: Sequence[dict], names: Sequence[str], out: Path) -> None:
    """A run's rewards.png and weights.png: every objective's mean raw reward on the clients' own batches, held out too
    where that was measured, and the KL paid for them; the objectives' weights λ, mean over clients and steps, and how
    far clients disagree.
    """

    def line(key: str, done: int = 1) -> tuple[list[int], list[float], None]:
        return [m["round"] + done for m in metrics], [m[key] for m in metrics], None

    measured = [m for m in metrics if "held_out_kl" in m]

    def reward(name: str) -> dict[str, tuple]:
        found = {"training prompts": line(f"reward/{name}", 0)}  # answered by the adapter that the round began with
        if measured:
            values, errors = ([m[f"{kind}/{name}"] for m in measured] for kind in ("held_out", "held_out_error"))
            found["held-out prompts ± standard error"] = ([m["round"] + 1 for m in measured], values, errors)
        return found

    weights = {name: line(f"lambda/{name}") for name in names}
    apart = {"disagreement": line("lambda/disagreement")}
    panels([
        *(Panel("rounds done", "mean reward (raw units)", name, reward(name)) for name in names),
        Panel(
            "rounds done", "KL per response (nats)", "distance from the base model", {"training prompts": line("kl", 0)}
        ),
    ], out / "rewards.png")  # fmt: skip
    panels([
        Panel("round", "λ, mean over clients", "Weights of the objectives", weights, limits=(-0.02, 1.02)),
        Panel("round", "mean distance from λ̄", "Disagreement between clients", apart, limits=(0.0, None)),
    ], out / "weights.png")  # fmt: skip


def by_task(metrics: Sequence[dict], primary: str, tasks: Sequence[str], out: Path) -> None:
    """A run's tasks.png: the primary's reward on the clients' own prompts, mean of every task; what it weighs with
    every client, and what every client counts in the average. tasks: each client's.
    """
    rounds = [m["round"] + 1 for m in metrics]

    def of(kind: str, chosen: Sequence[int]) -> tuple[list[int], list[float], None]:
        own = [[m.get(f"{kind}/client{c}", np.nan) for c in chosen] for m in metrics]
        return rounds, [float(np.nanmean(v)) if not np.isnan(v).all() else np.nan for v in own], None

    by = {task: [c for c, own in enumerate(tasks) if own == task] for task in sorted(set(tasks))}
    weights, shares = (
        {f"client {c}, {task}": of(kind, [c]) for task, own in by.items() for c in own}
        for kind in (f"lambda/{primary}", "share")
    )
    panels([
        Panel("round", f"mean {primary}", "On the clients' own prompts, by task",
              {task: of(f"reward/{primary}", own) for task, own in by.items()}),
        Panel("round", f"λ of {primary}", "What it weighs with the clients", weights),
        Panel("round", "share of the average", "What the clients weigh with the server", shares),
    ], out / "tasks.png")  # fmt: skip


def predictor(
    metrics: Sequence[dict], start: dict[str, float], groups: dict[str, dict], sides: Sequence[str], out: Path
) -> None:
    """A predictor's curves.png and groups.png: alignment and loss by round; every group's alignment beside two guesses.

    start: the alignment of each side before training; groups: a group's figures by side, as in summary.json.
    """
    lines, losses = {}, {}
    for side in sides:
        measured = [m for m in metrics if f"alignment/{side}" in m]
        scores = [start[side], *(m[f"alignment/{side}"] for m in measured)]
        lines[side] = ([0, *(m["round"] + 1 for m in measured)], scores, None)
        losses[side] = ([m["round"] + 1 for m in metrics], [m[f"loss/{side}"] for m in metrics], None)
    panels([
        Panel("round", "alignment, unseen groups", "How well unseen groups are known", lines),
        Panel("round", "loss", "Training loss, mean over clients and steps", losses),
    ], out / "curves.png")  # fmt: skip
    names = [shorten(name, 20, placeholder="…") + " *" * figures["unseen"] for name, figures in groups.items()]
    figure, ax = plt.subplots(figsize=(0.55 * len(names) + 2, 3.6), layout="constrained")
    shown = (*sides, "mean answer", "uniform")
    for i, side in enumerate(shown):
        x = np.arange(len(names)) + 0.8 * (i / len(shown) - 0.5) + 0.4 / len(shown)
        heights = [figures[side] for figures in groups.values()]
        ax.bar(x, heights, 0.8 / len(shown), color=COLOURS[i], label=side)
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    tidy(ax, "", "alignment", "Every group; * took no part in training")
    figure.legend(loc="outside lower center", ncol=len(shown), frameon=False)
    save(figure, out / "groups.png")


def pareto(
    groups: dict[str, dict[str, np.ndarray]], base: np.ndarray, exact: np.ndarray | None, names: Sequence[str],
    path: Path, gain: str = "worst normalised gain", over: str = "held-out prompts",
) -> None:  # fmt: skip
    """Trade-offs: every other objective against the first one, and the worst-served objective's gain against the KL.

    groups maps a label to its points in order of the preference p₁, if several: p [n]; mean and error [n, M] in raw
    units; kl, gain and their errors kl_error, gain_error [n], gain in the unit that the axis label `gain` states. over:
    what the errors, standard errors, are taken over. base [M] is the base model, exact [K, 2] the exact front. p stands
    at some points of the first label.
    """
    M, bars = len(names), f"bars: one standard error over {over}"
    figure, axes = plt.subplots(1, M, figsize=(4.8 * M, 4.2), layout="constrained", squeeze=False)
    *trades, last = axes[0]
    for j, ax in enumerate(trades, start=1):
        if exact is not None:
            ax.plot(*exact.T, label="exact Pareto front", **BLACK)
        ax.plot(base[0], base[j], **BASE)
        tidy(ax, f"{names[0]} (raw units)", f"{names[j]} (raw units)", f"Held-out prompts; {bars}" * (j == 1))
    last.plot(0, 0, **BASE)
    last.axhline(0, color="0.8", linewidth=1, zorder=0)
    tidy(last, "KL to the base model (nats per response)", gain, "What the worst-served objective gains; bars alike")
    for i, (label, group) in enumerate(groups.items()):
        drawn = style(label, i) | {"linewidth": 1}
        line = {} if M == 2 and len(group["kl"]) > 1 else {"linestyle": ""}
        for j, ax in enumerate(trades, start=1):
            (x, y), (dx, dy) = (group[key][:, [0, j]].T for key in ("mean", "error"))
            ax.errorbar(x, y, xerr=dx, yerr=dy, elinewidth=0.8, capsize=2, **drawn | line)
        bars = {"xerr": group["kl_error"], "yerr": group["gain_error"], "elinewidth": 0.6}
        last.errorbar(group["kl"], group["gain"], **bars, **drawn | {"linestyle": ""})  # a line would only zigzag
        ps = group.get("p", ()) if i == 0 else ()
        for k in {0, len(ps) // 2, len(ps) - 1} if len(ps) else ():
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7, "zorder": 9}
            place["color"] = drawn["color"]
            last.annotate(f"p = {ps[k]:g}", (group["kl"][k], group["gain"][k]), **place)
            for ax in trades[:1]:
                ax.annotate(f"p = {ps[k]:g}", group["mean"][k][:2], **place | {"xytext": (-32, -9)})  # under the front
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = len(labels) if len(labels) < 7 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, frameon=False)
    save(figure, path)
