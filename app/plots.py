"""The pictures. The only module that imports matplotlib; every function takes numbers and writes one PNG. [ours]

A method has one colour and one marker in every picture (`style`): a pair by its place in the registry. Colours stay
apart for colour-blind readers: Okabe and Ito's first, then Tol's "muted". More methods get other pairs of the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from app.files import write_bytes
from app.options import METHODS

COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#661100", "#01665E", "#332288", "#EECC66",
    "#FF00FF", "#882255", "#44AA99", "#CC6677", "#117733", "#88CCEE", "#999933", "#AA4499",
]  # fmt: skip
MARKERS = "osD^vP*Xph<>"
BLACK = {"color": "black"}  # the exact front, and the base model
BASE = BLACK | {"marker": "x", "markersize": 9, "markeredgewidth": 2, "linestyle": "", "label": "base model"}


def style(label: str, position: int) -> dict[str, Any]:
    """Colour, marker and line of one label, as matplotlib's keyword arguments.

    A method's label has that method's pair. A variant, `firm beta=1`, has it on a broken line with a hollow marker, by
    position. Any other label (an objective, a setting) has a pair by position.
    """
    name, _, variant = label.partition(" ")
    known = name in METHODS
    turn, i = divmod(list(METHODS).index(name) if known else position + len(METHODS), len(COLOURS))
    marker = MARKERS[(i + turn) % len(MARKERS)]
    drawn = {"color": COLOURS[i], "marker": marker, "markersize": 8 if marker == "*" else 5, "label": label}
    if not (known and variant):
        return drawn | {"linestyle": "-"}
    filled = ("none", "left", "bottom", "right", "top")[position % 5]
    return drawn | {"linestyle": ("--", ":", "-.")[position % 3], "fillstyle": filled, "markerfacecoloralt": "white"}


def save(figure: plt.Figure, path: Path) -> None:
    """Write the PNG whole or not at all, and close the figure."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150, bbox_inches="tight")
    write_bytes(path, picture.getvalue())
    plt.close(figure)


def tidy(ax: plt.Axes, x: str, y: str, title: str) -> None:
    """Axis labels, a light grid, no box."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


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


def panels(contents: Sequence[Panel], path: Path, note: str = "") -> None:
    """Lines with error bars, side by side; one legend under them all; a note above."""
    columns = 2 if len(contents) == 4 else min(3, len(contents))
    rows = -(-len(contents) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(contents) :]:
        ax.set_visible(False)
    labels, handles = list(dict.fromkeys(label for panel in contents for label in panel.lines)), {}
    for ax, panel in zip(axes.flat, contents, strict=False):
        if panel.diagonal:
            ax.axline((0, 0), slope=1, color="0.6", linestyle="--", linewidth=1)
        for label, (x, y, half) in panel.lines.items():
            drawn = style(label, labels.index(label)) | ({} if len(x) > 1 and not panel.ticks else {"linestyle": ""})
            handles[label] = ax.errorbar(x, y, yerr=half, capsize=3, clip_on=False, **drawn)  # whole at the limits
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
    if len(labels) > 1:
        ncol = min(len(labels), 2 * columns)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=ncol, frameon=False)
    save(figure, path)


def by_round(metrics: Sequence[dict], names: Sequence[str], out: Path) -> None:
    """A run's rewards.png and weights.png: every objective's mean raw reward on the clients' own batches, held out too
    if that was measured, and the KL; the objectives' weights λ, mean over clients and steps, and how far clients
    disagree.
    """

    def line(key: str, done: int = 1) -> tuple[list[int], list[float], None]:
        return [m["round"] + done for m in metrics], [m[key] for m in metrics], None

    def reward(name: str) -> dict[str, tuple]:
        lines = {"training prompts": line(f"reward/{name}", 0)}  # answered by the adapter that the round began with
        if measured := [m for m in metrics if "held_out_kl" in m]:
            values, errors = ([m[f"{kind}/{name}"] for m in measured] for kind in ("held_out", "held_out_error"))
            lines["held-out prompts ± standard error"] = ([m["round"] + 1 for m in measured], values, errors)
        return lines

    weights = {name: line(f"lambda/{name}") for name in names}
    apart, kl = {"disagreement": line("lambda/disagreement")}, {"training prompts": line("kl", 0)}
    panels([
        *(Panel("rounds done", "mean reward (raw units)", name, reward(name)) for name in names),
        Panel("rounds done", "KL per response (nats)", "distance from the base model", kl),
    ], out / "rewards.png")  # fmt: skip
    panels([
        Panel("round", "λ, mean over clients", "Weights of the objectives", weights, limits=(-0.02, 1.02)),
        Panel("round", "mean distance from λ̄", "Disagreement between clients", apart, limits=(0.0, None)),
    ], out / "weights.png")  # fmt: skip


def by_task(metrics: Sequence[dict], primary: str, tasks: Sequence[str], out: Path) -> None:
    """A run's tasks.png: the primary's reward on the clients' own prompts, mean of every task; what it weighs with
    every client, and what every client counts in the average. tasks: each client's.
    """

    def of(kind: str, clients: Sequence[int]) -> tuple[list[int], list[float], None]:
        values = [[m[key] for c in clients if (key := f"{kind}/client{c}") in m] for m in metrics]
        return [m["round"] + 1 for m in metrics], [float(np.mean(v)) if v else np.nan for v in values], None

    by = {task: [c for c, of_client in enumerate(tasks) if of_client == task] for task in sorted(set(tasks))}
    weights, shares = (
        {f"client {c}, {task}": of(kind, [c]) for task, members in by.items() for c in members}
        for kind in (f"lambda/{primary}", "share")
    )
    rewards = {task: of(f"reward/{primary}", members) for task, members in by.items()}
    panels([
        Panel("round", f"mean {primary}", "On the clients' own prompts, by task", rewards),
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
    shown = {
        side: (range(len(names)), [f[side] for f in groups.values()], None)
        for side in (*sides, "mean answer", "uniform")
    }
    panels([Panel("", "alignment", "Every group; * took no part in training", shown, ticks=names)], out / "groups.png")


def trade_off(
    rows: dict[str, list[dict[str, Any]]], front: np.ndarray | None, names: Sequence[str], path: Path
) -> None:
    """Where runs stand, by label; rows as `report.point` makes them, front [K, 2] the exact one if it is known.

    The worst gain is in units of what the ideal point would gain, or without a front in base-policy deviations.
    """
    first, groups = next(iter(rows.values()))[0], {}
    base, unit, axis = np.array(first["base"]), np.array(first["scale"]), "worst gain (base-policy deviations)"
    if front is not None:
        unit, axis = front.max(0) - base, "worst gain (1 is the ideal point)"
    for label, group in rows.items():
        columns = {key: np.array([row[key] for row in group]) for key in ("mean", "error", "kl", "kl_error")}
        gain, error = (np.array([row[key] for row in group]) / unit for key in ("gain", "gain_error"))  # [n, M]
        worst = gain.argmin(1)[:, None]
        columns |= {"gain": np.take_along_axis(gain, worst, 1)[:, 0]}
        columns |= {"gain_error": np.take_along_axis(error, worst, 1)[:, 0]}
        groups[label] = columns | ({"p": [row["preference"][0] for row in group]} if len(group) > 1 else {})
    pareto(groups, base, front, names, path, axis)


def pareto(
    groups: dict[str, dict[str, np.ndarray]], base: np.ndarray, exact: np.ndarray | None, names: Sequence[str],
    path: Path, gain: str = "worst normalised gain", over: str = "held-out prompts",
) -> None:  # fmt: skip
    """Trade-offs: every other objective against the first one, and the worst-served objective's gain against the KL.

    groups maps a label to its points in order of the preference p₁, if several: p [n]; mean and error [n, M] in raw
    units; kl, gain and their errors kl_error, gain_error [n], gain in the unit that the axis label `gain` states. over:
    what the errors, standard errors, are taken over. base [M] is the base model, exact [K, 2] the exact front.
    """
    M = len(names)
    figure, axes = plt.subplots(1, M, figsize=(4.8 * M, 4.2), layout="constrained", squeeze=False)
    *trades, last = axes[0]
    for j, ax in enumerate(trades, start=1):
        if exact is not None:
            ax.plot(*exact.T, label="exact Pareto front", **BLACK)
        ax.plot(base[0], base[j], **BASE)
        title = f"Held-out prompts; bars: one standard error over {over}" * (j == 1)
        tidy(ax, f"{names[0]} (raw units)", f"{names[j]} (raw units)", title)
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
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7, "color": drawn["color"]}
            last.annotate(f"p = {ps[k]:g}", (group["kl"][k], group["gain"][k]), **place)
            for ax in trades[:1]:
                ax.annotate(f"p = {ps[k]:g}", group["mean"][k][:2], **place | {"xytext": (-32, -9)})  # under the front
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = len(labels) if len(labels) < 7 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, frameon=False)
    save(figure, path)
