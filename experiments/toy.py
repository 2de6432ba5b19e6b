"""The experiments of the toy world: preferences, conflict, the worst objective, stationarity, bytes. [ours]

A gain is in standard deviations of the base policy's rewards, the worst is that of the objective that gained least.
`level` is how much the judge of harmless opposes helpful (`worlds/toy.py`). Sweeps: `metrics.normalised_hypervolume`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch
from scipy.stats import spearmanr
from torch import Tensor

import baselines
import firm
import mgda
import run
from app import metrics, sweep
from app.files import nan_for_null, read_json, read_lines
from app.options import PRESETS
from app.plots import FRONT, Panel, panels
from clients import Context
from experiments.lab import COMMON, KAPPAS, TUNING_SEEDS, Experiment, at_kappas, by_rate, seeds, settings_of
from experiments.tables import Groups, Row, interval, markdown, mean_line, number
from methods import METHODS
from settings import Config
from worlds import toy

BASE = PRESETS["tiny"] | {"diagnostics": True}  # what a job's settings change
NAMES = ("helpful", "harmless")
PREFERENCES = (0.1, 0.3, 0.5, 0.7, 0.9)  # p₁, of helpful
HORIZONS = (8, 16, 32, 64, 128)  # rounds, over whose first T stationarity is averaged
HELPFUL, JUDGE = "py:worlds/toy.py:helpful", "harmless=py:worlds/toy.py:"
LEVELS = {  # who judges harmless: gradients hardly conflict, or strongly; at last two objectives are against one
    "mild": [HELPFUL, f"{JUDGE}harmless"], "strict": [HELPFUL, f"{JUDGE}strict"],
    "two against one": [HELPFUL, f"{JUDGE}strict", "py:worlds/toy.py:twin"],
}  # fmt: skip
SPLITS = {"iid": {"split": "iid"}, "α = 0.1": {"dirichlet_alpha": 0.1}}


class SharedLambda(baselines.FedCMOOServer):
    """FIRM's λ, one for a round, from the uncompressed gradients of all clients at θ_t, which are not billed."""

    def broadcast(self, federation: firm.Federation, work: Iterable, faults: dict) -> dict[str, Tensor]:
        """The λ [M] of a round."""
        J = baselines.gradients_at_start(federation, work, faults)
        total = sum(len(federation.clients[c].prompts) * of_client for c, of_client in J.items())  # [M, d]
        return {"lambda": mgda.solve(mgda.normalise(mgda.gram(total)), self.config.beta, self.config.preference)}


def varied(kept: bool, more: float, context: Context) -> Tensor:
    """FIRM's λ; in a round's later steps that of the first, if `kept`, with `more` of the first of two objectives."""
    if context.epoch == 0 or not kept:
        context.state["lambda"] = firm.min_norm(context)
    shift = torch.tensor([more, -more, 0.0], dtype=torch.float64)[: len(context.gram)] * (context.epoch > 0)
    return (context.state["lambda"] + shift).clamp(0.0, 1.0)


RULES = {"firm-kept": (True, 0.0), "firm-raised": (False, 0.02), "kept-lowered": (True, -0.02)}
VARIANTS = {name: replace(firm.FIRM, weights=replace(firm.MIN_NORM, function=partial(varied, *rule)))
            for name, rule in RULES.items()}  # fmt: skip
VARIANTS["firm-shared"] = replace(baselines.FEDCMOO, server=SharedLambda)


@patch.dict(METHODS, VARIANTS)
def measure(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job, of the preset `tiny` with --diagnostics if it names none. Soups: a row for each p."""
    settings = (PRESETS[job["preset"]] if "preset" in job else BASE) | job
    if job["method"] == "soups":
        return soups(settings, directory)
    out = directory / "run"
    config = Config(**settings | {"out": str(out)})
    summary = run.train(config, progress=False)
    row = outcome(config, summary) | of_rounds(read_lines(out / "metrics.jsonl"), summary)
    if config.diagnostics:
        row |= of_grams(list(map(safetensors.torch.load_file, sorted((out / "grams").iterdir()))), config)
    return [row]


def soups(settings: dict, directory: Path) -> list[Row]:
    """Rewarded Soups: a specialist per objective, then a row for each of the `preferences` p₁."""
    shared = {name: value for name, value in settings.items() if name != "preferences"}
    ones = [Config(**shared | {"preference": [p, round(1.0 - p, 12)]}) for p in settings["preferences"]]
    sweep.soups(ones, NAMES, directory, lambda config, resume, title: run.train(config, resume, progress=False))
    mixtures = [directory / sweep.label(one.preference) / "summary.json" for one in ones]
    return [outcome(one, read_json(file, nan_for_null)) for one, file in zip(ones, mixtures, strict=True)]


def outcome(config: Config, summary: dict) -> Row:
    """Held-out means in raw units, gains and their errors over the prompts, and the KL."""
    p = config.preference[0] if config.preference else 1 / len(config.objectives)
    row = {"p": p, "kl": summary["kl"]["mean"], "seconds": summary["seconds"]}
    for name, figures in summary["objectives"].items():
        gain, error = (figures["gain"][key] / figures["calibration"]["scale"] for key in ("mean", "standard_error"))
        row |= {f"base_{name}": figures["before"]["mean"], name: figures["after"]["mean"]}
        row |= {f"gain_{name}": gain, f"error_{name}": error}
    return row | {"worst_gain": min(row[f"gain_{name}"] for name in summary["objectives"])}


def of_rounds(lines: list[dict], summary: dict) -> Row:
    """Means over the rounds; the roughness of the held-out rewards' curves; stationarity over the first T rounds.

    Roughness² is the mean squared second difference / 6 in variances of the base policy's rewards, the mean over
    objectives: 0 for a line, σ² for white noise around one. Every round answers from the same random numbers.
    """
    logged = dict(disagreement="lambda/disagreement", lambda_helpful="lambda/helpful", dispersion="adapter/dispersion")
    logged |= {name: name for name in ("cosine", "drift", "upload_bytes", "download_bytes")}
    row = {name: float(np.mean([line[key] for line in lines])) for name, key in logged.items() if key in lines[0]}
    if len(lines) > 2 and "held_out_kl" in lines[0]:
        curves = {name: [line[f"held_out/{name}"] for line in lines] for name in summary["objectives"]}
        scales = {name: figures["calibration"]["scale"] for name, figures in summary["objectives"].items()}
        squares = [np.mean((np.diff(curve, 2) / scales[name]) ** 2) / 6 for name, curve in curves.items()]
        row["roughness"] = float(np.mean(squares)) ** 0.5
    if len(lines) >= HORIZONS[-1]:
        row |= {f"stationarity@{T}": float(np.mean([line["stationarity"] for line in lines[:T]])) for T in HORIZONS}
    return row


def of_grams(grams: list[dict[str, Tensor]], config: Config) -> Row:
    """From the Grams of T rounds: figures of the objectives' gradients, and of min-norm weights λ.

    length_ratio, gap    of the first gradient over the second, geometric mean; ‖g₁ − g_M‖² / tr G
    signal               share of tr G that two halves of a batch have in common: the rest is noise
    twin_disagreement    how clients differ in λ₁ − λ_M
    lambda_error         of a batch's λ, half the distance between those of its halves, λ_a and λ_b (root mean square)
    p_error              of p, from (λ_a − p)·(λ_b − p), in which the halves' noise cancels; 0 if that is negative.
        Noise makes the gradients' lengths alike, which draws λ to the middle: these two do not see it
    """
    G = torch.stack([gram["steps"][:, 0] for gram in grams])  # [T, C, K, M, M]
    squares = G.diagonal(dim1=-2, dim2=-1)
    ratio = (squares[..., 0] / squares[..., 1]).sqrt().log().mean().exp()
    gap = ((squares[..., 0] - 2 * G[..., 0, -1] + squares[..., -1]) / squares.sum(-1)).mean()
    start = torch.stack([torch.einsum("chmcin->chmin", gram["start"]) for gram in grams])  # [T, C, 2, M, 2, M]
    common = 4 * torch.einsum("tcmm->", start[:, :, 0, :, 1]) / torch.einsum("tchmim->", start)
    row = {"gap": float(gap), "length_ratio": float(ratio), "signal": float(common)}
    if config.method not in ("firm", "mgda"):
        return row
    halves = torch.stack([start[:, :, half, :, half] for half in (0, 1)])  # [2, T, C, M, M]
    beta, preference = config.beta * (config.method == "firm"), config.preference

    def solved(grams: Tensor) -> Tensor:  # [..., M, M] -> [..., M]
        weights = [mgda.solve(mgda.normalise(gram), beta, preference) for gram in grams.flatten(0, -3)]
        return torch.stack(weights).view(grams.shape[:-1])

    lam, (a, b) = map(solved, (G, halves))  # [T, C, K, M]; [T, C, M] each
    p, apart = mgda.preference_vector(preference, lam.shape[-1]), lam - lam.mean(1, keepdim=True)
    squared = {"lambda_error": (a - b).square() / 4, "p_error": (a - p) * (b - p)}
    row |= {name: float(x.sum(-1).mean().clamp_min(0.0).sqrt()) for name, x in squared.items()}
    return row | {"twin_disagreement": float((apart[..., 0] - apart[..., -1]).abs().mean())}


def volumes(groups: Groups) -> Groups:
    """Each seed's sweep of preferences at each κ as one row: its normalised hypervolume and mean KL."""
    result, front = {}, toy.pareto_front()  # half of the held-out prompts are risky, as it takes for granted
    for label, rows in groups.items():
        result[label] = []
        for seed, kappa in dict.fromkeys((row["seed"], row["kl_coef"]) for row in rows):
            points = [row for row in rows if (row["seed"], row["kl_coef"]) == (seed, kappa)]
            mean, base = (np.array([[row[kind + name] for name in NAMES] for row in points]) for kind in ("", "base_"))
            row = {"seed": seed, "kl_coef": kappa, "kl": float(np.mean([row["kl"] for row in points]))}
            result[label].append(row | {"hypervolume": metrics.normalised_hypervolume(mean, base[0], front)})
    return result


def trade_offs(groups: Groups, path: Path) -> str:
    """The seeds' mean points by preference, at the middle κ: a table, and a picture of them before the exact front."""
    lines, drawn = [], {FRONT: (*toy.pareto_front().T, None)}
    kappas = sorted({row["kl_coef"] for rows in groups.values() for row in rows})
    for label, rows in groups.items():
        ps = sorted({row["p"] for row in rows})
        points = [[row for row in rows if (row["p"], row["kl_coef"]) == (p, kappas[len(kappas) // 2])] for p in ps]
        drawn[label] = mean_line(points, *NAMES)
        columns = (*NAMES, "kl", "lambda_helpful")
        mean = np.array([[np.mean([row.get(c, math.nan) for row in some]) for c in columns] for some in points])
        follows = [spearmanr(ps, sign * mean[:, j]).statistic for j, sign in ((0, 1), (1, -1))]
        ends = zip(mean[:, 2:].min(0), mean[:, 2:].max(0), strict=True)
        cells = ["–" if math.isnan(low) else f"{low:.2f} to {high:.2f}" for low, high in ends]
        lines.append([label, *(f"{r:+.3f}" for r in follows), *cells])
    axes = (f"{name} (raw units)" for name in NAMES)
    panels([Panel(*axes, "Means over the seeds, p of helpful 0.1 to 0.9", drawn)], Path(f"{path}.png"), size=6.0)
    return markdown(["seed means", "Spearman of p₁ and helpful", "of p₂ and harmless", "KL", "λ̄ of helpful"], lines)


def over_rounds(groups: Groups, path: Path) -> str:
    """Of the seeds' mean: the slope of log stationarity in log T, with a jackknife interval; means within blocks."""
    lines, drawn, ends = [], {}, np.array(HORIZONS)
    for label, rows in groups.items():
        name, _, batch = label.partition(", ")
        values = np.array([[row.get(f"stationarity@{T}", math.nan) for T in HORIZONS] for row in rows])  # [n, T]
        drawn.setdefault(batch, {})[name] = (ends, values.mean(0), [interval(column)[1] for column in values.T])
        without = [np.delete(values, i, 0).mean(0) for i in range(len(rows))] if len(rows) > 1 else [values[0]]
        slope, *slopes = (np.polyfit(np.log(ends), np.log(mean), 1)[0] for mean in (values.mean(0), *without))
        half = (len(rows) - 1) * interval(slopes)[1]  # the jackknife's error is (n − 1) that of a mean
        blocks = np.diff(ends * values.mean(0), prepend=0) / np.diff(ends, prepend=0)
        lines.append([label, f"{slope:+.2f} ± {half:.2f}", *map(number, blocks)])
    contents = [Panel("rounds T", "mean ‖Jᵀλ‖² over T rounds", *each, log=True) for each in drawn.items()]
    panels(contents, Path(f"{path}.png"), size=4.8)
    return markdown(["", "slope", "within rounds 1 to 8", *(f"to {T}" for T in HORIZONS[1:])], lines)


def in_world(level: str, labels: Sequence[str]) -> dict[str, dict]:
    """Methods where gradients conflict and clients differ, at equal rollouts: soups are two trainings of 8 rounds."""
    hard, halved = CLIENTS | SPLITS["α = 0.1"] | {"objectives": LEVELS[level]}, {"preferences": [0.5], "rounds": 8}
    return {label: hard | settings_of(label) | (halved if label == "soups" else {"rounds": 16}) for label in labels}


def comparison(variants: dict[str, dict], families: dict, first: int = 40) -> Experiment:
    """Who serves the worst-served objective, at three κ."""
    figures = ["worst_gain", "worst_gain:median", "worst_gain:fell", "gain_helpful", "gain_harmless", "kl", "cosine",
               "lambda_helpful", "disagreement", "length_ratio", "signal", "lambda_error", "p_error"]  # fmt: skip
    note = "16 rounds, 4 clients × 64 responses, Dirichlet 0.1, one rate. Fell: an objective ended 0.3 below the base."
    jobs, drawn = at_kappas(6, first=first), ("kl", "worst_gain")
    return Experiment(measure, variants, jobs, figures, families, drawn[1:], note=note, drawn=drawn)


CLIENTS = COMMON | {"clients": 4, "batch_size": 64}
TUNING = [seed | {"kl_coef": KAPPAS[1]} for seed in TUNING_SEEDS]
BASELINES = ("firm β=1", "mgda", "linear", "morlhf", "fsmgda", "fedcmoo")
TWO = in_world("strict", ("firm", *BASELINES, "soups", "firm groups", "linear groups", "firm grpo"))
THREE = in_world("two against one", ("firm", *BASELINES))
SCOPE = in_world("two against one", ("firm", "firm-kept", "firm-shared", "fedcmoo"))
THREE["linear ¼ ½ ¼"] = SCOPE["linear ¼ ½ ¼"] = THREE["linear"] | {"preference": [0.25, 0.5, 0.25]}
PULL = {f"{x}, {level}": job | {"kl_coef": KAPPAS[1]}
        for level, some in (("strict", ("firm", *RULES)), ("mild", ("firm", "firm-kept")))
        for x, job in in_world(level, some).items()}  # fmt: skip
STRICT = {f"{label}, strict": job for label, job in in_world("strict", ("firm", "firm-kept")).items()}
SGD = {"optimizer": "sgd", "lr": 0.3, "server_lr": 1.0}  # the better of 0.3 and 1 on seed 101
PULL["firm, SGD, 64 rounds, strict"] = PULL["firm, strict"] | SGD | {"rounds": 64}

EXPERIMENTS = {
    "communication": Experiment(
        measure, {f"{name}, M = {M}": {"method": name, "objectives": [*LEVELS["two against one"], "rule:brevity"][:M]}
         for name in ("firm", "linear", "fsmgda", "fedcmoo") for M in (2, 3, 4)},
        [{"seed": 0, "rounds": 1, "held_out": 16, "eval_samples": 1}], ["upload_bytes", "download_bytes"],
        note="Bytes of one client and round. An adapter has d = 17,408 numbers, 69,632 bytes; named numbers have 8.",
    ),
    "pareto": Experiment(  # a sweep of preferences, where the exact front is known
        measure, {x: COMMON | {"rounds": 16} | settings_of(x) for x in ("firm β=10", "firm", "linear", "morlhf")}
        | {"soups": COMMON | {"rounds": 16, "method": "soups", "preference": None, "preferences": list(PREFERENCES)}},
        [job | {"preference": [p, round(1.0 - p, 1)]} for job, p in product(at_kappas(5), PREFERENCES)],
        ["hypervolume", "kl"], {"FIRM at 10 less": [("firm β=10", x) for x in ("firm", "linear", "morlhf", "soups")]},
        ["hypervolume"], derive=volumes, more=trade_offs,
        note="16 rounds, five preferences. Soups are two trainings a seed, the others five.",
    ),
    "conflict": Experiment(  # what β does to the clients' agreement and to smoothness
        measure, {f"{name}, {split} @ {level}": CLIENTS | settings_of(name) | SPLITS[split] | {
            "batch_size": 128, "kl_coef": KAPPAS[1], "objectives": LEVELS[level]}
         for split in SPLITS for level in LEVELS for name in ("firm β=0", "firm β=0.01", "firm β=1")},
        [{"rounds": 16, "eval_every": 1, "held_out": 64, "eval_samples": 4} | seed for seed in seeds(4)],
        ["cosine", "signal", "lambda_error", "p_error", "disagreement", "drift", "dispersion", "roughness",
         "worst_gain", "kl", "lambda_helpful", "length_ratio", "gap", "twin_disagreement"],
        {f"FIRM at β = {beta} less β = 0": [(f"firm β={beta}, {split} @ {level}", f"firm β=0, {split} @ {level}")
                                          for split in SPLITS for level in LEVELS] for beta in ("0.01", "1")},
        ["disagreement", "drift", "dispersion", "roughness"],
        note="16 rounds, 4 clients × 128 responses. The gap of two against one is ‖g₁ − g₃‖² / tr G.",
    ),
    "worst_tuning": Experiment(measure, by_rate(TWO), TUNING, ["worst_gain", "kl"]),
    "worst": comparison(TWO, {
        "FIRM less each method": [("firm", label) for label in (*BASELINES, "soups")],
        "Groups, not a critic": [("firm groups", "firm"), ("linear groups", "linear"), ("firm grpo", "firm groups")]}),
    "minority_tuning": Experiment(measure, by_rate(THREE), TUNING, ["worst_gain", "kl"]),
    "minority": comparison(THREE, {"FIRM less each": [("firm", label) for label in (*BASELINES, "linear ¼ ½ ¼")]}),
    "scope": comparison(SCOPE | STRICT, {
        "Each less FIRM": [(label, "firm") for label in SCOPE if label != "firm"], "Kept where two oppose each other":
        [("firm-kept, strict", "firm, strict")], "One λ for all clients": [("firm-shared", "firm-kept")]}, first=46),
    "pull": Experiment(  # planned after a trial on seeds 52 to 57
        measure, PULL, seeds(6, first=58), ["worst_gain", "worst_gain:fell", "gain_helpful", "gain_harmless", "kl"],
        {"Other λ in later steps": [(f"{a}, {x}", f"{b}, {x}") for a, b, x in (("firm-raised", "firm", "strict"),
            ("firm-kept", "firm", "strict"), ("kept-lowered", "firm-kept", "strict"), ("firm-kept", "firm", "mild"))]},
        ["worst_gain", "gain_helpful"], note="As worst, at one κ: unequal KL. Raised, lowered: helpful's λ by 0.02."),
    "stationarity": Experiment(
        measure, {f"{x}, batch {batch}{where}": CLIENTS | settings_of(x.split()[0]) | changes | world
         | {"batch_size": batch, "kl_coef": 0.0, "split": "iid"}
         for batch, where, world in ((16, "", {}), (64, "", {}), (64, ", strict", {"objectives": LEVELS["strict"]}))
         for x, changes in (("firm", {}), ("mgda", {}), ("linear", {}), ("firm sgd", SGD)) if not where or "firm" in x},
        [{"rounds": 128, "held_out": 32} | seed for seed in seeds(4)],
        [*(f"stationarity@{T}" for T in HORIZONS), "worst_gain", "kl"], more=over_rounds,
        note="No KL penalty. Slopes are of logarithms; the theorem's −0.5 is for steps chosen for T.",
    ),
}  # fmt: skip
