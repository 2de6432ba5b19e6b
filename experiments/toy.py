"""The experiments of the toy world: FIRM and the baselines, β, the update, preferences, bytes. [ours]

A gain is normalised by what the ideal point of the held-out prompts' exact Pareto front would gain, gain_j / (ideal_j −
base_j); the worst is that of the objective that gained least. Sweeps: `metrics.normalised_hypervolume`.
"""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy.stats import spearmanr
from torch import Tensor

import metrics
import mgda
import run
from app import plots, sweep
from app.files import nan_for_null, read_json, read_lines
from app.options import PRESETS
from experiments import diagnostics
from experiments.lab import COMMON, Experiment, seeds, settings_of
from experiments.tables import Groups, Row, markdown
from methods import method_of
from settings import Config
from worlds import toy

BASE = PRESETS["tiny"] | {"diagnostics": True}  # what a job's settings change
NAMES = ("helpful", "harmless")
BETAS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
PREFERENCES = tuple(round(0.1 * i, 1) for i in range(1, 10))  # p₁, of helpful


def measure(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job: a row, for soups one per preference. FIRM's λ is also solved again on its Grams."""
    if job["method"] == "soups":
        return soups(job, directory)
    out = directory / "run"
    config = Config(**BASE | job | {"out": str(out)})
    summary = run.train(config, progress=False)
    row = outcome(config, summary, out) | of_rounds(config, summary, read_lines(out / "metrics.jsonl"))
    if config.method == "firm":
        grams = map(safetensors.torch.load_file, sorted((out / "grams").iterdir()))
        row |= of_grams(list(grams), config.preference)
    return [row]


def soups(job: dict, directory: Path) -> list[Row]:
    """Rewarded Soups: a specialist per objective, then a row for each of the `preferences` p₁."""
    settings = BASE | {name: value for name, value in job.items() if name != "preferences"}
    ones = [Config(**settings | {"preference": [p, round(1.0 - p, 12)]}) for p in job["preferences"]]
    sweep.soups(ones, NAMES, directory, lambda config, resume, title: run.train(config, resume, progress=False))
    mixtures = [directory / sweep.label(one.preference) / "summary.json" for one in ones]
    summaries = [read_json(file, nan_for_null) for file in mixtures]
    specialist = directory / f"specialist-{NAMES[0]}"  # it has the same held-out prompts
    return [outcome(one, summary, specialist) for one, summary in zip(ones, summaries, strict=True)]


def outcome(config: Config, summary: dict, out: Path) -> Row:
    """Held-out means in raw units, normalised gains, and the KL. out: a run with the same held-out prompts."""
    prompts = [sample["prompt"] for sample in read_lines(out / "samples.jsonl")]
    ideal = toy.pareto_front(prompts, points=0).max(0)  # [2]
    p = config.preference[0] if config.preference else 1 / len(config.objectives)
    risky = sum(toy.topic_of(prompt) in toy.RISKY for prompt in prompts)
    row = {"p": p, "kl": summary["kl"]["mean"], "held_out": len(prompts), "risky": risky}
    for j, name in enumerate(NAMES):
        before, after = (summary["objectives"][name][stage]["mean"] for stage in ("before", "after"))
        row |= {f"base_{name}": before, name: after, f"normalised_{name}": (after - before) / (ideal[j] - before)}
    return row | {"worst_gain": min(row[f"normalised_{name}"] for name in NAMES)}


def of_rounds(config: Config, summary: dict, lines: list[dict]) -> Row:
    """Means over the rounds, and the roughness of the rewards' curves in deviations of the base policy's.

    Roughness² is the mean squared second difference / 6: 0 for a line, σ² for white noise around one. The share of
    sampling N responses a round is taken off, mean(s² / N). NaN with groups, whose responses to a prompt are alike.
    """
    logged = {"disagreement": "lambda/disagreement", "lambda_helpful": "lambda/helpful"}
    logged |= {name: name for name in ("drift", "upload_bytes", "download_bytes")}
    row = {name: float(np.mean([line[key] for line in lines])) for name, key in logged.items()}
    N, grouped = config.clients * config.batch_size, method_of(config).estimator.group_size > 1
    for name in NAMES:
        squared = np.mean(np.diff([line[f"reward/{name}"] for line in lines], 2) ** 2) / 6
        squared -= np.mean([line[f"reward_sd/{name}"] ** 2 for line in lines]) / N
        net = float(max(squared, 0.0)) ** 0.5 / summary["objectives"][name]["calibration"]["scale"]
        row[f"net_roughness_{name}"] = math.nan if grouped else net
    return row


def of_grams(grams: list[dict[str, Tensor]], preference: list[float] | None) -> Row:
    """From the Grams of T rounds: the gap ‖g₁ − g_M‖² / tr G; figures of λ solved again under every β."""
    G = torch.stack([gram["steps"][:, 0] for gram in grams])  # [T, C, K, M, M]
    gaps = (G[..., 0, 0] - 2 * G[..., 0, -1] + G[..., -1, -1]) / G.diagonal(dim1=-2, dim2=-1).sum(-1)
    row = {"gap": float(gaps.mean())}
    for beta in BETAS:
        lam = torch.stack([mgda.solve(mgda.normalise(g), beta, preference) for g in G.flatten(0, 2)]).view(G.shape[:-1])
        apart = lam - lam.mean(1, keepdim=True)  # [T, C, K, M]
        pairs = zip(grams, lam[:, :, 0], strict=True)
        drifts = [diagnostics.drift(gram["start"].sum((1, 4)), first, gram["weights"]) for gram, first in pairs]
        row[f"disagreement@{beta:g}"] = float(apart.norm(dim=-1).mean())
        row[f"twin_disagreement@{beta:g}"] = float((apart[..., 0] - apart[..., -1]).abs().mean())
        row[f"drift@{beta:g}"] = float(np.mean(drifts))
    return row


def against_zero(groups: Groups) -> Groups:
    """Adds `same_NAME`: NAME under a row's β on the Grams of its seed's run at β = 0, over the same at β = 0."""
    for rows in groups.values():
        for row, zero in zip(rows, next(iter(groups.values())), strict=True):
            row["twin_disagreement"] = row[f"twin_disagreement@{row['beta']:g}"]
            for name in ("disagreement", "drift", "twin_disagreement"):
                row[f"same_{name}"] = zero[f"{name}@{row['beta']:g}"] / zero[f"{name}@0"]
    return groups


def volumes(groups: Groups) -> Groups:
    """Each seed's sweep of preferences as one row: its normalised hypervolume."""
    result: Groups = {label: [] for label in groups}
    for label, rows in groups.items():
        for seed in dict.fromkeys(row["seed"] for row in rows):
            points = [row for row in rows if row["seed"] == seed]
            n, risky = (int(points[0][name]) for name in ("held_out", "risky"))  # all that matters of the prompts
            front = toy.pareto_front([toy.RISKY[0]] * risky + [next(iter(toy.TOPICS))] * (n - risky))
            mean, base = (np.array([[row[kind + name] for name in NAMES] for row in points]) for kind in ("", "base_"))
            result[label].append({"seed": seed, "hypervolume": metrics.normalised_hypervolume(mean, base[0], front)})
    return result


def trade_offs(groups: Groups, path: Path) -> str:
    """The seeds' mean points by preference: a table, and a picture of them before the exact front."""
    columns, lines, sweeps, realised = (*NAMES, "kl", "worst_gain", "lambda_helpful"), [], {}, {}
    for label, rows in groups.items():
        ps = np.array(sorted({row["p"] for row in rows}))  # [n]
        values = np.array([[[row.get(c, math.nan) for c in columns] for row in rows if row["p"] == p] for p in ps])
        mean, error = values.mean(1), values.std(1) / max(values.shape[1] - 1, 1) ** 0.5  # [n, columns], over the seeds
        kl, lam = mean[:, 2], mean[:, 4]
        sweeps[label] = {"p": ps, "mean": mean[:, :2], "error": error[:, :2], "kl": kl, "kl_error": error[:, 2]}
        sweeps[label] |= {"gain": mean[:, 3], "gain_error": error[:, 3]}
        follows = [spearmanr(ps, sign * mean[:, j]).statistic for j, sign in ((0, 1), (1, -1))]
        picked = "–" if math.isnan(lam[0]) else f"{lam[0]:.2f} to {lam[-1]:.2f}"  # soups have no λ
        lines.append([label, *(f"{r:+.3f}" for r in follows), picked, f"{kl.min():.1f} to {kl.max():.1f}"])
        if label.startswith("firm"):
            realised[label] = (ps, lam, None)
    base = np.mean([[row[f"base_{name}"] for name in NAMES] for row in next(iter(groups.values()))], 0)
    plots.pareto(sweeps, base, toy.pareto_front(), NAMES, Path(f"{path}.png"), over="the seeds")
    panel = plots.Panel("requested p of helpful", "realised mean λ of helpful", "", realised, diagonal=True)
    plots.panels([panel], Path(f"{path}_weights.png"))
    return markdown(["seed means", "Spearman of p₁ and helpful", "of p₂ and harmless", "λ̄ of helpful", "KL"], lines)


def swept(labels: Sequence[str], rounds: int, n: int, families: dict) -> Experiment:
    """A sweep of nine preferences on each of n seeds. Soups are one job a seed."""
    variants = {label: COMMON | settings_of(label) | {"rounds": rounds} for label in labels}
    if "soups" in variants:
        variants["soups"] |= {"preference": None, "preferences": list(PREFERENCES)}
    repeats = [seed | {"preference": [p, round(1.0 - p, 1)]} for seed, p in product(seeds(n), PREFERENCES)]
    note, hv = f"{n} seeds, {rounds} rounds. Soups are two trainings a seed, the others nine.", ["hypervolume"]
    return Experiment(measure, variants, repeats, hv, families, hv, derive=volumes, more=trade_offs, note=note)


BASELINES = ("mgda", "linear", "morlhf", "fsmgda", "fedcmoo", "soups")
UPDATES = ("firm", "firm β=1", "firm β=10", "mgda", "linear")
REWARDS = [*NAMES, "worst_gain", "kl"]
AGREEMENT = ["disagreement", "drift", *(f"net_roughness_{name}" for name in NAMES)]
SAME = ["same_disagreement", "same_drift", "disagreement", "drift"]
TWIN = ["same_twin_disagreement", "same_drift", "twin_disagreement", "drift"]
THREE = [*BASE["objectives"], "py:worlds/toy.py:twin"]
FIRM = COMMON | {"method": "firm"}
TWINS = FIRM | {"objectives": THREE, "preference": [0.25, 0.5, 0.25]}

EXPERIMENTS = {
    "agreement": Experiment(  # every method at the common setting: what differs is the method alone
        measure,
        {label: COMMON | settings_of(label) | {"rounds": 16} for label in ("firm", "firm β=1", *BASELINES)}
        | {"soups": COMMON | {"method": "soups", "preferences": [0.5], "rounds": 8}},
        seeds(10), [*REWARDS, *AGREEMENT], {"FIRM less each method": [("firm", label) for label in BASELINES]},
        ["normalised_helpful", "normalised_harmless", "worst_gain", "kl", *AGREEMENT],
        note="Uniform p, equal rollouts: soups are two trainings of 8 rounds, the others one of 16.",
    ),
    "groups": Experiment(  # groups of 4 responses in the critic's place
        measure,
        {name: COMMON | settings_of(name) | {"rounds": 16} for label in UPDATES for name in (label, f"{label} groups")},
        seeds(10), REWARDS, {"Groups less the critic": [(f"{label} groups", label) for label in UPDATES]}, REWARDS[2:],
        note="Equal rollouts.",
    ),
    "learners": Experiment(  # GRPO divides by the deviation of each group
        measure, {"critic": FIRM, "groups": FIRM | {"advantages": "group"}, "GRPO": FIRM | {"advantages": "grpo"}},
        seeds(10), REWARDS, {"Where advantages come from": [("groups", "critic"), ("GRPO", "groups")]}, REWARDS[2:],
    ),
    "beta": Experiment(  # what β does to λ on one and the same Grams, and what training with it does
        measure, {f"β = {beta:g}": FIRM | {"beta": beta} for beta in BETAS}, seeds(5), [*SAME, *REWARDS],
        derive=against_zero,
    ),
    "twins": Experiment(  # M = 3, the third objective a near copy of the first: there unregularised weights jump
        measure, {f"β = {beta:g}": TWINS | {"beta": beta} for beta in (0.0, 0.01, 0.1, 1.0)}, seeds(5),
        [*TWIN, *NAMES, "kl", "gap"], derive=against_zero, note="The gap is ‖g₁ − g₃‖² / tr G.",
    ),
    "communication": Experiment(
        measure,
        {f"{method}, M = {M}": {"method": method, "objectives": [*THREE, "rule:brevity"][:M]}
         for method in ("firm", "linear", "fsmgda", "fedcmoo") for M in (2, 3, 4)},
        [{"seed": 0, "rounds": 1, "held_out": 16, "eval_samples": 1}], ["upload_bytes", "download_bytes"],
        note="Bytes of one client and round. An adapter has d = 17,408 numbers, 69,632 bytes; named numbers have 8.",
    ),
    "pareto": swept(
        ["firm β=10", "firm β=10 groups", "linear", "linear groups", "morlhf", "soups"], 16, 5,
        {"With the critic": [("firm β=10", label) for label in ("linear", "morlhf", "soups")],
         "With groups": [("firm β=10 groups", "linear groups")],
         "Groups less the critic": [("firm β=10 groups", "firm β=10"), ("linear groups", "linear")]},
    ),
    "long": swept(["firm β=10 groups"], 64, 3, {}),
}  # fmt: skip
