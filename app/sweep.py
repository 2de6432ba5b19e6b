"""Many runs as one command: a method at several preferences p, several methods side by side, or both. [ours]

    python run.py --sweep 0.1 0.3 0.5 0.7 0.9              one training run per preference: the trade-off as a curve
    python run.py --compare firm linear morlhf soups       these methods at one preference
    python run.py --compare firm "firm beta=1" "firm beta=1 advantages=group"      one method, other settings

A method that takes no preference (mgda, say) is run once, at uniform p. Rewarded Soups train a specialist per objective
once (`baselines.py`), and every p only mixes their adapters. METHOD/p0.30-0.70/ and soups/specialist-NAME/ are ordinary
run directories. The same command with --out naming the directory goes on with it: finished runs stay.

Of hypervolumes (app/metrics.py) only those of equally many points compare. Left out on purpose: hypervolume without an
exact front, the hull of mixtures of two policies, several seeds (one seed's ± is over prompts, not over training runs).
"""

import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import baselines
import methods
import mgda
from app import metrics, options, report
from app.files import free_directory, nan_for_null, read_json, read_lines, to_json, write_text
from app.objectives import parse_spec
from app.report import aligned, plus_minus
from app.session import Session
from settings import Config
from worlds import toy

SPECIALIST = "morlhf"  # how soups train their specialists: on the one reward of a one-hot preference


def label(p: Sequence[float]) -> str:
    """A preference as a directory name: (0.3, 0.7) is p0.30-0.70, with up to four digits if they are needed."""
    digits = [f"{x:.4f}" for x in p]
    return "p" + "-".join(text[:-2] + text[-2:].rstrip("0") for text in digits)


def parse_preference(text: str, M: int) -> list[float]:
    """`0.3` -> [0.3, 0.7] for M = 2, `a:b:c` -> its shares [M]. Raises ValueError naming the value."""
    try:
        values = [float(value) for value in text.split(":")]
        if len(values) == 1:
            values.append(1.0 - values[0])
        return [round(x, 12) for x in mgda.preference_vector(values, M).tolist()]
    except ValueError:
        form = "0.3 for (0.3, 0.7), or a:b:c, a number >= 0 per objective"
        raise ValueError(f"sweep: {text!r} is not a preference for {M} objectives; write {form}") from None


def plan(config: Config, sweep: list[str] | None, compare: list[str] | None) -> dict[str, list[Config]]:
    """The runs of each comparand, by preference, with `out` open. Raises ValueError for what cannot be compared."""
    M, runs = len(config.objectives), {}
    centre, asked = (mgda.preference_vector(p, M).tolist() for p in (None, config.preference))
    preferences = sorted(parse_preference(text, M) for text in sweep) if sweep else [asked]
    if len(set(map(label, preferences))) < len(preferences):
        raise ValueError(f"sweep: {' '.join(sweep)} names a preference twice; name each once")
    for text in compare or [config.method]:
        variant = options.variant(config, text) if compare else config
        method = methods.method_of(variant)
        follows = method.several_runs or "preference" in methods.settings_of(method)
        runs[text] = [replace(variant, preference=p) for p in (preferences if follows else [centre])]
        methods.check(replace(variant, method=SPECIALIST) if method.several_runs else variant)
    if sweep and all(len(configs) == 1 for configs in runs.values()) and len(preferences) > 1:
        raise ValueError(f"sweep: {', '.join(runs)} takes no preference, so there is nothing to sweep")
    return runs


def sweep(config: Config, preferences: list[str] | None, compare: list[str] | None, train: Callable) -> None:
    """Train what is missing, measure it, and conclude. train: `run.train`. Raises ValueError on bad input."""
    runs = plan(config, preferences, compare)
    for first, *_ in runs.values():  # what is wrong with any of them is found before the first is trained
        Session(replace(first, method=SPECIALIST) if first.method == "soups" else first, progress=False)
        gc.collect()  # a Session is a cycle of references: drop its models before others are loaded
    shared = {name: value for name, value in vars(config).items() if name not in ("out", "method", "preference")}
    begun = config.out and Path(config.out, "sweep.json").is_file()
    out = free_directory(config.out, "compare" if compare else "sweep", bool(begun))
    if begun:
        before = read_json(out / "sweep.json")["settings"]
        if changed := [name for name in shared if shared[name] != before.get(name)]:
            raise ValueError(f"out: {out} holds a sweep with another {changed[0]}; name another directory")
    else:
        write_text(out / "sweep.json", json.dumps({"settings": shared}, indent=2) + "\n")
    print(f"{out}: if it is stopped, the same command with --out {out} goes on")
    names = [parse_spec(spec)[0] for spec in config.objectives]
    for text, configs in runs.items():
        home = out / text.replace(" ", ",").replace("/", "%2F")
        runs[text] = [replace(one, out=str(home / label(one.preference))) for one in configs]
        if methods.METHODS[configs[0].method].several_runs:
            soups(runs[text], names, home, train)
        else:
            for one in runs[text]:
                finish(one, train)
    conclude(config, runs, names, out)


def finish(config: Config, train: Callable[..., dict[str, Any]]) -> None:
    """Train, go on with what was begun, or do nothing if all is done."""
    out = Path(config.out)
    title = f"{out.parent.name} {out.name}"
    if (out / "summary.json").exists():
        done = read_json(out / "summary.json")["rounds"]
        if done != config.rounds:
            raise ValueError(f"out: {out} went on to {done} rounds, of {config.rounds} here; move it away")
        print(f"{title}: finished before")
        return
    gc.collect()
    train(config, out if (out / "config.json").exists() else None, title=title)


def soups(configs: Sequence[Config], names: Sequence[str], home: Path, train: Callable[..., dict[str, Any]]) -> None:
    """Rewarded Soups in the directory home: a specialist per objective, then Σ_m p_m θ_m for every config's p."""
    specialists = []
    for name, p in zip(names, np.eye(len(names)).tolist(), strict=True):
        out = str(home / f"specialist-{name}")
        specialists.append(replace(configs[0], method=SPECIALIST, preference=p, out=out))
        finish(specialists[-1], train)
    missing = [one for one in configs if not (home / label(one.preference) / "summary.json").exists()]
    if not missing:
        return
    session, lines, thetas = Session(specialists[-1]), [], []
    for specialist in specialists:
        session.config = specialist
        session.restore(Path(specialist.out))
        lines += session.lines
        thetas.append(session.federation.theta)
    session.lines = lines
    for one in missing:
        session.started, here = time.perf_counter(), home / label(one.preference)
        session.policy.adapter.assign(baselines.interpolate(torch.stack(thetas), one.preference))
        summary = report.summarise(session, session.evaluate(f"soups {here.name}"))
        summary |= {"method": "soups", "preference": one.preference, "mean_lambda": []}
        here.mkdir(exist_ok=True)
        write_text(here / "summary.json", to_json(summary, indent=2) + "\n")


def conclude(config: Config, runs: dict[str, list[Config]], names: Sequence[str], out: Path) -> None:
    """The table, pareto.png, and sweep.json. Raises ValueError if prompts, weights or code changed between runs."""
    from app import plots  # here: matplotlib takes its time to import

    summary_of = lambda one: read_json(Path(one.out, "summary.json"), nan_for_null)  # noqa: E731
    rows = {text: list(map(summary_of, configs)) for text, configs in runs.items()}
    settings, hashes = {"the clients' prompts": "clients", "the starting adapter": "adapter"}, defaultdict(set)
    for one, row in ((one, row) for text, group in rows.items() for one, row in zip(runs[text], group, strict=True)):
        for name, value in row["inputs"].items():  # runs that were asked for other clients have other prompts
            hashes[name, getattr(one, settings.get(name, "seed"))].add(value)
    if any(len(values) > 1 for values in hashes.values()):
        raise ValueError(f"out: prompts, weights or code changed between the runs in {out}; name another directory")
    several, front = {text: group for text, group in rows.items() if len(group) > 1}, None
    if options.front_is_known(config):
        front = toy.pareto_front([line["prompt"] for line in read_lines(next(out.glob("*/*/samples.jsonl")))])
    mean = lambda row, stage: [row["objectives"][name][stage]["mean"] for name in names]  # noqa: E731
    means = {} if front is None else {text: [mean(row, "after") for row in group] for text, group in several.items()}
    base = np.array(mean(next(iter(rows.values()))[0], "before"))
    volumes = {text: metrics.normalised_hypervolume(points, base, front) for text, points in means.items()}
    results = {"settings": read_json(out / "sweep.json")["settings"]} | {"results": rows, "hypervolume": volumes}
    write_text(out / "sweep.json", to_json(results, indent=2) + "\n")
    print(comparison(rows, names, config))
    if volumes:
        print("hypervolume (1 is the exact front): " + ", ".join(f"{text} {v:.3f}" for text, v in volumes.items()))
    plots.trade_off(rows, front, names, out / "pareto.png")
    print(f"\n{out}: pareto.png, sweep.json, and every run in METHOD/")


def comparison(rows: dict[str, list[dict[str, Any]]], names: Sequence[str], config: Config) -> str:
    """The closing table: the base model, then one row per comparand and preference."""
    shares = lambda values: "/".join(f"{x:.2f}" for x in values) or "–"  # noqa: E731
    first = next(iter(rows.values()))[0]["objectives"]
    base = [plus_minus(first[name]["before"]) for name in names]
    lines = [["", "p", "mean λ", *names, "KL", "MB up"], ["base model", "", "", *base, "", ""]]
    for text, group in rows.items():
        for row in group:
            gains = [plus_minus(row["objectives"][name]["gain"]) for name in names]
            ends = [f"{row['kl']['mean']:.2f}", f"{row['upload_bytes_per_client'] / 1e6:.2f}"]
            lines.append([text, shares(row["preference"]), shares(row["mean_lambda"]), *gains, *ends])
    return "\n".join([
        "",
        f"gains over the base model on {config.held_out} held-out prompts x {config.eval_samples} responses; ± is a "
        "standard error clustered by prompt",
        *aligned(lines),
        "KL in nats per response; MB up: by one client in the whole run (soups: in the runs that its rows share)",
    ])  # fmt: skip
