"""The experiments of the toy world: preferences, conflict, the worst objective, stationarity, bytes. [ours]

A gain is in standard deviations of the base policy's rewards, the worst is that of the objective that gained least.
`level` is how much the judge of harmless opposes helpful (`worlds/toy.py`). Sweeps: `metrics.normalised_hypervolume`.
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

import mgda
import run
from app import metrics, sweep
from app.files import nan_for_null, read_json, read_lines
from app.options import PRESETS
from app.plots import Panel, panels, pareto
from experiments.lab import COMMON, KAPPAS, TUNING_SEEDS, Experiment, seeds, settings_of
from experiments.tables import Groups, Row, interval, markdown
from settings import Config
from worlds import toy

BASE = PRESETS["tiny"] | {"diagnostics": True}  # what a job's settings change
NAMES = ("helpful", "harmless")
PREFERENCES = (0.1, 0.3, 0.5, 0.7, 0.9)  # p₁, of helpful
HORIZONS = (8, 16, 32, 64, 128)  # rounds, over whose first T stationarity is averaged
HELPFUL, JUDGE = "py:worlds/toy.py:helpful", "harmless=py:worlds/toy.py:"
LEVELS = {  # who judges harmless: the later, the more the gradients conflict; at last two objectives are against one
    "mild": [HELPFUL, f"{JUDGE}harmless"], "cautious": [HELPFUL, f"{JUDGE}cautious"],
    "strict": [HELPFUL, f"{JUDGE}strict"], "two against one": [HELPFUL, f"{JUDGE}strict", "py:worlds/toy.py:twin"],
}  # fmt: skip
SPLITS = {"iid": {"split": "iid"}, "α = 0.1": {"dirichlet_alpha": 0.1}}


def measure(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job: a row, for soups one per preference."""
    if job["method"] == "soups":
        return soups(job, directory)
    out = directory / "run"
    config = Config(**BASE | job | {"out": str(out)})
    summary = run.train(config, progress=False)
    row = outcome(config, summary, out) | of_rounds(read_lines(out / "metrics.jsonl"), summary)
    if config.method in ("firm", "mgda"):
        grams = map(safetensors.torch.load_file, sorted((out / "grams").iterdir()))
        row |= of_grams(list(grams), config.beta * (config.method == "firm"), config.preference)
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
    """Held-out means in raw units, gains, and the KL. out: a run with the same held-out prompts."""
    prompts = [sample["prompt"] for sample in read_lines(out / "samples.jsonl")]
    risky = sum(toy.topic_of(prompt) in toy.RISKY for prompt in prompts)
    row = {"p": config.preference[0] if config.preference else 1 / len(config.objectives), "kl": summary["kl"]["mean"]}
    for name, figures in summary["objectives"].items():
        gain = figures["gain"]["mean"] / figures["calibration"]["scale"]
        row |= {f"base_{name}": figures["before"]["mean"], name: figures["after"]["mean"], f"gain_{name}": gain}
    gains = [value for name, value in row.items() if name.startswith("gain_")]
    return row | {"worst_gain": min(gains), "held_out": len(prompts), "risky": risky}


def of_rounds(lines: list[dict], summary: dict) -> Row:
    """Means over the rounds; the roughness of the held-out rewards' curves; stationarity over the first T rounds.

    Roughness² is the mean squared second difference / 6 in variances of the base policy's rewards, the mean over
    objectives: 0 for a line, σ² for white noise around one. Every round answers from the same random numbers.
    """
    logged = {"disagreement": "lambda/disagreement", "lambda_helpful": "lambda/helpful"}
    logged |= {"dispersion": "adapter/dispersion"}
    logged |= {name: name for name in ("cosine", "drift", "stationarity", "upload_bytes", "download_bytes")}
    row = {name: float(np.mean([line[key] for line in lines])) for name, key in logged.items()}
    if len(lines) > 2 and "held_out_kl" in lines[0]:
        curves = {name: [line[f"held_out/{name}"] for line in lines] for name in summary["objectives"]}
        scales = {name: figures["calibration"]["scale"] for name, figures in summary["objectives"].items()}
        squares = [np.mean((np.diff(curve, 2) / scales[name]) ** 2) / 6 for name, curve in curves.items()]
        row["roughness"] = float(np.mean(squares)) ** 0.5
    means = {T: np.mean([line["stationarity"] for line in lines[:T]]) for T in HORIZONS if len(lines) >= T}
    if len(lines) >= HORIZONS[-1]:
        positive = min(means.values()) > 0
        row["slope"] = float(np.polyfit(*np.log([*zip(*means.items(), strict=True)]), 1)[0]) if positive else math.nan
    return row | {f"stationarity@{T}": float(mean) for T, mean in means.items()}


def of_grams(grams: list[dict[str, Tensor]], beta: float, preference: list[float] | None) -> Row:
    """From the Grams of T rounds: the gap ‖g₁ − g_M‖² / tr G, how clients differ in λ₁ − λ_M, and λ's noise ratio.

    The ratio is that of two distances (root mean squares) from the λ of a client without noise: that of the λ solved on
    its batch, half the distance between the halves' λ_a and λ_b; and that of p, from (λ_a − p)·(λ_b − p), in which the
    halves' noise cancels. Above 1 a batch says less about its client's λ than p does; NaN if p cannot be told from it.
    """
    G = torch.stack([gram["steps"][:, 0] for gram in grams])  # [T, C, K, M, M]
    gaps = (G[..., 0, 0] - 2 * G[..., 0, -1] + G[..., -1, -1]) / G.diagonal(dim1=-2, dim2=-1).sum(-1)
    halves = torch.stack([torch.einsum("chmchn->chmn", gram["start"]) for gram in grams])  # [T, C, 2, M, M]
    lam, of_half = (solved(each, beta, preference) for each in (G, halves))  # [T, C, K, M], [T, C, 2, M]
    apart = lam - lam.mean(1, keepdim=True)
    p = mgda.preference_vector(preference, lam.shape[-1])
    error = (of_half[:, :, 0] - of_half[:, :, 1]).square().sum(-1).mean() / 4
    from_p = (of_half - p).prod(2).sum(-1).mean()
    return {
        "gap": float(gaps.mean()), "twin_disagreement": float((apart[..., 0] - apart[..., -1]).abs().mean()),
        "noise_ratio": float((error / from_p).sqrt()),
    }  # fmt: skip


def solved(grams: Tensor, beta: float, preference: list[float] | None) -> Tensor:
    """λ [..., M] of Gram matrices [..., M, M]."""
    weights = [mgda.solve(mgda.normalise(gram), beta, preference) for gram in grams.flatten(0, -3)]
    return torch.stack(weights).view(grams.shape[:-1])


def volumes(groups: Groups) -> Groups:
    """Each seed's sweep of preferences at each κ as one row: its normalised hypervolume and mean KL."""
    result: Groups = {label: [] for label in groups}
    for label, rows in groups.items():
        for seed, kappa in dict.fromkeys((row["seed"], row["kl_coef"]) for row in rows):
            points = [row for row in rows if (row["seed"], row["kl_coef"]) == (seed, kappa)]
            n, risky = (int(points[0][name]) for name in ("held_out", "risky"))  # all that matters of the prompts
            front = toy.pareto_front([toy.RISKY[0]] * risky + [next(iter(toy.TOPICS))] * (n - risky))
            mean, base = (np.array([[row[kind + name] for name in NAMES] for row in points]) for kind in ("", "base_"))
            volume = metrics.normalised_hypervolume(mean, base[0], front)
            kl = float(np.mean([row["kl"] for row in points]))
            result[label].append({"seed": seed, "kl_coef": kappa, "kl": kl, "hypervolume": volume})
    return result


def trade_offs(groups: Groups, path: Path) -> str:
    """The seeds' mean points by preference, at the middle κ: a table, and a picture of them before the exact front."""
    columns, lines, sweeps, realised = (*NAMES, "kl", "worst_gain", "lambda_helpful"), [], {}, {}
    kappas = sorted({row["kl_coef"] for rows in groups.values() for row in rows})
    for label, every in groups.items():
        rows = [row for row in every if row["kl_coef"] == kappas[len(kappas) // 2]]
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
    axis = "worst gain (base-policy deviations)"
    pareto(sweeps, base, toy.pareto_front(), NAMES, Path(f"{path}.png"), axis, over="the seeds")
    panel = Panel("requested p of helpful", "realised mean λ of helpful", "", realised, diagonal=True)
    panels([panel], Path(f"{path}_weights.png"))
    return markdown(["seed means", "Spearman of p₁ and helpful", "of p₂ and harmless", "λ̄ of helpful", "KL"], lines)


def mean_line(points: Sequence[Sequence[Row]], x: str, y: str) -> tuple:
    """A line of a `Panel`: the means over the seeds of x and y, with half the 95 % interval of y."""
    means = [(np.mean([row[x] for row in rows]), *interval([row[y] for row in rows])) for rows in points if rows]
    return tuple(np.reshape(means, (-1, 3)).T)


def against_kl(groups: Groups, path: Path) -> str:
    """Pictures of the worst gain by KL, a point for each κ."""
    sides: dict[str, dict] = {"With a critic": {}, "With groups of responses": {}}
    for label, rows in groups.items():
        points = [[row for row in rows if row["kl_coef"] == kappa] for kappa in KAPPAS]
        for title in sides:
            if label == "firm" or label.endswith(("groups", "grpo")) == (title != "With a critic"):
                sides[title][label] = mean_line(points, "kl", "worst_gain")
    axes = ("KL to the base model (nats per response)", "worst gain (base-policy deviations)")
    panels([Panel(*axes, title, lines) for title, lines in sides.items()], Path(f"{path}.png"), size=4.8)
    return ""


def by_level(groups: Groups, path: Path) -> str:
    """Pictures of how far clients agree, and of roughness, by the cosine of the gradients."""
    contents = []
    for figure in ("disagreement", "drift", "roughness"):
        points = {(name, split): [groups.get(f"{name}, {level}, {split}", []) for level in LEVELS]
                  for name, split in product(METHODS, SPLITS)}  # fmt: skip
        lines = {f"{name}, {split}": mean_line(of, "cosine", figure) for (name, split), of in points.items()}
        contents.append(Panel("cosine of the gradients", figure, "", lines))
    panels(contents, Path(f"{path}.png"))
    return ""


def over_rounds(groups: Groups, path: Path) -> str:
    """A picture of mean stationarity over the first T rounds."""
    lines = {}
    for label, rows in groups.items():
        at = [(T, *interval([row[f"stationarity@{T}"] for row in rows])) for T in HORIZONS if rows[0]["rounds"] >= T]
        lines[label] = tuple(np.reshape(at, (-1, 3)).T)
    axes = ("rounds T", "mean ‖Jᵀλ‖² over T rounds", "On independent halves, ± 95 % over the seeds")
    panels([Panel(*axes, lines, log=True)], Path(f"{path}.png"), size=6.0)
    return ""


def at_kappas(n: int) -> list[dict]:
    """n seeds, each at three KL coefficients."""
    return [seed | {"kl_coef": kappa} for seed, kappa in product(seeds(n), KAPPAS)]


def in_world(level: str, labels: Sequence[str]) -> dict[str, dict]:
    """Methods where gradients conflict and clients differ, at equal rollouts: soups are two trainings of 8 rounds."""
    halved = {"soups": {"preferences": [0.5], "rounds": 8}}
    hard = CLIENTS | SPLITS["α = 0.1"] | {"objectives": LEVELS[level], "rounds": 16}
    return {label: hard | settings_of(label) | halved.get(label, {}) for label in labels}


def tuning(variants: dict[str, dict]) -> Experiment:
    """Three rates for every method, on seeds of its own."""
    settings = {f"{label}, rate {lr:g}": v | KAPPA | {"lr": lr} for label, v in variants.items() for lr in RATES}
    return Experiment(measure, settings, TUNING_SEEDS, ["worst_gain", "kl"])


def comparison(variants: dict[str, dict], best: dict[str, float], families: dict) -> Experiment:
    """Who serves the worst-served objective, at three κ. best: a label's rate if it isn't COMMON's."""
    settings = {label: v | {"lr": best.get(label, COMMON["lr"])} for label, v in variants.items()}
    figures = ["worst_gain", "worst_gain:median", "worst_gain:least", "gain_helpful", "gain_harmless", "kl",
               "lambda_helpful", "cosine", "noise_ratio"]  # fmt: skip
    note = "16 rounds, 4 clients × 64 responses; soups are two trainings of 8 rounds. Rates are tuned."
    return Experiment(measure, settings, at_kappas(8), figures, families, ["worst_gain"], more=against_kl, note=note)


METHODS = ("firm β=0", "firm β=0.01", "firm β=1", "linear")
CLIENTS, KAPPA = COMMON | {"clients": 4, "batch_size": 64}, {"kl_coef": KAPPAS[1]}
RATES = (1.5e-3, 3e-3, 6e-3)
BASELINES = ("firm β=1", "mgda", "linear", "morlhf", "fsmgda", "fedcmoo")
TWO = in_world("strict", ("firm", *BASELINES, "soups", "firm groups", "linear groups", "firm grpo"))
THREE = in_world("two against one", ("firm", *BASELINES))
THREE["linear ¼ ½ ¼"] = THREE["linear"] | {"preference": [0.25, 0.5, 0.25]}
SGD = {"optimizer": "sgd", "lr": 0.3, "server_lr": 1.0}  # the better of 0.3 and 1 on seed 101

EXPERIMENTS = {
    "communication": Experiment(
        measure,
        {f"{method}, M = {M}": {"method": method, "objectives": [*LEVELS["two against one"], "rule:brevity"][:M]}
         for method in ("firm", "linear", "fsmgda", "fedcmoo") for M in (2, 3, 4)},
        [{"seed": 0, "rounds": 1, "held_out": 16, "eval_samples": 1}], ["upload_bytes", "download_bytes"],
        note="Bytes of one client and round. An adapter has d = 17,408 numbers, 69,632 bytes; named numbers have 8.",
    ),
    "pareto": Experiment(  # a sweep of preferences, where the exact front is known
        measure,
        {label: COMMON | {"rounds": 16} | settings_of(label) for label in ("firm β=10", "firm", "linear", "morlhf")}
        | {"soups": COMMON | {"rounds": 16, "method": "soups", "preference": None, "preferences": list(PREFERENCES)}},
        [job | {"preference": [p, round(1.0 - p, 1)]} for job, p in product(at_kappas(5), PREFERENCES)],
        ["hypervolume", "kl"],
        {"FIRM at β = 10 less each": [("firm β=10", label) for label in ("firm", "linear", "morlhf", "soups")]},
        ["hypervolume"], derive=volumes, more=trade_offs,
        note="16 rounds, five preferences. Soups are two trainings a seed, the others five.",
    ),
    "conflict": Experiment(  # what β does to the clients' agreement and to smoothness
        measure,
        {f"{name}, {level}, {split}": CLIENTS | KAPPA | {"batch_size": 128, "objectives": LEVELS[level]} | SPLITS[split]
         | settings_of(name) for split in SPLITS for level in LEVELS for name in METHODS},
        [{"rounds": 16, "eval_every": 1, "held_out": 64, "eval_samples": 4} | seed for seed in seeds(5)],
        ["cosine", "noise_ratio", "disagreement", "drift", "dispersion", "roughness", "worst_gain", "kl", "gap"],
        {f"FIRM at β = {beta} less β = 0": [(f"firm β={beta}, {level}, {split}", f"firm β=0, {level}, {split}")
                                          for split in SPLITS for level in LEVELS] for beta in ("0.01", "1")},
        ["disagreement", "drift", "dispersion", "roughness"], more=by_level,
        note="16 rounds, 4 clients × 128 responses. The gap of two against one is ‖g₁ − g₃‖² / tr G.",
    ),
    "worst_tuning": tuning(TWO),
    "worst": comparison(TWO, {}, {
        "FIRM less each method": [("firm", label) for label in (*BASELINES, "soups")],
        "Groups of responses less a critic, GRPO's division less none": [
            ("firm groups", "firm"), ("linear groups", "linear"), ("firm grpo", "firm groups")],
    }),
    "minority_tuning": tuning(THREE),
    "minority": comparison(THREE, {}, {
        "FIRM less each method": [("firm", label) for label in (*BASELINES, "linear ¼ ½ ¼")]}),
    "stationarity": Experiment(
        measure,
        {f"{label}, batch {batch}": CLIENTS | settings_of(label.split()[0]) | changes
         | {"batch_size": batch, "kl_coef": 0.0, "split": "iid"}
         for batch in (16, 64) for label, changes in (("firm", {}), ("mgda", {}), ("linear", {}), ("firm sgd", SGD))},
        [{"rounds": 128, "held_out": 32} | seed for seed in seeds(4)],
        [*(f"stationarity@{T}" for T in HORIZONS), "slope", "worst_gain", "kl"], more=over_rounds,
        note="Mild conflict, no KL penalty. Slope: of log mean ‖Jᵀλ‖² over T rounds in log T; the theorem has −0.5.",
    ),
}  # fmt: skip
