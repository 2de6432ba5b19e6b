"""The evidence: one short function per claim; runs, a table, a picture. All on the embedded worlds. [ours]

    python -m evidence.experiments tuning baselines pareto …   some of them, in this order
    python -m evidence.experiments all --quick                 all in miniature, a quarter of an hour

Each leaves results/NAME.csv (a row a run), NAME.md (the table) and, but for `tuning`, NAME.png; results/README.md draws
conclusions. A stopped experiment goes on where it was, and drawing a table or a picture again costs nothing. --quick
writes to runs/quick instead, and its figures mean nothing.

What is compared with what is in `rules.py`. Needs requirements-dev.txt (SciPy).
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from app import plots, sweep
from app.session import Session
from evidence import rules
from evidence.faults import faults, processes, soak, survivors
from evidence.lab import BASE, BETAS, NAMES, Lab, front_of, mean_points, sweep_volume
from evidence.moa import fedmoa, saturation
from evidence.plural import plural, predictor
from evidence.rules import COMMON, GRID, PREFERENCES, ROUNDS, TUNING_SEEDS, VARIANTS
from evidence.statistics import BARS, LABELS, against, cell, column, curves, measured, points, show, table, where
from evidence.update import COLD, cooled, groups
from settings import Config
from worlds import reasoning, toy

# ---- one tuning budget for every method -----------------------------------------------------------------------


def tuning(lab: Lab) -> None:
    """The same grid and seeds for every method, judged by the worst normalised gain at uniform p after 16 rounds."""
    jobs, lines = rules.tuning_jobs(lab), []
    rows = lab.rows("tuning", jobs)
    for method in rules.COMPARED:
        ranked = rules.ranking(where(rows, method=method))
        scores = [f"{ranked[i][0]:.3f}" for i in (0, min(1, len(ranked) - 1), -1)]
        kl = np.mean(column(where(rows, method=method, **ranked[0][1]), "kl"))
        lines.append([method, *(f"{v:g}" for v in ranked[0][1].values()), *scores, f"{kl:.2f}"])
    head = ["method", *GRID, "worst normalised gain", "of the runner-up", "of the last", "KL"]
    note = f"{len(jobs) // len(rules.COMPARED)} runs a method (soups: two trainings each), seeds {TUNING_SEEDS}; means."
    show(lab.results, "tuning", head, lines, note)


# ---- FIRM and the baselines -----------------------------------------------------------------------------------


VERSUS = ["budget", "method", "rounds", *NAMES, "worst normalised gain", "KL", "firm − method: helpful", "harmless",
          "worst gain", "p (Holm)"]  # fmt: skip


def versus_firm(budget: str, groups: dict[str, list[dict]]) -> list[list]:
    """One line per method: means, paired differences in normalised gains, and the test of the worst one."""
    tests = {f: against(groups, "firm", f) for f in ("normalised_helpful", "normalised_harmless", "worst_gain")}
    return [
        [budget, label, int(rows[0]["rounds"]), *(cell(rows, f) for f in (*NAMES, "worst_gain", "kl")),
         *(tests[f][label][0] for f in tests), tests["worst_gain"][label][1]]
        for label, rows in groups.items()
    ]  # fmt: skip


def baselines(lab: Lab) -> None:
    """Every method at uniform p and its own best setting: at equal rollouts, equal bytes, equal optimizer steps."""
    # Per client and round FSMGDA and (at M = 2, e = 1) FedCMOO upload twice what FIRM does, FSMGDA also takes twice the
    # steps; soups are two trainings, so each specialist gets half the rounds.
    halved = {
        "equal rollouts": {"soups"}, "equal bytes up": {"fsmgda", "fedcmoo", "soups"},
        "equal optimizer steps": {"fsmgda", "soups"},
    }  # fmt: skip
    seeds, jobs, lines = lab.some(rules.seeds_of(10)), {}, []
    for label, changes in VARIANTS.items():
        setting = rules.best_setting(lab, changes["method"]) | changes
        for budget, methods in halved.items():
            rounds = ROUNDS // 2 if label in methods else ROUNDS
            jobs[budget, label] = [setting | {"rounds": rounds, "seed": s} for s in seeds]
    rows = lab.groups("baselines", jobs)
    for budget in halved:
        lines += versus_firm(budget, {label: rows[budget, label] for label in VARIANTS})
    note = f"{len(seeds)} seeds, paired; ± is half a 95 % interval; p is for the worst gain, Holm over the baselines of"
    note += " a budget; β = 0.01 if not named. Rates were tuned for 16 rounds, also where 8 are run."
    show(lab.results, "baselines", VERSUS, lines, note)
    groups = {label: rows["equal rollouts", label] for label in VARIANTS}
    drawn = ("normalised_helpful", "normalised_harmless", "worst_gain", "kl")
    plots.panels(points(groups, drawn), lab.results / "baselines.png", note=BARS, legend=False)


def agreement(lab: Lab) -> None:
    """Every method at one common setting: how smooth, how unanimous, how far; what differs is the method alone."""
    variants = {label: {"rounds": ROUNDS} | changes for label, changes in VARIANTS.items()}
    variants["soups"]["rounds"] = ROUNDS // 2
    groups = rules.at_common_setting(lab, "agreement", 10, variants)
    at = ", ".join(f"{name} {value:g}" for name, value in COMMON.items())
    at = f"{len(groups['firm'])} seeds, paired, all at {at}"
    show(lab.results, "common", VERSUS, versus_firm("common setting", groups), f"{at}; equal rollouts.")
    del groups["soups"]  # has no rounds of its own
    lines = []
    for figure in ("disagreement", "drift", "movement", "dispersion", "averaging_residual", "net_roughness_helpful",
                   "net_roughness_harmless", "stationarity", "kl"):  # fmt: skip
        chosen = measured(groups, figure)
        if figure == "stationarity":
            del chosen["morlhf"]  # has one loss only
        test = against(chosen, "firm", figure)
        lines += [[LABELS[figure], label, cell(rows, figure), *test[label]] for label, rows in chosen.items()]
    note = f"{at}; Holm over the methods of a figure, not over figures. What is 0 by construction is left out."
    show(lab.results, "agreement", ["figure", "method", "mean", "firm − method", "p (Holm)"], lines, note)
    drawn = ("disagreement", "drift", "movement", "net_roughness_helpful", "net_roughness_harmless", "kl")
    plots.panels(points(groups, drawn), lab.results / "agreement.png", note=BARS, legend=False)


def pareto(lab: Lab) -> None:
    """Preference sweeps of 9 points: the trade-offs by hypervolume, and whether a preference is followed."""
    labels = ("firm β=10", "firm β=10 groups", "linear", "linear groups", "morlhf", "soups")
    means = preference_sweeps(lab, "pareto", {"rounds": ROUNDS}, lab.some(rules.seeds_of(5)), labels)
    lines = {label: (lab.some(PREFERENCES), means[label]["lambda"], None) for label in labels if "β" in label}
    panel = plots.Panel("requested p of helpful", "realised mean λ of helpful", "", lines, diagonal=True)
    plots.panels([panel], lab.results / "pareto_weights.png")


def long(lab: Lab) -> None:
    """The sweep with four times the rounds: how far towards the front, and what keeps the policies from it?"""
    setting, seeds, label = {"rounds": 4 * ROUNDS, "cold": COLD}, lab.some(rules.seeds_of(3)), "firm β=10 groups"
    preference_sweeps(lab, "long", setting, seeds, (label,))
    cooled(lab, lab.groups("long", {seed: sweep_jobs(lab, label, seed, setting) for seed in seeds}))


def sweep_jobs(lab: Lab, label: str, seed: int, setting: dict) -> list[dict]:
    """One seed's sweep of what a label names, at the common setting but for `setting`; soups are one job."""
    preferences, shared = lab.some(PREFERENCES), COMMON | setting | rules.variant(label) | {"seed": seed}
    if label == "soups":
        return [shared | {"preferences": list(preferences)}]
    return [shared | {"preference": [p, round(1.0 - p, 1)]} for p in preferences]


def preference_sweeps(
    lab: Lab, name: str, setting: dict, seeds: Sequence[int], labels: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Runs, table and picture; returns each label's means by preference, see `mean_points`.

    All at the common setting: FIRM at a large β is nearly `linear`, and at other rates would differ by the rates.
    """
    preferences = lab.some(PREFERENCES)
    # Whole seeds first, so that an unfinished experiment is a smaller one.
    jobs = {(seed, label): sweep_jobs(lab, label, seed, setting) for seed in seeds for label in labels}
    sweeps = lab.groups(name, jobs)
    groups = {label: [row for seed in seeds for row in sweeps[seed, label]] for label in labels}
    volumes = {label: [{"seed": s, "hv": sweep_volume(sweeps[s, label])} for s in seeds] for label in labels}
    test = {}
    for critic in (True, False):  # like is tested against like: FIRM's own critic, or FIRM's own groups
        alike = {label: rows for label, rows in volumes.items() if (label == rules.with_critic(label)) == critic}
        test |= against(alike, next(iter(alike)), "hv") if alike else {}
    base = np.array([np.mean(column(groups[labels[0]], f"base_{figure}")) for figure in NAMES])
    means = {label: mean_points(rows, preferences) for label, rows in groups.items()}
    lines = []
    for label, by_p in means.items():
        mean, kl, weight = by_p["mean"], by_p["kl"], by_p["lambda"]
        volume = sweep.normalised_hypervolume(mean, base, front_of(groups[label][0]))
        follows = [spearmanr(sign * np.array(preferences), mean[:, j]).statistic for j, sign in ((0, 1), (1, -1))]
        lines.append([
            label, cell(volumes[label], "hv"), f"{volume:.3f}", *(f"{r:+.3f}" for r in follows),
            int((mean <= base).all(1).sum()), "–" if label == "soups" else f"{weight[0]:.2f} to {weight[-1]:.2f}",
            f"{min(kl):.1f} to {max(kl):.1f}", *test[label],
        ])  # fmt: skip
    head = ["method", "normalised hypervolume", "of the mean points", "Spearman of p₁ and helpful",
            "of p₂ and harmless", "points dominated by the base", "realised λ̄ of helpful", "KL",
            "FIRM with the same update − method", "p (Holm)"]  # fmt: skip
    rounds = int(groups[labels[0]][0]["rounds"])  # 2 in miniature
    note = f"{len(seeds)} seeds from {seeds[0]}, {rounds} rounds, {len(preferences)} preferences; Spearman on seed "
    note += "means. Soups are two trainings a seed, the others one per preference."
    show(lab.results, name, head, lines, note)
    plots.pareto(means, base, toy.pareto_front(), NAMES, lab.results / f"{name}.png", over=f"{len(seeds)} seeds")
    return means


# ---- ablations ------------------------------------------------------------------------------------------------


def ablate(
    lab: Lab, name: str, keys: tuple[str, str], variants: dict[tuple, dict], figures: Sequence[str],
    drawn: Sequence[str], n_seeds: int = 3, note: str = "",
) -> None:  # fmt: skip
    """A table of `figures` with a line per variant, and a picture of those `drawn`; keys name its lines and its x.

    A figure `same_NAME` is NAME under a row's β on the Grams of its seed's run at β = 0, over the same at β = 0.
    """
    groups = rules.at_common_setting(lab, name, n_seeds, variants)
    for figure in (figure.removeprefix("same_") for figure in figures if figure.startswith("same_")):
        at_zero = {row["seed"]: row for row in groups["firm", "0"]}
        for row in (row for rows in groups.values() for row in rows):
            own, zero = (f"{figure}@{beta:g}" for beta in (row["beta"], 0.0))
            row[f"same_{figure}"] = at_zero[row["seed"]][own] / at_zero[row["seed"]][zero]
            row.setdefault(figure, row[own])  # no round logs `twin_disagreement`
    table(lab.results, name, keys, groups, figures, note)
    plots.panels(curves(groups, keys[1], drawn), lab.results / f"{name}.png", note=BARS)


def beta(lab: Lab) -> None:
    """β: what it does to λ on one and the same Grams, and what training with it does."""
    variants = {("firm", f"{b:g}"): {"beta": b} for b in lab.some(BETAS)}
    figures = ("same_disagreement", "same_drift", "disagreement", "drift", "movement", *NAMES, "worst_gain", "kl")
    drawn = ("same_disagreement", "same_drift", "disagreement", *NAMES, "kl")
    ablate(lab, "beta", ("method", "β"), variants, figures, drawn, n_seeds=5)


def learners(lab: Lab) -> None:
    """How closely the critic is fitted in every round, from not at all to 16 conjugate gradients; or no critic."""
    variants = {("critic", steps): {"critic_steps": steps} for steps in lab.some((0, 2, 4, 6, 8, 16))}
    variants |= {("groups", "no critic"): {"advantages": "group"}, ("GRPO", "no critic"): {"advantages": "grpo"}}
    figures = (*NAMES, "worst_gain", "kl", *(f"explained_variance_{name}" for name in NAMES))
    ablate(lab, "learners", ("advantages", "critic's steps a round"), variants, figures, figures[2:], n_seeds=10)


def twins(lab: Lab) -> None:
    """M = 3, the third objective a near copy of the first: where unregularised weights jump. p = (¼, ½, ¼)."""
    changes = {"objectives": [*BASE["objectives"], "py:worlds/toy.py:twin"], "preference": [0.25, 0.5, 0.25]}
    variants = {("firm", f"{b:g}"): {"beta": b} | changes for b in lab.some((0.0, 0.01, 0.1, 1.0))}
    at_zero = rules.at_common_setting(lab, "twins", 5, variants)["firm", "0"]
    mean, largest = np.mean(column(at_zero, "gap")), max(column(at_zero, "gap_max"))
    note = f"Gap ‖g₁ − g₃‖² / tr G at β = 0: mean {mean:.1e}, largest {largest:.1e}."
    figures = ("same_twin_disagreement", "same_drift", "twin_disagreement", "drift", *NAMES, "kl", "gap", "gap_small")
    drawn = ("same_twin_disagreement", "same_drift", *NAMES)
    ablate(lab, "twins", ("method", "β"), variants, figures, drawn, n_seeds=5, note=note)


def rank(lab: Lab) -> None:
    """LoRA rank, with α/r fixed (α = 2r) and with rsLoRA (α/√r, equal to the other at r = 8)."""
    scales = {"α/r": {}, "rsLoRA": {"rslora": True, "lora_alpha": 2 * 8**0.5}}
    variants = {(scale, r): {"lora_rank": r} | scales[scale] for scale, r in product(scales, lab.some((1, 4, 16)))}
    drawn = ("worst_gain", "disagreement", "averaging_residual")
    ablate(lab, "rank", ("scale", "rank"), variants, (*NAMES, *drawn, "upload_payload", "kl"), drawn)


def clients(lab: Lab) -> None:
    """2, 3, 8, 32 clients: with 16 prompts each, and with about 128 in all (3 · 43 = 129)."""
    counts = lab.some((2, 3, 8, 32))
    variants = {("16 per client", c): {"clients": c, "batch_size": 16} for c in counts}
    variants |= {("about 128 in all", c): {"clients": c, "batch_size": round(128 / c)} for c in counts}
    drawn = ("worst_gain", "disagreement", "drift")
    ablate(lab, "clients", ("prompts a round", "clients"), variants, (*NAMES, *drawn, "half_cosine", "kl"), drawn)


def heterogeneity(lab: Lab) -> None:
    """iid, Dirichlet 1 and 0.1 over topics: the iid split is the floor that sampling noise alone makes."""
    splits = {"iid": {"split": "iid"}}
    splits |= {f"Dir({a:g})": {"split": "dirichlet", "dirichlet_alpha": a} for a in lab.some((1.0, 0.1))}
    labels = product(("firm", "firm β=1", "mgda", "linear"), splits)
    variants = {(label, split): VARIANTS[label] | splits[split] for label, split in labels}
    drawn, keys = ("worst_gain", "disagreement", "drift"), ("method", "split among clients")
    ablate(lab, "heterogeneity", keys, variants, (*NAMES, *drawn, "dispersion", "kl"), drawn)


def trace(lab: Lab) -> None:
    """The trace normalisation switched off: β then means something else whenever the gradients change size."""
    variants = {(gram, f"{b:g}"): {"gram": gram, "beta": b} for gram in ("normalised", "raw") for b in (0.01, 1.0)}
    figures = ("trace_first", "trace_last", "disagreement", "drift", *NAMES, "worst_gain", "kl")
    note = "On the raw Gram β acts as β / tr G does on the normalised one."
    ablate(lab, "trace", ("Gram", "β"), variants, figures, ("disagreement", "drift", "worst_gain"), note=note)


def noise(lab: Lab) -> None:
    """λ from the Gram of one batch against the symmetrised cross Gram of two half-batches."""
    sizes, grams = lab.some((8, 16, 64)), {"one batch": "normalised", "two halves": "cross"}
    variants = {
        (label, b): {"gram": grams[label], "batch_size": b, "split": "iid"} for label, b in product(grams, sizes)
    }
    groups = rules.at_common_setting(lab, "noise", 3, variants)
    figures = ("half_cosine", "error_batch", "error_cross", "error_constant", "lambda1_batch", "lambda1_cross",
               "lambda1_reference", "disagreement", "drift", "worst_gain", "kl")  # fmt: skip
    note = "The reference is λ of the other clients' mean gradient."
    table(lab.results, "noise", ["λ from", "prompts"], groups, figures, note)
    estimates = {"one batch": "error_batch", "two halves": "error_cross", "λ = p, no gradient": "error_constant"}
    errors = {(label, b): [{"error": row[estimates[label]]} for row in groups["one batch", b]]
              for label, b in product(estimates, sizes)}  # fmt: skip
    x_label = "prompts per client and round"
    panels = curves(errors, x_label, ["error"]) + curves(groups, x_label, ("disagreement", "worst_gain"))
    plots.panels(panels, lab.results / "noise.png", note=BARS)


def communication(lab: Lab) -> None:
    """Bytes per client and round for M = 2, 3, 4 objectives, as serialised; the payload in adapters of d numbers."""
    objectives = [*BASE["objectives"], "py:worlds/toy.py:twin", "rule:brevity"]
    shared = {"rounds": 1, "held_out": 16, "eval_samples": 1, "seed": 0}
    jobs = {(method, M): [shared | {"method": method, "objectives": objectives[:M]}]
            for method in ("firm", "linear", "fsmgda", "fedcmoo") for M in (2, 3, 4)}  # fmt: skip
    jobs["fedcmoo e=0.5", 2] = [jobs["fedcmoo", 2][0] | {"fedcmoo_compression": 0.5}]
    groups, d = lab.groups("communication", jobs), Session(Config.from_flat(BASE)).policy.adapter.size
    figures = [f"{way}_{part}" for way in ("upload", "download") for part in ("adapters", "header", "scalars")]
    for (row,) in groups.values():
        row |= {figure: int(row[figure]) for figure in figures if figure in row}
        row |= {f"{way}_adapters": row[f"{way}_payload"] / (4 * d) for way in ("upload", "download")}
    note = f"Payload in adapters of d = {d:,} float32 numbers, the rest in bytes. Once per run on top, for the "
    note += "calibration: 24M bytes up and 16M bytes down per client."
    table(lab.results, "communication", ["method", "objectives M"], groups, figures, note)
    panels = curves(groups, "objectives M", ("upload_adapters", "download_adapters"))
    plots.panels(panels, lab.results / "communication.png")


EXPERIMENTS = {f.__name__: f for f in (tuning, communication, agreement, baselines, beta, twins, heterogeneity, noise,
                                       trace, rank, clients, learners, groups, pareto, long, fedmoa,
                                       saturation, predictor, plural, faults, survivors, processes,
                                       soak)}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 on bad usage, 130 when stopped by the user."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    names = f"all, or some of {', '.join(EXPERIMENTS)}"
    parser.add_argument("names", nargs="+", metavar="NAME", choices=("all", *EXPERIMENTS), help=names)
    parser.add_argument("--quick", action="store_true", help="in miniature, to runs/quick: the figures mean nothing")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of one thread each")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"workers: {options.workers} must be at least 1")
    lab = Lab(Path("runs/quick" if options.quick else "results"), options.quick, options.workers)
    toy.prepare(), reasoning.prepare()  # once, not in every worker
    try:
        for name in EXPERIMENTS if "all" in options.names else options.names:
            EXPERIMENTS[name](lab)
    except KeyboardInterrupt:
        print("stopped; the rows so far are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
