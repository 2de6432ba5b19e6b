"""The experiments of the other worlds: FedMOA (reasoning); PluralLLM's predictor and FIRM on it (survey). [ours]

`fedmoa`: the judge is accuracy on held-out prompts, whose references are right.
`predictor`: federated and central training take equally many optimizer steps; then as many central ones as rounds.
`plural`: the predictor's shares of four groups are a policy's objectives. It is judged by what the groups truly think,
on questions that neither the survey nor a client's prompts hold:

    share      Σ_o π(o) s_g(o), what an answer is worth to group g on average; greatest if the policy answers the mode
    alignment  1 − the distance of π over the options from s_g
"""

import math
from itertools import chain, product
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
from experiments.lab import TUNING_SEEDS, Experiment, seeds, settings_of
from experiments.tables import Groups, Row
from settings import Config
from worlds import survey

SEVERITIES = (0.0, 0.7)  # shares of wrong references in the data of the four poor clients
UNIFORM, MOSTLY, PRIMARY = [1 / 3] * 3, [0.8, 0.2, 0.0], [1.0, 0.0, 0.0]
FEDMOA = {"preset": "fedmoa-tiny", "personal_rounds": 0, "method": "fedmoa"}
LINEAR, FIRM = (FEDMOA | {"method": method, "advantages": "grpo"} for method in ("linear", "firm"))
MIXES = (UNIFORM, [0.5, 0.25, 0.25], [0.7, 0.15, 0.15], [0.5, 0.5, 0.0], MOSTLY, PRIMARY)
GRID = {  # six settings for each method
    **{f"fedmoa rate {rate:g} γ {power:g}": FEDMOA | {"hyper_rate": rate, "accuracy_power": power}
       for rate, power in product((1.0, 2.0, 4.0), (1.0, 2.0))},
    **{f"linear p {p[0]:.2f} {p[1]:.2f}": LINEAR | {"preference": p} for p in MIXES},
    **{f"firm β {beta:g} p {p[0]:.2f} {p[1]:.2f}": FIRM | {"beta": beta, "preference": p}
       for beta, p in product((0.1, 1.0, 10.0), (UNIFORM, MOSTLY))},
}  # fmt: skip
TUNED = [GRID[best] for best in ("fedmoa rate 4 γ 1", "linear p 0.50 0.50", "firm β 10 p 0.80 0.20")]
METHODS = {
    "fedmoa": TUNED[0] | {"personal_rounds": 4},
    "linear": LINEAR,
    "linear primary": LINEAR | {"preference": PRIMARY},
    "linear tuned": TUNED[1] | {"personal_rounds": 4},
    "firm": TUNED[2],
    "fedmoa weights alone": TUNED[0] | {"aggregation": "fedavg"},
    "fedmoa average alone": TUNED[0] | {"weights": "fixed"},
    "fedmoa average and primary": TUNED[0] | {"weights": "fixed", "preference": PRIMARY},
    "fedmoa groups": TUNED[0] | {"advantages": "group"},
}
DIFFERENCES = {
    "FedMOA less other weights": [("fedmoa", label) for label in ("linear", "linear primary", "linear tuned", "firm")],
    "With a part less without it": [
        ("fedmoa average alone", "linear"), ("fedmoa average and primary", "linear primary"),
        ("fedmoa", "fedmoa weights alone"), ("fedmoa weights alone", "linear"), ("fedmoa", "fedmoa average alone"),
        ("fedmoa weights alone", "linear tuned"), ("fedmoa", "fedmoa average and primary"), ("fedmoa", "fedmoa groups"),
    ],
}  # fmt: skip


def measure_fedmoa(job: dict, directory: Path) -> list[Row]:
    """Held-out means of one job in raw units, those of the clients' kinds, and λ in the last eighth of the rounds."""
    out = directory / "run"
    summary = run.train(Config(**PRESETS["fedmoa-tiny"] | job | {"out": str(out)}), progress=False)
    lines = read_lines(out / "metrics.jsonl")
    row = {"kl": summary["kl"]["mean"]}
    for name, figures in summary["objectives"].items():
        row[name] = figures["after"]["mean"]
        row[f"lambda_{name}"] = float(np.mean([line[f"lambda/{name}"] for line in lines[-max(len(lines) // 8, 1) :]]))
    clients = summary.get("by_client", [])
    for stage, (i, data) in product(("after", "personal"), enumerate(("careful", "poor"))):  # clients alternate
        means = [client["primary"][stage]["mean"] for client in clients[i::2] if stage in client["primary"]]
        row[f"{data}_{stage}"] = float(np.mean(means)) if means else math.nan
    return [row]


def with_gains(groups: Groups) -> Groups:
    """Adds what the clients of either kind gain by adapters of their own over the global one."""
    for row in chain.from_iterable(groups.values()):
        row |= {f"{data}_gain": row[f"{data}_personal"] - row[f"{data}_after"] for data in ("careful", "poor")}
    return groups


SIDES = ("federated", "centralised")
EQUAL, COUNTED = "equal steps", "a central step a round"  # the second is the public code's counting
SCORES = ("alignment", "worst", "fairness", "jain_over_groups")
GUESSES = ("own_context", "other_context", "uniform", "mean answer")
PREDICTOR = {"preset": "pluralllm-tiny", "eval_every": 2, "lr": 1e-3}  # the rate as tuned, on either side


def measure_predictor(job: dict, directory: Path) -> list[Row]:
    """Train both sides: their final figures on unseen groups, their curves, and what the context is worth."""
    config = Config(**PRESETS["pluralllm-tiny"] | job | {"out": str(directory / "run")})
    summary = predictor.train(config, progress=False)
    lines, row = read_lines(directory / "run" / "metrics.jsonl"), {}
    for side, figures in summary["sides"].items():
        row |= {f"{side}_{name}": figures[name] for name in ("start", *SCORES)}
        row |= {f"{side}@{line['round'] + 1}": line[key] for line in lines if (key := f"alignment/{side}") in line}
    unseen = [group for group in summary["groups"].values() if group["unseen"]]
    row |= {name: float(np.mean([group[name] for group in unseen])) for name in ("uniform", "mean answer")}
    return [row | {f"{who}_context": summary["context"][who] for who in ("own", "other")}]


def by_side(groups: Groups) -> Groups:
    """A row per seed and side: scores, and the rounds until 0.95 of the way from the mean start to the better end."""
    result: Groups = {f"{side}, {counting}": [] for counting in (EQUAL, COUNTED) for side in SIDES}
    for counting in (EQUAL, COUNTED):
        for pair in zip(groups[EQUAL], groups[counting], strict=True):  # federated training is the same in both
            rows = dict(zip(SIDES, pair, strict=True))
            start = np.mean([row[f"{side}_start"] for side, row in rows.items()])
            end = max(row[f"{side}_alignment"] for side, row in rows.items())
            for side, row in rows.items():
                rounds = sorted(int(name.partition("@")[2]) for name in row if name.startswith(f"{side}@"))
                curve = [row[f"{side}@{t}"] for t in rounds]
                at = pluralllm.convergence(curve, start + 0.95 * (end - start))
                figures = {name: row[f"{side}_{name}"] for name in SCORES} | {name: row[name] for name in GUESSES}
                figures |= {"seed": row["seed"], "convergence": math.nan if at is None else rounds[at]}
                result[f"{side}, {counting}"].append(figures)
    return result


GROUPS = [spec.rsplit(":", 1)[1] for spec in PRESETS["plural-firm-tiny"]["objectives"]]
POLICIES = ("firm β=0.01", "firm β=1", "firm β=10", "mgda", "linear", "morlhf", "minimum", "maximum", "adaptive",
            "firm β=0.01 groups", "linear groups", "minimum groups", "adaptive groups")  # fmt: skip
BEST_RATE = {"firm β=0.01": 3e-3, "adaptive": 3e-3, "firm β=0.01 groups": 6e-3, "adaptive groups": 3e-3}  # of three
WORST = ["worst_share", "mean_share", "worst_alignment", "kl"]
PAIRS = [
    *((name, "linear") for name in POLICIES[:9] if name != "linear"),
    *((f"{name} groups", "linear groups") for name in ("firm β=0.01", "minimum", "adaptive")),
    ("firm β=0.01", "adaptive"), ("mgda", "adaptive"), ("firm β=0.01 groups", "adaptive groups"),
]  # fmt: skip


def measure_policy(job: dict, directory: Path) -> list[Row]:
    """Train a policy: every group's true share and alignment under it, and their worst, mean and Jain's index."""
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
    figures = {}
    for kind, means in zip(("share", "alignment"), values.mean(1), strict=True):
        figures |= {f"{kind}_{group}": float(mean) for group, mean in zip(GROUPS, means, strict=True)}
        figures |= {f"worst_{kind}": float(means.min()), f"mean_{kind}": float(means.mean())}
        figures[f"jain_{kind}"] = pluralllm.jain(torch.tensor(means))
    return figures


def with_base(groups: Groups) -> Groups:
    """Adds the base model as a label of its own."""
    rows = next(iter(groups.values()))
    base = [{name.removeprefix("base_"): x for name, x in row.items() if name.startswith("base_")} for row in rows]
    return groups | {"base model": [row | {"seed": i, "kl": 0.0} for i, row in enumerate(base)]}


EXPERIMENTS = {
    "fedmoa_tuning": Experiment(
        measure_fedmoa, GRID, [{"severity": severity} | seed for severity, seed in product(SEVERITIES, TUNING_SEEDS)],
        ["accuracy"], note="Means over both severities.",
    ),
    "fedmoa": Experiment(
        measure_fedmoa,
        {f"{label}, severity {s:g}": METHODS[label] | {"severity": s} for s in SEVERITIES for label in METHODS},
        seeds(10, 10),
        ["accuracy", "format", "length", "kl", "lambda_accuracy", "lambda_format", "lambda_length", "careful_personal",
         "careful_gain", "poor_personal", "poor_gain"],
        {title: [(f"{a}, severity {s:g}", f"{b}, severity {s:g}") for s in SEVERITIES for a, b in pairs]
         for title, pairs in DIFFERENCES.items()},
        ["accuracy"], derive=with_gains,
        note="λ is that of the last eighth of the rounds. Personal: accuracy of clients with careful and poor data, on "
        "held-out prompts of their kind, after four rounds alone; gain: that less the global adapter's.",
    ),
    "predictor": Experiment(
        measure_predictor, {EQUAL: PREDICTOR, COUNTED: PREDICTOR | {"local_steps": 1}}, seeds(10, 10),
        [*SCORES, "convergence", *GUESSES],
        {counting: [tuple(f"{side}, {counting}" for side in SIDES)] for counting in (EQUAL, COUNTED)}, SCORES,
        derive=by_side,
        note="Unseen groups. Convergence, in rounds: the first mean of three evaluations past start + 0.95 (the better "
        "end − start). Own context: 15 answers of the group itself; other: of one with another centre.",
    ),
    "plural": Experiment(
        measure_policy, {label: settings_of(label) | {"lr": BEST_RATE.get(label, 1.5e-3)} for label in POLICIES},
        [{"preset": "plural-firm-tiny"} | seed for seed in seeds(10, 10)],
        [*WORST, "jain_share", "mean_alignment", "lowest_cosine"],
        {"Less fixed weights, and gradients balanced less the adaptive reward": PAIRS}, WORST, derive=with_base,
    ),
}  # fmt: skip
