"""The experiments beyond the toy world: FedMOA, PluralLLM's predictor and FIRM on it, a chat model. [ours]

`fedmoa`: two objectives, accuracy and format. The judge is accuracy on held-out prompts, whose references are right.
`predictor`: federated against central training of equally many steps; then of as many as there are rounds.
`plural`: the predictor's shares of four groups are a policy's objectives. It is judged by what the groups truly think,
on questions that neither the survey nor a client's prompts hold:

    share      Σ_o π(o) s_g(o), what an answer is worth to group g on average; greatest if the policy answers the mode
    alignment  1 − the distance of π over the options from s_g

`chat` needs the files that the preset `smollm2` names, on the hub or here, and takes hours: `all` leaves it out.
"""

import math
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import pluralllm
import run
from app import peft_files, predictor
from app.files import read_lines
from app.metrics import pair_cosines
from app.options import PRESETS
from app.session import Session
from experiments.lab import TUNING_SEEDS, Experiment, at_kappas, by_rate, seeds, settings_of
from experiments.tables import Groups, Row
from experiments.toy import measure, outcome
from settings import Config
from worlds import survey

SEVERITIES = (0.0, 0.7)  # shares of wrong references in the data of the four poor clients
FEDMOA = {"preset": "fedmoa-tiny", "objectives": PRESETS["fedmoa-tiny"]["objectives"][:2], "client_objectives": [],
          "personal_rounds": 0, "method": "fedmoa"}  # fmt: skip
LINEAR, FIRM = (FEDMOA | {"method": method, "advantages": "grpo"} for method in ("linear", "firm"))
GRID = {  # six settings for each method
    **{f"fedmoa, rate {rate:g} p {p:g}": FEDMOA | {"hyper_rate": rate, "preference": [p, round(1 - p, 1)]}
       for rate, p in product((1.0, 2.0, 4.0), (0.5, 0.8))},
    **{f"linear, p {p:g}": LINEAR | {"preference": [p, round(1 - p, 1)]} for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
    **{f"firm, β {beta:g} p {p:g}": FIRM | {"beta": beta, "preference": [p, round(1 - p, 1)]}
       for beta, p in product((0.1, 1.0, 10.0), (0.5, 0.8))},
}  # fmt: skip
FEDMOA_BEST = {"fedmoa": "fedmoa, rate 2 p 0.5", "linear": "linear, p 1", "firm": "firm, β 1 p 0.8"}
METHODS = {
    "fedmoa": GRID[FEDMOA_BEST["fedmoa"]] | {"personal_rounds": 4},
    "linear": LINEAR,
    "linear tuned": GRID[FEDMOA_BEST["linear"]],
    "firm tuned": GRID[FEDMOA_BEST["firm"]],
    "fedmoa weights alone": GRID[FEDMOA_BEST["fedmoa"]] | {"aggregation": "fedavg"},
    "fedmoa average alone": GRID[FEDMOA_BEST["fedmoa"]] | {"weights": "fixed"},
}
DIFFERENCES = {
    "FedMOA less other weights": [("fedmoa", label) for label in ("linear", "linear tuned", "firm tuned")],
    "A part alone less equal weights": [(f"fedmoa {part} alone", "linear") for part in ("weights", "average")],
}


def measure_fedmoa(job: dict, directory: Path) -> list[Row]:
    """Train and measure one job: also what clients of both kinds gain alone, and how λ ends and has moved."""
    config = Config(**PRESETS["fedmoa-tiny"] | job | {"out": str(directory / "run")})
    summary, lines = run.train(config, progress=False), read_lines(directory / "run" / "metrics.jsonl")
    row, n = outcome(config, summary), max(len(lines) // 8, 1)
    for name in summary["objectives"]:
        first, last = (float(np.mean([m[f"lambda/{name}"] for m in part])) for part in (lines[:n], lines[-n:]))
        row |= {f"lambda_{name}": last, f"shift_{name}": last - first}
    clients = summary.get("by_client", [])
    for i, data in enumerate(("careful", "poor")):  # clients alternate
        own = [c["primary"]["personal"]["mean"] - c["primary"]["after"]["mean"]
               for c in clients[i::2] if "personal" in c["primary"]]  # fmt: skip
        row[f"{data}_gain"] = float(np.mean(own)) if own else math.nan
    return [row]


SIDES, LEVELS = ("federated", "centralised"), (0.7, 0.75)  # levels of alignment, for convergence
SIX, ONE = "six steps a round", "one step a round"  # the public code counts six federated ones against a central one
SCORES = ["alignment", "worst", "fairness", "jain_over_groups"]
PREDICTOR = {"preset": "pluralllm-tiny", "eval_every": 2}


def measure_predictor(job: dict, directory: Path) -> list[Row]:
    """Train both sides: a row for each, of its figures on unseen groups and the rounds until its alignment's levels."""
    config, rows = Config(**PRESETS["pluralllm-tiny"] | job | {"out": str(directory / "run")}), []
    summary = predictor.train(config, progress=False)
    lines = read_lines(directory / "run" / "metrics.jsonl")
    for side, figures in summary["sides"].items():
        row, evaluated = {"side": side} | figures, [line for line in lines if f"alignment/{side}" in line]
        for level in LEVELS:
            at = pluralllm.convergence([line[f"alignment/{side}"] for line in evaluated], level)
            row[f"rounds_to_{level}"] = math.nan if at is None else evaluated[at]["round"] + 1
        rows.append(row)
    unseen = [group for group in summary["groups"].values() if group["unseen"]]
    rows[0] |= {name: float(np.mean([group[name] for group in unseen])) for name in ("uniform", "mean answer")}
    rows[0] |= {f"{who}_context": summary["context"][who] for who in ("own", "other")}
    return rows


def by_side(groups: Groups) -> Groups:
    """A label for each side."""
    return {f"{x}, {label}": [row for row in rows if row["side"] == x] for label, rows in groups.items() for x in SIDES}


GROUPS = [spec.rsplit(":", 1)[1] for spec in PRESETS["plural-firm-tiny"]["objectives"]]
POLICIES = {name: {"preset": "plural-firm-tiny"} | settings_of(name) for name in ("firm", "linear", "adaptive")}


def measure_policy(job: dict, directory: Path) -> list[Row]:
    """Train a policy: what the groups' true shares and alignment are under it and the base model."""
    out = directory / "run"
    config = Config(**PRESETS["plural-firm-tiny"] | job | {"out": str(out), "diagnostics": True})
    summary = run.train(config, progress=False)
    grams = [safetensors.torch.load_file(file)["steps"].flatten(0, 2) for file in (out / "grams").iterdir()]
    G = torch.cat(grams)  # [steps, k, k]
    lowest = torch.stack([pair_cosines(gram).min() for gram in G]).mean() if G.shape[1] > 1 else math.nan
    row = {"kl": summary["kl"]["mean"], "lowest_cosine": float(lowest)}
    session = Session(config, progress=False)
    row |= {f"base_{name}": value for name, value in truth(session, job["seed"]).items()}
    peft_files.load(session.policy.adapter, out / "adapter")
    return [row | truth(session, job["seed"])]


@torch.no_grad()
def truth(session: Session, seed: int) -> dict[str, float]:
    """The policy as it stands against what the groups truly think, on the held-out prompts."""
    opinions, policy = survey.Opinions(seed), session.policy
    values = np.zeros((2, len(session.held_out), len(GROUPS)))  # shares and alignments
    for i, prompt in enumerate(session.held_out):
        options, issue = prompt.columns["options"], survey.issue_of(prompt.columns["question"])
        logits = policy.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].double()
        pi = torch.softmax(logits, 0)[policy.tokenizer.convert_tokens_to_ids(list(options))]  # [k], a word is a token
        for j, group in enumerate(GROUPS):
            shares = torch.tensor(opinions.shares(group.replace("-", " "), issue, options))
            distance = pluralllm.distances(pi / pi.sum(), shares, torch.zeros(len(options), dtype=torch.long))
            values[:, i, j] = float(pi @ shares), 1 - float(distance)
    share, alignment = values.mean(1)  # [groups] each
    row = {"worst_share": share.min(), "mean_share": share.mean(), "worst_alignment": alignment.min()}
    return {name: float(value) for name, value in row.items()}


EXPERIMENTS = {
    "chat": Experiment(
        measure, {x: {"preset": "smollm2", "threads": 1, "held_out": 256, "method": x} for x in ("firm", "linear")},
        at_kappas(3, (0.003, 0.03), first=43), ["gain_helpful", "error_helpful", "gain_harmless", "error_harmless",
                                                "kl", "cosine", "lambda_helpful", "disagreement", "seconds"],
        {"FIRM less fixed weights": [("firm", "linear")]}, ["gain_helpful", "gain_harmless", "worst_gain"],
        drawn=("kl", "gain_helpful", "gain_harmless"), note="Errors are standard errors over the held-out prompts.",
    ),
    "fedmoa_tuning": Experiment(
        measure_fedmoa, GRID, [{"severity": severity} | seed for severity, seed in product(SEVERITIES, TUNING_SEEDS)],
        ["accuracy"], note="Means over both severities.",
    ),
    "fedmoa": Experiment(
        measure_fedmoa, {f"{x}, severity {s:g}": METHODS[x] | {"severity": s} for s in SEVERITIES for x in METHODS},
        at_kappas(6, (0.003, 0.03, 0.1)), ["base_accuracy", "accuracy", "accuracy:least", "format", "kl",
        "lambda_format", "shift_format", "careful_gain", "poor_gain"],
        {title: [(f"{a}, severity {s:g}", f"{b}, severity {s:g}") for s in SEVERITIES for a, b in pairs]
         for title, pairs in DIFFERENCES.items()},
        ["accuracy"], note="λ is that of the last eighth of the rounds, its shift is since the first. Careful and poor "
        "gain: what clients of either kind gain in accuracy by four rounds alone.",
    ),
    "predictor_tuning": Experiment(measure_predictor, by_rate({"both": PREDICTOR}, (3e-4, 1e-3, 3e-3)), TUNING_SEEDS,
                                   ["alignment"], derive=by_side),
    "predictor": Experiment(
        measure_predictor, {SIX: PREDICTOR | {"lr": 1e-3}, ONE: PREDICTOR | {"lr": 1e-3, "local_steps": 1}},
        seeds(12), [*SCORES, *(f"rounds_to_{level}" for level in LEVELS), "own_context", "other_context", "uniform",
                   "mean answer"],
        {x: [(f"federated, {SIX}", f"centralised, {n}")] for x, n in (("Equal steps", SIX), ("Equal rounds", ONE))},
        SCORES, derive=by_side, note="Unseen groups. Rounds to a level: until the mean of three evaluations is past "
        "it. Own context: 15 answers of the group itself; other: of one with another centre.",
    ),
    "plural_tuning": Experiment(measure_policy, by_rate(POLICIES), TUNING_SEEDS, ["worst_share", "kl"]),
    "plural": Experiment(
        measure_policy, {label: settings | {"lr": 1.5e-3} for label, settings in POLICIES.items()},
        at_kappas(10, (0.003, 0.03)),
        ["base_worst_share", "worst_share", "mean_share", "worst_alignment", "kl", "lowest_cosine"],
        {"FIRM less fixed weights and less the adaptive reward": [("firm", "linear"), ("firm", "adaptive")]},
        ["worst_share", "mean_share", "worst_alignment"],
    ),
}  # fmt: skip
