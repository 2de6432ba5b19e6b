"""The evidence: one short function per claim; runs, a table, a picture. All on the embedded world. [ours]

    python -m evidence.experiments tuning baselines pareto …   some of them, in this order
    python -m evidence.experiments all --quick                 all in miniature, within 10 minutes on two cores

Each leaves results/NAME.csv (a row a run), NAME.md (the table) and NAME.png; results/README.md draws conclusions. A
stopped experiment goes on where it was, and drawing a table or a picture again costs nothing. --quick writes to
runs/quick instead, and its figures mean nothing.

Rules of comparison: one tuning grid and budget for every method (`tuning`, on seeds of its own), and beside every
method's own best setting a common one, since a difference between methods that run at different rates may be one of the
rates; a fixed KL coefficient; differences paired by seed, 95 % intervals from Student's t, Holm's correction over the
baselines.

Needs requirements-dev.txt (SciPy).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import run
from app import plots
from evidence.lab import (
    BASE,
    BETAS,
    LABELS,
    NAMES,
    Lab,
    against,
    bars,
    cell,
    column,
    curves,
    number,
    of,
    show,
    spearman,
    sweep_volume,
    table,
)
from settings import Config
from worlds import toy

PREFERENCES = tuple(round(0.1 * i, 1) for i in range(1, 10))  # p₁, of helpful
GRID = {"lr": (1.5e-3, 3e-3, 6e-3), "server_lr": (1.0, 2.0), "kl_coef": (0.003, 0.01)}
TUNING_SEEDS = (101, 102)
METHODS = ("firm", "mgda", "linear", "morlhf", "fsmgda", "fedcmoo", "soups")
ROUNDS = 16  # [paper]


def job(method: str, seed: int, **settings) -> dict:
    """One run's settings. Soups also say which preferences (p₁) they are evaluated at."""
    return {"method": method, "seed": seed} | ({"preferences": [0.5]} if method == "soups" else {}) | settings


# ---- one tuning budget for every method -----------------------------------------------------------------------


def tuning(lab: Lab) -> None:
    """The same grid and seeds for every method, judged by the worst normalised gain at uniform p after 16 rounds."""
    rows = lab.rows("tuning", tuning_jobs(lab))
    lines = []
    for method in METHODS:
        ranked = ranking(of(rows, method=method))
        best = of(rows, method=method, **ranked[0][1])
        scores = [f"{ranked[i][0]:.3f}" for i in (0, min(1, len(ranked) - 1), -1)]
        lines.append(
            [method, *(f"{v:g}" for v in ranked[0][1].values()), *scores, f"{np.mean(column(best, 'kl')):.2f}"]
        )
    head = ["method", *GRID, "worst normalised gain", "of the runner-up", "of the last", "KL"]
    runs = len(tuning_jobs(lab)) // len(METHODS)
    show(lab, "tuning", head, lines, f"{runs} runs a method (soups: two trainings each), seeds {TUNING_SEEDS}; means.")
    panels = []
    for name in GRID:
        lines = {}
        for method in METHODS:
            mine = of(rows, method=method)
            values = sorted({row[name] for row in mine})
            lines[method] = (values, [ranking(of(mine, **{name: v}))[0][0] for v in values], None)
        panels.append(plots.Panel(name, "worst normalised gain", "best over the rest of the grid", lines, log_x=True))
    plots.panels(panels, lab.results / "tuning.png")


def tuning_jobs(lab: Lab) -> list[dict]:
    """Every method at every point of the grid, on the tuning seeds; one point in miniature."""
    grid = [dict(zip(GRID, (lr, rate, kl), strict=True)) for lr in GRID["lr"] for rate in GRID["server_lr"]
            for kl in GRID["kl_coef"]]  # fmt: skip
    seeds = TUNING_SEEDS
    if lab.quick:
        grid, seeds = [{"lr": 3e-3, "server_lr": 1.0, "kl_coef": 0.003}], seeds[:1]
    return [job(method, seed, **settings) for method in METHODS for settings in grid for seed in seeds]


def ranking(rows: list[dict]) -> list[tuple[float, dict]]:
    """(mean worst gain over the seeds, setting), best first."""
    settings = [
        dict(zip(GRID, values, strict=True)) for values in dict.fromkeys(tuple(r[n] for n in GRID) for r in rows)
    ]
    scored = [(float(np.mean(column(of(rows, **setting), "worst_gain"))), setting) for setting in settings]
    return sorted(scored, key=lambda pair: -pair[0])


def tuned(lab: Lab, method: str) -> dict:
    """The best setting of this method's grid. Runs the tuning first where that is missing."""
    return ranking(of(lab.rows("tuning", tuning_jobs(lab)), method=method))[0][1]


def common(lab: Lab) -> dict:
    """The setting that is best on average over the methods: what all run at where only the method shall differ."""
    return ranking(lab.rows("tuning", tuning_jobs(lab)))[0][1]


# ---- FIRM and the baselines -----------------------------------------------------------------------------------


VARIANTS = {"firm": {}, "firm β=1": {"beta": 1.0}} | {method: {} for method in METHODS[1:]}


def baselines(lab: Lab) -> None:
    """Every method at uniform p and its own best setting: at equal rollouts, equal bytes, equal optimizer steps."""
    seeds, half = lab.seeds(10), ROUNDS // 2
    shorter = ("fsmgda", "fedcmoo", "soups")  # what is also run for half the rounds
    jobs = {}
    for label, extra in VARIANTS.items():
        method = label.split()[0]
        setting = tuned(lab, method)
        for rounds in (ROUNDS, half) if label in shorter else (ROUNDS,):
            jobs[label, rounds] = [job(method, s, rounds=rounds, **setting, **extra) for s in seeds]
    rows = lab.groups("baselines", jobs)
    # Per client and round FSMGDA and (at M = 2, e = 1) FedCMOO upload twice what FIRM does, FSMGDA also takes twice the
    # steps; soups are two trainings, so each specialist gets half the rounds.
    budgets = {
        "equal rollouts": {"soups"}, "equal bytes up": {"fsmgda", "fedcmoo", "soups"},
        "equal optimizer steps": {"fsmgda", "soups"},
    }  # fmt: skip
    lines = []
    for budget, halved in budgets.items():
        lines += versus_firm(budget, {label: rows[label, half if label in halved else ROUNDS] for label in VARIANTS})
    note = (
        f"{len(seeds)} seeds, paired; ± is half a 95 % interval; p is for the worst gain, Holm over the baselines of a "
    )
    note += "budget; β = 0.01 if not named. Rates were tuned for 16 rounds, also where 8 are run."
    show(lab, "baselines", VERSUS, lines, note)
    groups = {label: rows[label, half if label == "soups" else ROUNDS] for label in VARIANTS}
    bars(lab, "baselines", groups, ("normalised_helpful", "normalised_harmless", "worst_gain", "kl"))


VERSUS = ["budget", "method", "rounds", *NAMES, "worst normalised gain", "KL", "firm − method: helpful", "harmless",
          "worst gain", "p (Holm)"]  # fmt: skip


def versus_firm(budget: str, groups: dict[str, list[dict]]) -> list[list]:
    """One line per method: means, paired differences in normalised gains, and the test of the worst one."""
    test = {f: against(groups, "firm", f) for f in ("normalised_helpful", "normalised_harmless", "worst_gain")}
    return [
        [budget, label, int(mine[0]["rounds"]), *(cell(mine, f) for f in (*NAMES, "worst_gain", "kl")),
         *(test[f][label][0] for f in test), test["worst_gain"][label][1]]
        for label, mine in groups.items()
    ]  # fmt: skip


def agreement(lab: Lab) -> None:
    """Every method at one common setting: how smooth, how unanimous, how far; what differs is the method alone."""
    seeds, setting = lab.seeds(10), common(lab)
    rounds = {label: ROUNDS // 2 if label == "soups" else ROUNDS for label in VARIANTS}
    jobs = {(label,): [job(label.split()[0], s, rounds=rounds[label], **setting, **extra) for s in seeds]
            for label, extra in VARIANTS.items()}  # fmt: skip
    groups = {label: rows for (label,), rows in lab.groups("agreement", jobs).items()}
    at = ", ".join(f"{name} {value:g}" for name, value in setting.items())
    lines = versus_firm("common setting", groups)
    show(lab, "common", VERSUS, lines, f"{len(seeds)} seeds, paired, equal rollouts; all at {at}.")
    lines = []
    own = {label: groups[label] for label in ("firm", "firm β=1", "mgda")}  # others have one λ for all, by construction
    trained = {label: mine for label, mine in groups.items() if label != "soups"}
    for figure in ("disagreement", "drift", "movement", "dispersion", "averaging_residual", "net_roughness_helpful",
                   "net_roughness_harmless", "stationarity", "kl"):  # fmt: skip
        chosen = own if figure in ("disagreement", "drift") else trained
        if figure == "stationarity":
            chosen = {label: mine for label, mine in trained.items() if label != "morlhf"}  # has one loss only
        test = against(chosen, "firm", figure)
        lines += [
            [LABELS.get(figure, figure), label, cell(mine, figure), *test[label]] for label, mine in chosen.items()
        ]
    note = f"{len(seeds)} seeds, paired, all at {at}; Holm over the methods of a figure, not over figures."
    show(lab, "agreement", ["figure", "method", "mean", "firm − method", "p (Holm)"], lines, note)
    bars(lab, "agreement", trained,
         ("disagreement", "drift", "movement", "net_roughness_helpful", "net_roughness_harmless", "kl"))  # fmt: skip


SWEEPS = {
    "firm β=10": ("firm", {"beta": 10.0}), "firm β=1": ("firm", {"beta": 1.0}), "linear": ("linear", {}),
    "morlhf": ("morlhf", {}), "soups": ("soups", {}),
}  # fmt: skip


def pareto(
    lab: Lab, name: str = "pareto", rounds: int = ROUNDS, seeds: Sequence[int] | None = None,
    sweeps: Sequence[str] = tuple(SWEEPS), setting: dict | None = None,
) -> None:  # fmt: skip
    """Preference sweeps of 9 points: the trade-offs by hypervolume, and whether a preference is followed.

    All at the common setting: FIRM at a large β is nearly `linear`, and at other rates would differ by the rates.
    """
    preferences, seeds = lab.some(PREFERENCES), lab.seeds(10) if seeds is None else seeds
    setting = setting or common(lab)

    def sweep(label: str, seed: int) -> list[dict]:
        """One label's jobs for one seed, in the order of the preferences."""
        method, extra = SWEEPS[label]
        shared = {"rounds": rounds} | setting | extra
        if method == "soups":
            return [job(method, seed, **shared | {"preferences": list(preferences)})]
        return [job(method, seed, preference=[p, round(1.0 - p, 1)], **shared) for p in preferences]

    # Whole seeds first, so that an unfinished experiment is a smaller one.
    rows = lab.groups(name, {(seed, label): sweep(label, seed) for seed in seeds for label in sweeps})
    groups = {label: [row for seed in seeds for row in rows[seed, label]] for label in sweeps}
    volumes = {label: [{"seed": s, "hv": sweep_volume(rows[s, label])} for s in seeds] for label in sweeps}
    test = against(volumes, sweeps[0], "hv")
    base = np.array([np.mean(column(groups[sweeps[0]], f"base_{figure}")) for figure in NAMES])
    start = groups[sweeps[0]][0] | {f"base_{figure}": value for figure, value in zip(NAMES, base, strict=True)}
    lines, drawn, weights = [], {}, {}
    for label, mine in groups.items():
        by_p = [of(mine, p=p) for p in preferences]
        mean = np.array([[np.mean(column(r, figure)) for figure in NAMES] for r in by_p])
        error = np.array([[np.std(column(r, figure)) / max(len(r) - 1, 1) ** 0.5 for figure in NAMES] for r in by_p])
        realised = [np.mean(column(r, "lambda_helpful")) for r in by_p]
        kl, worst = ([np.mean(column(r, figure)) for r in by_p] for figure in ("kl", "worst_gain"))
        drawn[label] = {"mean": mean, "error": error, "kl": np.array(kl), "gain": np.array(worst)}
        weights[label] = (list(preferences), realised, None)
        lines.append([
            label, cell(volumes[label], "hv"),
            number(sweep_volume([start | dict(zip(NAMES, point, strict=True)) for point in mean])),
            *(f"{spearman(sign * np.array(preferences), mean[:, j]):+.3f}" for j, sign in ((0, 1), (1, -1))),
            int((mean <= base).all(1).sum()), "–" if label == "soups" else f"{realised[0]:.2f} to {realised[-1]:.2f}",
            f"{min(kl):.1f} to {max(kl):.1f}", *test[label],
        ])  # fmt: skip
    head = ["method", "normalised hypervolume", "of the mean points", "Spearman of p₁ and helpful",
            "of p₂ and harmless", "points dominated by the base", "realised λ̄ of helpful", "KL",
            f"{sweeps[0]} − method", "p (Holm)"]  # fmt: skip
    done = int(groups[sweeps[0]][0]["rounds"])
    note = (
        f"{len(seeds)} seeds from {seeds[0]}, {done} rounds, {len(preferences)} preferences; Spearman on seed means. "
    )
    note += "Soups are two trainings a seed, the others one per preference."
    show(lab, name, head, lines, note)
    plots.pareto(drawn, base, toy.pareto_front(), NAMES, lab.results / f"{name}.png")
    weights.pop("soups", None)
    panel = plots.Panel("requested p of helpful", "realised mean λ of helpful", "", weights, diagonal=True)
    plots.panels([panel], lab.results / f"{name}_weights.png")


def pilot(lab: Lab) -> None:
    """One seed that is not reported, for the number of rounds of `pareto` and its threshold."""
    for rounds in (ROUNDS, 2 * ROUNDS, 4 * ROUNDS):
        pareto(lab, f"pilot{rounds}", rounds, TUNING_SEEDS[:1], ("firm β=10",), tuned(lab, "firm"))


def long(lab: Lab) -> None:
    """The sweep with four times the rounds: how far towards the front?"""
    pareto(lab, "long", 4 * ROUNDS, lab.seeds(3), ("firm β=10", "linear", "morlhf"))


# ---- ablations ------------------------------------------------------------------------------------------------


def beta(lab: Lab) -> None:
    """β: what it does to λ on one and the same Grams, and what training with it does."""
    betas, setting = lab.some(BETAS), common(lab)
    rows = lab.rows("beta", [job("firm", s, beta=b, **setting) for s in lab.seeds(5) for b in betas])
    for row in rows:  # "same" figures of every row are those of its seed's run at β = 0
        zero = of(rows, beta=0.0, seed=row["seed"])[0]
        for figure in ("disagreement", "drift"):
            row[f"same_{figure}"] = zero[f"{figure}@{row['beta']:g}"] / zero[f"{figure}@0"]
    figures = ("same_disagreement", "same_drift", "disagreement", "drift", "movement", *NAMES, "worst_gain", "kl")
    table(lab, "beta", ["β"], {(f"{b:g}",): of(rows, beta=b) for b in betas}, figures)
    curves(lab, "beta", "β", {"firm": rows}, "beta", ("same_disagreement", "same_drift", "disagreement", *NAMES, "kl"),
           ticks=[f"{b:g}" for b in betas])  # fmt: skip


def twins(lab: Lab) -> None:
    """M = 3, the third objective a near copy of the first: where unregularised weights jump. p = (¼, ½, ¼)."""
    objectives, betas = (
        [*BASE["objectives"], "py:worlds/toy.py:twin"],
        (0.0, 0.01) if lab.quick else (0.0, 0.01, 0.1, 1.0),
    )
    shared = common(lab) | {"objectives": objectives, "preference": [0.25, 0.5, 0.25]}
    rows = lab.rows("twins", [job("firm", s, beta=b, **shared) for s in lab.seeds(5) for b in betas])
    for row in rows:
        zero = of(rows, beta=0.0, seed=row["seed"])[0]
        row["twin_disagreement"] = row[f"twin_disagreement@{row['beta']:g}"]
        row["same_twin_disagreement"] = zero[f"twin_disagreement@{row['beta']:g}"] / zero["twin_disagreement@0"]
        row["same_drift"] = zero[f"drift@{row['beta']:g}"] / zero["drift@0"]
    zero = of(rows, beta=0.0)
    gap = f"mean {np.mean(column(zero, 'gap')):.1e}, largest {max(column(zero, 'gap_max')):.1e}"
    gap = f"Gap ‖g₁ − g₃‖² / tr G at β = 0: {gap}."
    figures = ("same_twin_disagreement", "same_drift", "twin_disagreement", "drift", *NAMES, "kl", "gap", "gap_small")
    table(lab, "twins", ["β"], {(f"{b:g}",): of(rows, beta=b) for b in betas}, figures, gap)
    curves(lab, "twins", "β", {"firm": rows}, "beta", ("same_twin_disagreement", "same_drift", *NAMES),
           ticks=[f"{b:g}" for b in betas])  # fmt: skip


def rank(lab: Lab) -> None:
    """LoRA rank, with α/r fixed (α = 2r) and with rsLoRA (α/√r, equal to the other at r = 8)."""
    setting = common(lab)
    ranks, scales = lab.some((1, 4, 16)), {"α/r": {}, "rsLoRA": {"rslora": True, "lora_alpha": 2 * 8**0.5}}
    jobs = {(label, r): [job("firm", s, lora_rank=r, **scale, **setting) for s in lab.seeds(3)]
            for label, scale in scales.items() for r in ranks}  # fmt: skip
    rows = lab.groups("rank", jobs)
    figures = (*NAMES, "worst_gain", "disagreement", "averaging_residual", "upload_payload", "kl")
    table(lab, "rank", ["scale", "rank"], rows, figures)
    lines = {label: [row for r in ranks for row in rows[label, r]] for label in scales}
    curves(lab, "rank", "rank", lines, "lora_rank", ("worst_gain", "disagreement", "averaging_residual"), log_x=True)


def clients(lab: Lab) -> None:
    """2, 3, 8, 32 clients: with 16 prompts each, and with about 128 in all (3 · 43 = 129)."""
    setting = common(lab)
    counts, kinds = (
        lab.some((2, 3, 8, 32)),
        {"16 per client": lambda c: 16, "about 128 in all": lambda c: round(128 / c)},
    )
    jobs = {(label, c): [job("firm", s, clients=c, batch_size=size(c), **setting) for s in lab.seeds(3)]
            for label, size in kinds.items() for c in counts}  # fmt: skip
    rows = lab.groups("clients", jobs)
    figures = (*NAMES, "worst_gain", "disagreement", "drift", "half_cosine", "kl")
    table(lab, "clients", ["prompts a round", "clients"], rows, figures)
    lines = {label: [row for c in counts for row in rows[label, c]] for label in kinds}
    curves(lab, "clients", "clients", lines, "clients", ("worst_gain", "disagreement", "drift"), log_x=True)


def heterogeneity(lab: Lab) -> None:
    """iid, Dirichlet 1 and 0.1 over topics: the iid split is the floor that sampling noise alone makes."""
    setting = common(lab)
    splits = {"iid": {"split": "iid"}}
    splits |= {f"Dir({a:g})": {"split": "dirichlet", "dirichlet_alpha": a} for a in lab.some((1.0, 0.1))}
    variants = {
        "firm": ("firm", {}),
        "firm β=1": ("firm", {"beta": 1.0}),
        "mgda": ("mgda", {}),
        "linear": ("linear", {}),
    }
    jobs = {(split, label): [job(m, s, **settings, **setting, **extra) for s in lab.seeds(3)]
            for split, settings in splits.items() for label, (m, extra) in variants.items()}  # fmt: skip
    rows = lab.groups("heterogeneity", jobs)
    table(lab, "heterogeneity", ["split", "method"], rows,
          (*NAMES, "worst_gain", "disagreement", "drift", "dispersion", "kl"))  # fmt: skip
    lines = {
        label: [row | {"x": x} for x, split in enumerate(splits) for row in rows[split, label]] for label in variants
    }
    curves(lab, "heterogeneity", "split among clients", lines, "x", ("worst_gain", "disagreement", "drift"),
           ticks=list(splits))  # fmt: skip


def trace(lab: Lab) -> None:
    """The trace normalisation switched off: β then means something else whenever the gradients change size."""
    setting = common(lab)
    grams, betas = ("normalised", "raw"), (0.01, 1.0)
    jobs = {(g, f"{b:g}"): [job("firm", s, gram=g, beta=b, **setting) for s in lab.seeds(3)]
            for g in grams for b in betas}  # fmt: skip
    rows = lab.groups("trace", jobs)
    figures = ("trace_first", "trace_last", "disagreement", "drift", *NAMES, "worst_gain", "kl")
    table(lab, "trace", ["Gram", "β"], rows, figures, "On the raw Gram β acts as β / tr G does on the normalised one.")
    lines = {g: [row for b in betas for row in rows[g, f"{b:g}"]] for g in grams}
    curves(lab, "trace", "β", lines, "beta", ("disagreement", "drift", "worst_gain"), log_x=True)


def noise(lab: Lab) -> None:
    """λ from the Gram of one batch against the symmetrised cross Gram of two half-batches."""
    setting = common(lab)
    sizes, grams = lab.some((8, 16, 64)), {"one batch": "normalised", "two halves": "cross"}
    jobs = {(b, label): [job("firm", s, gram=g, batch_size=b, split="iid", **setting) for s in lab.seeds(3)]
            for b in sizes for label, g in grams.items()}  # fmt: skip
    rows = lab.groups("noise", jobs)
    figures = ("half_cosine", "error_batch", "error_cross", "error_constant", "lambda1_batch", "lambda1_cross",
               "lambda1_reference",
               "disagreement", "drift", "worst_gain", "kl")  # fmt: skip
    table(lab, "noise", ["prompts", "λ from"], rows, figures, "The reference is λ of the other clients' mean gradient.")
    lines = {label: [row for b in sizes for row in rows[b, label]] for label in grams}
    curves(lab, "noise", "prompts per client and round", lines, "batch_size",
           ("error_batch", "error_cross", "disagreement", "worst_gain"), log_x=True)  # fmt: skip


def optimizer(lab: Lab) -> None:
    """The client's optimizer: Adam fresh every round, Adam kept, SGD; each with a rate from a grid of its own."""
    grids = {"adam": GRID["lr"], "adam-keep": GRID["lr"], "sgd": (0.3, 1.0, 3.0)}
    grids = {name: grid[1:2] if lab.quick else grid for name, grid in grids.items()}
    shared = {k: v for k, v in common(lab).items() if k != "lr"}

    def jobs(name: str, lr: float, seeds: Sequence[int]) -> list[dict]:
        return [job("firm", s, optimizer=name, lr=lr, **shared) for s in seeds]

    seeds = TUNING_SEEDS[:1] if lab.quick else TUNING_SEEDS
    trials = lab.groups("optimizer", {(n, lr): jobs(n, lr, seeds) for n, grid in grids.items() for lr in grid})
    best = {n: max(grid, key=lambda lr: np.mean(column(trials[n, lr], "worst_gain"))) for n, grid in grids.items()}  # noqa: B023
    rows = lab.groups("optimizer", {(n, f"{lr:g}"): jobs(n, lr, lab.seeds(5)) for n, lr in best.items()})
    figures = (*NAMES, "worst_gain", "disagreement", "dispersion", "averaging_residual", "kl")
    table(
        lab,
        "optimizer",
        ["optimizer", "rate"],
        rows,
        figures,
        f"Rates tuned on seeds {seeds}, server rate and KL coefficient those that are best with Adam.",
    )
    bars(lab, "optimizer", {n: mine for (n, _), mine in rows.items()}, ("worst_gain", "kl", "dispersion"))


def communication(lab: Lab) -> None:
    """Bytes per client and round for M = 2, 3, 4 objectives, as serialised; the payload in adapters of d numbers."""
    objectives, parts = [*BASE["objectives"], "py:worlds/toy.py:twin", "rule:brevity"], ("payload", "header", "scalars")
    shared = {"rounds": 1, "held_out": 16, "eval_samples": 1}
    jobs = {(method, M): [job(method, 0, objectives=objectives[:M], **shared)]
            for method in ("firm", "linear", "fsmgda", "fedcmoo") for M in (2, 3, 4)}  # fmt: skip
    jobs["fedcmoo e=0.5", 2] = [job("fedcmoo", 0, objectives=objectives[:2], fedcmoo_compression=0.5, **shared)]
    rows = {key: mine[0] for key, mine in lab.groups("communication", jobs).items()}
    d = run.Session(Config.from_flat(BASE), progress=False).policy.adapter.size
    lines = [
        [method, M, *(f"{row[f'{way}_payload'] / (4 * d):.3f} d" if part == "payload" else int(row[f"{way}_{part}"])
                      for way in ("upload", "download") for part in parts)]
        for (method, M), row in rows.items()
    ]  # fmt: skip
    head = ["method", "M", *(f"{part} {way}" for way in ("up", "down") for part in parts)]
    note = f"d = {d:,} float32 numbers; header and scalars in bytes. Once per run on top, for the calibration: "
    show(lab, "communication", head, lines, note + "8(1 + 2M) bytes up and 16M bytes down per client.")
    panels = []
    for way in ("upload", "download"):
        lines = {method: (range(3), [rows[method, M][f"{way}_payload"] / (4 * d) for M in (2, 3, 4)], None)
                 for method in ("firm", "fsmgda", "fedcmoo")}  # fmt: skip
        panels.append(plots.Panel("objectives M", f"{way}ed payload / d", "", lines, ticks=["2", "3", "4"]))
    plots.panels(panels, lab.results / "communication.png")


EXPERIMENTS = {
    experiment.__name__: experiment
    for experiment in (tuning, communication, agreement, baselines, beta, twins, heterogeneity, noise, trace, optimizer,
                       rank,
                       clients, pilot, pareto, long)
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 on bad usage, 130 when stopped by the user."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence.experiments", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--quick", action="store_true", help="in miniature, to runs/quick: the figures mean nothing")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of one thread each")
    parser.add_argument("--seeds", type=int, default=100, help="at most so many seeds of each experiment")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in (*EXPERIMENTS, "all")]
    if unknown:
        parser.error(f"{unknown[0]}: no such experiment; name all, or some of {', '.join(EXPERIMENTS)}")
    for name in ("workers", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: {getattr(options, name)} must be at least 1")
    results = Path("runs/quick" if options.quick else "results")
    lab = Lab(results, options.quick, options.workers, options.seeds)
    toy.prepare()  # once, not in every worker
    try:
        for name in EXPERIMENTS if "all" in options.names else options.names:
            EXPERIMENTS[name](lab)
    except KeyboardInterrupt:
        print("stopped; the rows so far are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
