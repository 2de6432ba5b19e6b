"""The preference predictor against centralised training, and FIRM against one aggregated reward where groups conflict.

Experiments as those of `experiments.py`, on the survey world. [ours]

`predictor`: federated and central training of one model take equally many optimizer steps, each central step over all
groups, each with a decay as long as its own steps; either at its own best learning rate, of equal grids. In a second
table the public code's counting: as many central steps as there are rounds, at the rate chosen for six times as many.

`plural`: a policy that answers survey questions, rewarded by the predictor's shares for four groups, is judged by what
the groups truly think, on questions that neither the survey nor a client's prompts hold, and from its probabilities:

    share      Σ_o π(o) s_g(o), what it would get from group g for one answer; greatest where it answers with the mode
    alignment  1 − the distance of π over the options from s_g
"""

import math
from pathlib import Path

import numpy as np
import torch

import pluralllm
import run
from app import plots, predictor_run
from app.files import read_lines
from app.session import Session
from evidence import rules
from evidence.lab import Lab, byte_figures
from evidence.rules import TUNING_SEEDS
from evidence.statistics import BARS, cell, column, holm, interval, number, paired, show
from settings import PRESETS, Config
from worlds import survey

SIDES = ("federated", "centralised")
RATES = (3e-4, 1e-3, 3e-3)  # of the predictor
POLICY_RATES = (1.5e-3, 3e-3, 6e-3)
GROUPS = [spec.rsplit(":", 1)[1] for spec in PRESETS["plural-firm-tiny"]["objectives"]]
METHODS = (
    "firm β=0.01", "firm β=1", "firm β=10", "mgda", "linear", "morlhf", *rules.ONE_REWARD,
    "firm β=0.01 groups", "linear groups", "minimum groups", "adaptive groups",
)  # fmt: skip


# ---- figures of one run ----------------------------------------------------------------------------------------


def predictor_figures(job: dict, out: Path) -> dict:
    """Both sides' final figures on unseen groups, their curves, and what the context is worth."""
    config = Config.from_flat(PRESETS["pluralllm-tiny"] | job | {"threads": 1, "out": str(out)})
    summary = predictor_run.train(config, progress=False)
    row = {"method": pluralllm.NAME, "seed": job["seed"]}
    for side, figures in summary["sides"].items():
        row |= {
            f"{side}_{name}": figures[name] for name in ("start", "alignment", "worst", "fairness", "jain_over_groups")
        }
        row[f"{side}_seconds"] = summary["training_seconds"][side]
        curve = [line[f"alignment/{side}"] for line in read_lines(out / "metrics.jsonl") if f"alignment/{side}" in line]
        row |= {f"{side}@{(i + 1) * config.run.eval_every}": value for i, value in enumerate(curve)}
    for name in ("uniform", "mean answer"):
        row[name] = float(np.mean([g[name] for g in summary["groups"].values() if g["unseen"]]))
    for name in ("own", "other"):
        row[f"{name}_context"] = float(np.mean([each[name] for each in summary["context"].values()]))
    return row


def plural_figures(job: dict, out: Path) -> dict:
    """Every group's true share and alignment under the trained policy, and their worst, mean and Jain's index."""
    config = Config.from_flat(PRESETS["plural-firm-tiny"] | job | {"out": str(out)})
    summary, metrics = run.train(config, progress=False), read_lines(out / "metrics.jsonl")
    row = {"method": job["method"], "seed": job["seed"], "kl": summary["kl"]["mean"]}
    row |= {name: float(np.mean([line[name] for line in metrics])) for name in ("cosine", "lowest_cosine")}
    row |= {f"lambda_{name}": float(np.mean([line[f"lambda/{name}"] for line in metrics])) for name in GROUPS}
    session = Session(config, progress=False)
    row |= {f"base_{name}": value for name, value in truth(session, job["seed"]).items()}
    session.policy.adapter.load(out / "adapter")
    return row | truth(session, job["seed"]) | byte_figures(metrics) | {
        "training_seconds": sum(line["seconds"] for line in metrics)
    }  # fmt: skip


@torch.no_grad()
def truth(session: Session, seed: int) -> dict[str, float]:
    """The policy as it stands against what the groups truly think, on the held-out prompts."""
    opinions, policy = survey.Opinions.drawn(seed), session.policy
    shares, scores, answered = {g: [] for g in GROUPS}, {g: [] for g in GROUPS}, []
    for prompt in session.held_out:
        options, issue = prompt.columns["options"], survey.issue_of(prompt.columns["question"])
        logits = policy.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].double()
        pi = torch.softmax(logits, 0)[policy.tokenizer.convert_tokens_to_ids(list(options))]  # [k], a word is a token
        answered.append(float(pi.sum()))
        for group in GROUPS:
            true = torch.tensor(opinions.shares(group.replace("-", " "), issue, options))
            shares[group].append(float(pi @ true))
            which = torch.zeros(len(options), dtype=torch.long)
            scores[group].append(1 - float(pluralllm.distances(pi / pi.sum(), true, which)))
    found = {"answered": float(np.mean(answered))}
    for name, values in (("share", shares), ("alignment", scores)):
        means = torch.tensor([np.mean(values[group]) for group in GROUPS])
        found |= {f"{name}_{group}": float(value) for group, value in zip(GROUPS, means, strict=True)}
        found |= {f"worst_{name}": float(means.min()), f"mean_{name}": float(means.mean())}
        found[f"jain_{name}"] = pluralllm.jain(means)
    return found


# ---- tuning ----------------------------------------------------------------------------------------------------


def best_rates(lab: Lab, name: str, rates: tuple[float, ...], jobs: dict[str, dict], figures: dict[str, str]) -> dict:
    """The rate at which each label's figure is best on the tuning seeds, from one grid, which is shown."""
    seeds = lab.some(TUNING_SEEDS)[: 1 if lab.quick else None]
    rates = rates[:1] if lab.quick else rates
    tried = {(label, r): [job | {"lr": r, "seed": n} for n in seeds] for label, job in jobs.items() for r in rates}
    rows, best, lines = lab.groups(name, tried), {}, []
    for label, figure in figures.items():
        scores = {rate: np.mean(column(rows[label, rate], figure)) for rate in rates}
        best[label] = max(scores, key=scores.get)
        lines.append([label, *(f"{scores[rate]:.3f}" + " *" * (rate == best[label]) for rate in rates)])
    head = ["", *(f"lr {rate:g}" for rate in rates)]
    show(lab.results, name, head, lines, f"Seeds {', '.join(map(str, seeds))}; * is what is used.")
    return best


# ---- federated and central training ----------------------------------------------------------------------------


def predictor(lab: Lab) -> None:
    """Alignment, worst group, fairness and rounds to convergence of the predictor, federated less centralised."""
    shared = {"preset": "pluralllm-tiny"}
    jobs = {side: shared | {"eval_every": 20} for side in SIDES}
    best = best_rates(lab, "predictor_tuning", RATES, jobs, {side: f"{side}_alignment" for side in SIDES})
    seeds = lab.some(rules.seeds_of(10))
    jobs = {side: [shared | {"lr": best[side], "eval_every": 2, "seed": n} for n in seeds] for side in SIDES}
    jobs["paper"] = [job | {"local_steps": 1} for job in jobs["centralised"]]
    rows = lab.groups("predictor", {(label,): own for label, own in jobs.items()})
    sides = {side: (side, rows[(side,)]) for side in SIDES}
    compare(lab, "predictor", sides, seeds)
    compare(lab, "predictor_counting", sides | {"centralised": ("centralised", rows[("paper",)])}, seeds)
    own, other = (np.array(column(rows[("federated",)], f"{who}_context")) for who in ("own", "other"))
    lines = [[cell(rows[("federated",)], f) for f in ("own_context", "other_context", "uniform", "mean answer")]]
    lines[0].insert(2, "{:+.3f} ± {:.3f}".format(*interval(own - other)))
    head = ["15 of its own answers", "as another group answered", "difference", "every option alike", "mean answer"]
    note = (
        "Alignment of unseen groups, federated. The other group has another centre, for half of them the opposite one."
    )
    show(lab.results, "predictor_context", head, lines, note)
    drawn = sides | {"centralised, a step a round": ("centralised", rows[("paper",)])}
    lines = {label: mean_curve(own, side) for label, (side, own) in drawn.items()}
    plots.panels(
        [plots.Panel("round", "alignment, unseen groups", "", lines)], lab.results / "predictor.png", note=BARS
    )


def curves_of(rows: list[dict], side: str) -> list[tuple[list[int], list[float]]]:
    """(rounds, alignment) of every row."""
    found = []
    for row in rows:
        points = sorted((int(key.partition("@")[2]), row[key]) for key in row if key.startswith(f"{side}@"))
        found.append(tuple(map(list, zip(*points, strict=True))))
    return found


def mean_curve(rows: list[dict], side: str) -> tuple[list[int], list[float], list[float]]:
    """(rounds, mean alignment, half its 95 % interval) over the rows, at every fifth evaluation."""
    curves = curves_of(rows, side)
    points = [interval(at) for at in zip(*(curve for _, curve in curves), strict=True)]
    return curves[0][0][4::5], [mean for mean, _ in points][4::5], [half for _, half in points][4::5]


def compare(lab: Lab, name: str, sides: dict[str, tuple[str, list[dict]]], seeds) -> None:
    """A line per side and their paired differences."""
    figures = ("alignment", "worst", "fairness", "jain_over_groups")
    values = {s: {f: np.array(column(rows, f"{key}_{f}")) for f in figures} for s, (key, rows) in sides.items()}
    reached = {side: [] for side in sides}
    for i in range(len(seeds)):
        better = max(values[side]["alignment"][i] for side in sides)
        start = np.mean([rows[i][f"{key}_start"] for key, rows in sides.values()])
        level = start + 0.95 * (better - start)
        for side, (key, rows) in sides.items():
            at, curve = curves_of(rows, key)[i]
            found = pluralllm.convergence(curve, level)
            reached[side].append(math.nan if found is None else at[found])
    lines = []
    for side in sides:
        there = [r for r in reached[side] if not math.isnan(r)]
        mean = f"{np.mean(there):.0f} ({len(there)} of {len(seeds)})" if there else f"never (0 of {len(seeds)})"
        cells = (interval(values[side][f]) for f in figures)
        lines.append([side, *(f"{m:.3f} ± {number(h)}" for m, h in cells), mean])
    differences = []
    for figure in figures:
        mean, half = interval(values["federated"][figure] - values["centralised"][figure])
        differences.append(f"{mean:+.3f} ± {number(half)}")
    ratios = np.array(reached["federated"]) / np.array(reached["centralised"])
    both = ratios[~np.isnan(ratios)]
    fewer = f"{100 * (1 - both.mean()):.0f} % fewer ({len(both)} seeds)" if len(both) else "-"
    lines.append(["federated - centralised", *differences, fewer])
    head = ["side", "alignment", "worst group", "fairness index", "Jain's index over groups", "rounds to convergence"]
    note = f"Unseen groups, {len(seeds)} seeds from {seeds[0]}; ± is half a 95 % interval, differences are paired. "
    note += "Convergence: the first mean of three evaluations past start + 0.95 (the better end - start), in rounds; "
    note += "mean over the seeds that reach it."
    show(lab.results, name, head, lines, note)


# ---- FIRM where groups conflict --------------------------------------------------------------------------------


def plural(lab: Lab) -> None:
    """Worst group, mean and fairness of FIRM and of one aggregated reward, with the critic and with groups."""
    labels = ("firm β=0.01", "linear", "adaptive", "linear groups") if lab.quick else METHODS
    jobs = {label: {"preset": "plural-firm-tiny"} | rules.variant(label) for label in labels}
    best = best_rates(lab, "plural_tuning", POLICY_RATES, jobs, dict.fromkeys(labels, "worst_share"))
    seeds = TUNING_SEEDS[:1] if lab.quick else rules.seeds_of(10)  # in miniature one: each trains a predictor first
    jobs = {label: [job | {"lr": best[label], "seed": n} for n in seeds] for label, job in jobs.items()}
    lab.rows("plural", [own[i] for i in range(len(seeds)) for own in jobs.values()])  # whole seeds first
    rows = {label: lab.rows("plural", own) for label, own in jobs.items()}
    figures = {
        "worst_share": "worst group's share", "mean_share": "mean share", "jain_share": "Jain's index",
        "worst_alignment": "worst alignment", "mean_alignment": "mean alignment", "kl": "KL",
        "lowest_cosine": "lowest cosine",
    }  # fmt: skip
    lines = [[label, *(cell(own, figure) for figure in figures)] for label, own in rows.items()]
    lines.append(["base model", *(cell(rows["linear"], f"base_{figure}") for figure in list(figures)[:5]), "0", ""])
    note = f"{len(seeds)} seeds from {seeds[0]}, each method at its best lr; groups: 4 responses in the critic's place."
    show(lab.results, "plural", ["method", *figures.values()], lines, note)
    versus(lab, rows, len(seeds))
    by_seed(lab, rows)
    panels = []
    for title, groups in (("with a critic", False), ("with groups of responses", True)):
        own = {rules.with_critic(label): rows[label] for label in labels if label.endswith(" groups") == groups}
        drawn = {label: ([np.mean(column(of, "mean_share"))], *([v] for v in interval(column(of, "worst_share"))))
                 for label, of in own.items()}  # fmt: skip
        panels.append(plots.Panel("mean share", "worst group's share", title, drawn))
    plots.panels(panels, lab.results / "plural.png", note=BARS)


def versus(lab: Lab, rows: dict[str, list[dict]], n: int) -> None:
    """Every method less fixed weights, and gradient-side balancing less the adaptive reward, paired by seed."""
    pairs = [(label, "linear groups" if label.endswith(" groups") else "linear") for label in rows]
    pairs += [(label, label.replace("firm β=0.01", "adaptive").replace("mgda", "adaptive"))
              for label in ("firm β=0.01", "mgda", "firm β=0.01 groups")]  # fmt: skip
    pairs = [(one, other) for one, other in pairs if one != other and one in rows]
    figures = ("worst_share", "mean_share", "worst_alignment", "kl")
    tests = [[paired(rows[one], rows[other], figure) for figure in figures] for one, other in pairs]
    lines = [[f"{one} less {other}", *(f"{m:+.3f} ± {h:.3f}" for m, h, _ in test)]
             for (one, other), test in zip(pairs, tests, strict=True)]  # fmt: skip
    for column_of_p, figure in ((2, 0), (5, 2)):
        for line, p in zip(lines, holm([test[figure][2] for test in tests]), strict=True):
            line.insert(column_of_p, f"{p:.2g}")
    head = ["difference", "worst group's share", "p (Holm)", "mean share", "worst alignment", "p (Holm)", "KL"]
    note = f"{n} seeds, paired; ± is half a 95 % interval of this line alone, each p is corrected over its column."
    show(lab.results, "plural_versus", head, lines, note)


def by_seed(lab: Lab, rows: dict[str, list[dict]]) -> None:
    """How much groups conflict on each seed, and what balancing gives there."""
    shown = [label for label in ("linear", "firm β=0.01", "adaptive") if label in rows]
    lines = [
        [own[0]["seed"], f"{own[0]['lowest_cosine']:+.2f}", f"{own[0]['base_worst_share']:.3f}",
         *(f"{row['worst_share']:.3f}" for row in own)]
        for own in zip(*(rows[label] for label in shown), strict=True)
    ]  # fmt: skip
    head = ["seed", "lowest cosine of two groups' gradients", "base model", *shown]
    show(lab.results, "plural_seeds", head, lines, "The worst group's share; cosines are those of linear.")
