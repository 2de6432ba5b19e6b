"""Many runs as one command: a method at several preferences p, several methods side by side, or both. [ours]

    python run.py --sweep 0.1 0.3 0.5 0.7 0.9           one training run per preference: the trade-off as a curve
    python run.py --compare firm linear morlhf soups    these methods at one preference
    python run.py --sweep 0.1 0.5 0.9 --compare firm mgda linear soups

A method that takes no preference (mgda, say) is run once, at uniform p. Rewarded Soups train a specialist per objective
once (`baselines.py`), and every p only mixes their adapters. What comes of it:

    sweep.json                        the settings, and hashes of what they name; at the end the table's figures too
    firm/p0.30-0.70/                  an ordinary run directory, see run.py
    soups/specialist-helpful/         likewise: morlhf on this objective alone
    soups/p0.30-0.70/summary.json     the mixed adapter, measured
    pareto.png, weights.png           the trade-off; requested p₁ against the mean λ₁ that came of it

The same command with --out naming the directory goes on with it: what is finished is kept, a half-done run is resumed.

Hypervolume is the area that a method's points dominate above a reference point, so one number for a whole trade-off;
more points dominate more, so only sweeps of equally many points compare. Left out on purpose: hypervolume for M ≠ 2,
the hull of mixtures of two policies, several seeds (one seed's ± is over prompts, not over training runs).
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import baselines
import mgda
import rewards
from app import report
from app.checkpoint import has_state, read_state
from app.files import new_directory, owned, read_json, read_lines, to_json, write_text
from app.loading import fingerprint_of
from app.session import Session, check
from settings import METHODS, Config, absolute
from worlds import toy

Points = dict[str, list[list[float]]]  # method -> preferences
Groups = dict[str, list[dict[str, Any]]]  # method -> the `figures` of its points
Train = Callable[..., dict[str, Any]]  # run.train: (settings, directory to go on with, title=)
SPECIALIST = "morlhf"  # how soups train their specialists: on the one reward of a one-hot preference


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Area that `points` [n, 2] dominate above `reference` [2], both objectives maximised (Zitzler and Thiele 1999).

    A point that is not above the reference in both objectives contributes nothing.
    """
    area = height = 0.0
    for x, y in sorted((np.reshape(points, (-1, 2)) - reference).tolist(), reverse=True):  # from right to left
        if x > 0.0 and y > height:
            area += x * (y - height)  # the strip that no point further right has covered
            height = y
    return area


def normalised_hypervolume(points: np.ndarray, base: np.ndarray, front: np.ndarray) -> float:
    """(HV − HV_base) / (HV_front − HV_base): 0 is the base model alone, 1 the whole exact front.

    points [n, 2], base [2], front [K, 2] a polyline from left to right, counted with all points between its vertices.
    The reference point is the componentwise minimum of the base model and the front's nadir `front.min(0)`.
    """
    reference = np.minimum(base, np.min(front, axis=0))
    x, y = (np.asarray(front) - reference).T
    whole = x[0] * y[0] + float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())  # left of the front, and under it
    start = float(np.prod(base - reference))
    return (hypervolume(points, reference) - start) / (whole - start)


def label(p: Sequence[float]) -> str:
    """A preference as a directory name: (0.3, 0.7) is p0.30-0.70, with up to four digits where they are needed."""
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
        raise ValueError(f"sweep: {text!r} is no preference for {M} objectives; write {form}") from None


def plan(config: Config, sweep: list[str] | None, compare: list[str] | None) -> Points:
    """What is to be measured, at ascending preferences. Raises ValueError where that makes no sense."""
    M = len(config.run.objectives)
    if not M:
        raise ValueError("objectives: name at least one")
    if not config.firm.rounds:
        raise ValueError("rounds: --sweep and --compare train; ask for at least 1")
    methods = compare or [config.run.method]
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"compare: {unknown[0]!r} is none of {', '.join(METHODS)}")
    if sweep and not any(METHODS[method].takes_preference for method in methods):
        raise ValueError(f"sweep: {', '.join(methods)} takes no preference, so there is nothing to sweep")
    centre, asked = (mgda.preference_vector(p, M).tolist() for p in (None, config.firm.preference))
    preferences = sorted(parse_preference(text, M) for text in sweep) if sweep else [asked]
    for flag, values in (("compare", methods), ("sweep", [label(p) for p in preferences])):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"{flag}: {twice[0]} is named twice")
    return {method: preferences if METHODS[method].takes_preference else [centre] for method in methods}


def sweep(config: Config, preferences: list[str] | None, methods: list[str] | None, train: Train) -> None:
    """Train and measure every point, then the table and the pictures. `train` is run.py's.

    Raises ValueError before any long work where something is wrong, and whatever `train` raises.
    """
    points = plan(config, preferences, methods)
    names = [rewards.parse_spec(spec)[0] for spec in config.run.objectives]
    begun = bool(config.run.out) and Path(config.run.out, "sweep.json").is_file()
    name = f"{'compare' if methods else 'sweep'}-{config.run.preset}"
    with owned(Path(config.run.out)) if begun else new_directory(config.run.out, name) as out:
        runs = {method: trainings(config, method, ps, names, out / method) for method, ps in points.items()}
        begin(config, points, runs, out)
        n = sum(map(len, runs.values()))
        print(f"{out}: {n} training runs of {config.firm.rounds} rounds ({', '.join(points)})")
        try:
            for method, ps in points.items():
                for one in runs[method]:
                    finish(one, train)
                if METHODS[method].mixes:
                    soups(runs[method], ps, out / method)
        except BaseException:
            print(f"\nwhat is done is kept; the same command with --out {out} goes on from there")
            raise
        conclude(config, points, names, out)


def begin(config: Config, points: Points, runs: dict[str, list[Config]], out: Path) -> None:
    """Write down what a new sweep is made of in its directory: the settings, and hashes of what they name. Or compare
    that with what the same sweep began with, and with the checkpoints of its training runs.

    A setting that did not exist when the sweep began counts as its default there. Raises ValueError where they differ,
    where a run went on to more rounds, or where something is wrong with any of the runs.
    """
    asked = {"methods": list(points), "preferences": sorted({label(p) for ps in points.values() for p in ps})}
    settings, file, found = shared_settings(config) | asked, out / "sweep.json", {}
    if file.is_file():
        try:
            found = json.loads(file.read_text("utf-8"))
            saved = found["settings"]
            written = {name: saved.pop(name) for name in asked}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"out: {file} is damaged, or of something else; name another directory") from error
        saved = shared_settings(absolute(Config.from_flat(saved))) | written
        for name, value in settings.items():
            if saved[name] != value:
                theirs = f"{out} holds a sweep with {name} {saved[name]}, not {value}"
                raise ValueError(f"out: {theirs}; name another directory")
    first, *others = [one for ones in runs.values() for one in ones]
    homes = [Path(one.run.out) for one in (first, *others)]
    fingerprints = {file: found.get("fingerprint", {})} | fingerprints_of(homes, config.firm.rounds)  # old ones: none
    ends, made = homes + [out / method / label(p) for method, ps in points.items() for p in ps], {}
    if not all((home / "summary.json").exists() for home in ends):
        session = Session(first)  # finds what is wrong
        for other in others:
            check(other)
            session.federate(other)
        start = {"the adapter": fingerprint_of([("", session.start)])} if config.run.adapter else {}
        made = session.fingerprint | start
    for where, theirs in fingerprints.items():
        for what, digest in theirs.items():
            if made.setdefault(what, digest) != digest:
                raise ValueError(f"out: {what} changed since {where} was made; name another directory")
    if not found:
        write_text(file, json.dumps({"settings": settings, "fingerprint": made}, indent=2) + "\n")


def fingerprints_of(homes: Sequence[Path], rounds: int) -> dict[Path, dict[str, str]]:
    """What the checkpoints in these run directories say that they were made from. Raises ValueError for one of more
    rounds, and for a damaged one of a run that is not finished.
    """
    found = {}
    for home in (home for home in homes if has_state(home / "checkpoint")):
        try:
            _, values = read_state(home / "checkpoint")
        except ValueError:
            if (home / "summary.json").exists():  # nobody needs it
                continue
            raise
        if (done := values["rounds_done"]) > rounds:
            raise ValueError(f"out: {home} went on to {done} rounds, of {rounds} here; move it away")
        found[home] = its if isinstance(its := values["fingerprint"], dict) else {}  # older ones hashed less
    return found


def shared_settings(config: Config) -> dict[str, Any]:
    """What all runs of a sweep have in common."""
    return {name: value for name, value in config.flat().items() if name not in ("out", "method", "preference")}


def trainings(
    config: Config, method: str, ps: Sequence[Sequence[float]], names: Sequence[str], out: Path
) -> list[Config]:
    """The settings of a method's training runs: one per preference, or of soups a specialist per objective."""
    if not METHODS[method].mixes:
        return [one_run(config, method, p, out / label(p)) for p in ps]
    one_hot = zip(np.eye(len(names)).tolist(), names, strict=True)
    return [one_run(config, SPECIALIST, p, out / f"specialist-{name}") for p, name in one_hot]


def one_run(config: Config, method: str, p: Sequence[float], out: Path) -> Config:
    """The settings of one training run."""
    run = replace(config.run, method=method, out=str(out))
    return replace(config, run=run, firm=replace(config.firm, preference=list(p)))


def finish(config: Config, train: Train) -> None:
    """Train, go on with what was begun, or do nothing where all is done."""
    out = Path(config.run.out)
    title = f"{out.parent.name} {out.name}"
    if (out / "summary.json").exists():
        print(f"{title}: finished before")
        return
    begun = (out / "config.json").exists()
    if out.exists() and not begun:
        shutil.rmtree(out)  # killed before its first file
    gc.collect()  # a Session is a cycle of references: drop the last one's models before others are loaded
    try:
        train(config, out if begun else None, title=title)
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error


def soups(specialists: Sequence[Config], ps: Sequence[Sequence[float]], out: Path) -> None:
    """Rewarded Soups: of specialists that were trained, one per objective, Σ_m p_m θ_m, measured at every p."""
    missing = [p for p in ps if not (out / label(p) / "summary.json").exists()]
    if not missing:
        return
    gc.collect()
    homes = [Path(specialist.run.out) for specialist in specialists]
    session = Session(specialists[-1])
    before = session.restore(homes[-1] / "checkpoint")
    metrics = [line for home in homes for line in read_lines(home / "metrics.jsonl")]
    thetas = []
    for home in homes:
        session.policy.adapter.load(home / "adapter")
        thetas.append(session.policy.adapter.vector())
    for p in missing:
        started = time.perf_counter()
        session.policy.adapter.assign(baselines.interpolate(torch.stack(thetas), p))
        after = session.evaluate(f"soups {label(p)}")
        summary = report.summarise(session, before, after, metrics, time.perf_counter() - started)
        summary |= {"method": "soups", "preference": p, "worst_served": None, "best": None}
        (out / label(p)).mkdir(exist_ok=True)
        write_text(out / label(p) / "summary.json", to_json(summary, indent=2) + "\n")


def figures(config: Config, method: str, p: Sequence[float], names: Sequence[str], run: Path) -> dict[str, Any]:
    """What one point's files say; lists are by objective, in raw units. `mean_lambda` is None for soups."""
    summary = read_json((run / "summary.json").read_text("utf-8"))
    of = lambda stage, key: [summary["objectives"][name][stage][key] for name in names]  # noqa: E731
    rounds = [] if METHODS[method].mixes else read_lines(run / "metrics.jsonl")
    base, mean = of("before", "mean"), of("after", "mean")
    return {
        "method": method,
        "preference": p if METHODS[method].takes_preference else None,
        "mean_lambda": [float(np.nanmean([m[f"lambda/{name}"] for m in rounds])) for name in names] if rounds else None,
        "mean": mean,
        "standard_error": of("after", "standard_error"),
        "gain": of("gain", "mean"),
        "gain_error": of("gain", "standard_error"),
        "kl": summary["kl"]["mean"],
        "kl_error": summary["kl"]["standard_error"],
        "upload_bytes_per_client": summary["upload_bytes_total"] / config.firm.clients,
        "dominated": all(a <= b for a, b in zip(mean, base, strict=True)) and mean != base,
        "base": {"mean": base, "standard_error": of("before", "standard_error")},
        "scale": of("calibration", "scale"),
    }


def conclude(config: Config, points: Points, names: Sequence[str], out: Path) -> None:
    """The table, the pictures, and the figures of both into sweep.json."""
    groups = {m: [figures(config, m, p, names, out / m / label(p)) for p in ps] for m, ps in points.items()}
    rows = [row for group in groups.values() for row in group]
    base, front = np.array(rows[0]["base"]["mean"]), None
    if config.front_is_known:
        front = toy.pareto_front([line["prompt"] for line in read_lines(next(out.glob("*/*/samples.jsonl")))])
    volumes, meaning = hypervolumes(groups, base, front)
    saved = json.loads((out / "sweep.json").read_text("utf-8")) | {"results": rows, "hypervolume": volumes}
    write_text(out / "sweep.json", to_json(saved, indent=2) + "\n")
    print(report.comparison(rows, names, config))
    if volumes:
        print("hypervolume: " + ", ".join(f"{name} {volume:.3f}" for name, volume in volumes.items()) + meaning)
    if len(groups.get("firm", [])) > 1:
        asked, moved = (np.ptp([row[k][0] for row in groups["firm"]]) for k in ("preference", "mean_lambda"))
        if moved < asked / 2:
            print(f"firm: λ moved by {moved:.2f} while p moved by {asked:.2f}; a larger --beta follows p more closely")
    draw(groups, base, front, names, out)
    print(f"\n{out}: pictures, sweep.json, and every run in METHOD/")


def draw(groups: Groups, base: np.ndarray, front: np.ndarray | None, names: Sequence[str], out: Path) -> None:
    """pareto.png, and weights.png where a preference could be followed.

    The worst gain is in units of what the ideal point would gain, or without a front in the base policy's deviations.
    """
    from app import plots  # here: matplotlib takes its time to import

    unit, axis = next(iter(groups.values()))[0]["scale"], "worst gain (base policy's deviations)"
    if front is not None:
        unit, axis = front.max(0) - base, "worst gain (1 is the ideal point)"
    drawn, lines = {}, {}
    for method, group in groups.items():
        of = lambda key, group=group: np.array([row[key] for row in group])  # noqa: E731
        gain, error = of("gain") / unit, of("gain_error") / unit  # [n, M]
        worst = gain.argmin(1)[:, None]
        drawn[method] = {key: of(key) for key in ("mean", "kl", "kl_error")} | {"error": of("standard_error")}
        for key, values in (("gain", gain), ("gain_error", error)):
            drawn[method][key] = np.take_along_axis(values, worst, 1)[:, 0]
        if len(group) > 1:
            drawn[method]["p"] = [row["preference"][0] for row in group]
        if len(group) > 1 and not METHODS[method].mixes:
            lines[method] = [row["preference"][0] for row in group], [row["mean_lambda"][0] for row in group], None
    plots.pareto(drawn, base, front, names, out / "pareto.png", axis)
    if lines:
        axes = (f"requested p of {names[0]}", f"mean λ of {names[0]} over the run", "Is the preference followed?")
        plots.panels([plots.Panel(*axes, lines, diagonal=True)], out / "weights.png")


def hypervolumes(groups: Groups, base: np.ndarray, front: np.ndarray | None) -> tuple[dict[str, float], str]:
    """Hypervolume of every method with several points, and what it means; nothing for M ≠ 2.

    Without an exact front: of gains in the base policy's deviations, above the worst of the base model and all points.
    """
    several = [method for method, group in groups.items() if len(group) > 1]
    if len(base) != 2 or not several:
        return {}, ""
    if front is not None:
        volumes = {m: normalised_hypervolume([row["mean"] for row in groups[m]], base, front) for m in several}
        return volumes, " (0 is the base model, 1 the exact front)"
    gains = {m: np.array([row["gain"] for row in group]) / group[0]["scale"] for m, group in groups.items()}
    reference = np.minimum(np.concatenate(list(gains.values())).min(0), 0.0)
    volumes = {m: hypervolume(gains[m], reference) for m in several} | {"base model": hypervolume(0 * base, reference)}
    at = "/".join(f"{x:+.2f}" for x in reference)
    return volumes, f"\n  (of gains in the base policy's deviations, above {at}: the worst of base model and points)"
