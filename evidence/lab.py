"""Many runs, and what is computed of each: what the experiments are made with. [ours]

A job is a dict of settings that differ from the preset `tiny`, or from the one that it names; `Lab.rows` turns jobs
into rows of results/NAME.csv, each an ordinary run through `run.train`, on worker processes of one thread each. A
finished run is a row at once, and a row that is there is not run again: it is found by its settings and the version of
the update, `UPDATE`. Every row says which commit made it.

Progress is measured against the exact Pareto front of the held-out prompts: a gain is normalised by what the ideal
point would gain, gain_j / (ideal_j − base_j), and of a sweep `sweep.normalised_hypervolume` counts.
"""

import csv
import io
import json
import math
import multiprocessing
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import mgda
import run
from app import sweep
from app.files import read_json, read_lines, write_text
from app.metrics import disagreement
from app.session import Session
from evidence import diagnostics
from ppo import PPO
from settings import LEARNERS, PRESETS, Config
from worlds import toy

BASE = PRESETS["tiny"] | {"preset": "tiny", "diagnostics": True}  # what a job's settings change
NAMES = ("helpful", "harmless")
UPDATE = 2  # raise it with every change that alters more than the rounding of a run of equal settings
EIGHTHS = 8  # pieces that the curves of a run in the reasoning world are cut into
FIGURES = {"pluralllm-tiny": "predictor_figures", "plural-firm-tiny": "plural_figures"}  # of `plural.py`
BETAS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
LOGGED = {  # columns of a row, and the names under which metrics.jsonl has them for every round
    "lambda_helpful": "lambda/helpful", "lambda_harmless": "lambda/harmless", "disagreement": "lambda/disagreement",
    "drift": "drift", "dispersion": "adapter/dispersion", "cosine": "cosine",
    "stationarity": "stationarity",
}  # fmt: skip


@dataclass
class Lab:
    """Where results go, and how much work is allowed."""

    results: Path
    quick: bool
    workers: int

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        """The workers, of all experiments: a process takes seconds to start."""
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
        return ProcessPoolExecutor(self.workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def some(self, values: Sequence) -> Sequence:
        """All values (seeds, say), or the two ends of them in miniature."""
        return (values[0], values[-1]) if self.quick and len(values) > 2 else values

    def rows(self, name: str, jobs: Sequence[dict]) -> list[dict]:
        """One row per job (per preference for soups), in the order of the jobs; what is missing is run now.

        Raises RuntimeError where runs fail, after all others are done and kept.
        """
        path = self.results / f"{name}.csv"
        small = {"held_out": 32, "eval_samples": 2} if self.quick else {}
        jobs = [small | job | ({"rounds": 2} if self.quick else {}) for job in jobs]
        done = read_rows(path)
        missing = {key(job): job for job in jobs if key(job) not in done}
        if missing:
            self.run_jobs(name, list(missing.values()), path)
            done = read_rows(path)
        return [row for job in jobs for row in done[key(job)]]

    def run_jobs(self, name: str, jobs: list[dict], path: Path) -> None:
        """Run the jobs on the workers, and add the rows of each to the file as it finishes."""
        failed, made_by = [], commit()
        try:
            futures = {self.pool.submit(run_job, job): key(job) for job in jobs}
            for future in tqdm(as_completed(futures), name, total=len(jobs), unit="run"):
                if error := future.exception():
                    failed.append((futures[future], error))
                else:
                    append_rows(path, [{"settings": futures[future], "commit": made_by} | r for r in future.result()])
        except BaseException:
            self.pool.shutdown(cancel_futures=True)  # a stop waits for the runs under way, not for those in the queue
            raise
        if failed:
            settings, error = failed[0]
            raise RuntimeError(f"{name}: {len(failed)} runs failed, first {settings}: {error}") from error

    def groups(self, name: str, jobs: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
        """The same for named groups of jobs."""
        self.rows(name, [job for group in jobs.values() for job in group])
        return {label: self.rows(name, group) for label, group in jobs.items()}


def key(job: dict) -> str:
    """A job's settings and the version of the update as text: what a row is found by."""
    return json.dumps(job | {"update": UPDATE}, sort_keys=True)


def commit() -> str:
    """The commit that is checked out, with a + where code has changed since; `unknown` outside of git."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain", "--", ":/*.py"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows at the end, under the header that the first ones made; the file is written whole or not at all.

    A figure that a row lacks is NaN: soups have no rounds of their own. Raises ValueError for a column that the header
    lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text("utf-8") if path.exists() else ""
    text = io.StringIO()
    header = next(csv.reader([before.split("\n")[0]])) if before else list(rows[0])
    writer = csv.DictWriter(text, header, restval="nan", lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    write_text(path, before + text.getvalue())


def read_rows(path: Path) -> dict[str, list[dict]]:
    """Rows by the key of their job; figures as numbers."""
    found: dict[str, list[dict]] = {}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {k: float(v) for k, v in row.items() if k not in ("settings", "commit", "method") and v != ""}
                found.setdefault(row["settings"], []).append(row | numbers | json.loads(row["settings"]))
    return found


# ---- one job --------------------------------------------------------------------------------------------------


def run_job(job: dict) -> list[dict]:
    """Train, measure, clean up. Runs in a worker process; soups give one row per preference, all others one."""
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="experiment-", dir="runs") as scratch:
        if job.get("preset") == "fedmoa-tiny":
            return [reasoning_figures(job, Path(scratch) / "run")]
        if figures := FIGURES.get(job.get("preset")):
            from evidence import plural  # here: it is made with this module

            return [getattr(plural, figures)(job, Path(scratch) / "run")]
        if job["method"] == "soups":
            return soups(job, Path(scratch))
        out, settings = Path(scratch) / "run", {name: value for name, value in job.items() if name != "cold"}
        config = Config.from_flat(BASE | settings | {"out": str(out)})
        summary = run.train(config, progress=False)
        metrics = read_lines(out / "metrics.jsonl")
        row = progress_figures(job, summary, out) | round_figures(job, metrics, summary) | byte_figures(metrics)
        if job["method"] in ("firm", "mgda", "linear"):  # their clients have the Gram of all objectives
            grams = [safetensors.torch.load_file(file) for file in sorted((out / "grams").glob("*.safetensors"))]
            row |= gram_figures(job, grams)
        return [row | (cold_figures(config, job["cold"], out) if "cold" in job else {})]


def reasoning_figures(job: dict, out: Path) -> dict:
    """A run in the reasoning world: held-out means in raw units, those of the clients' kinds under the global adapter
    and under their own; λ, rewards and the share of groups of equal rewards in every eighth of the rounds, and in the
    last one, means over the clients that hold the objective.
    """
    config = Config.from_flat(PRESETS["fedmoa-tiny"] | job | {"out": str(out)})
    summary = run.train(config, progress=False)
    metrics = read_lines(out / "metrics.jsonl")
    row = {"method": job["method"], "seed": job["seed"], "severity": config.run.severity, "kl": summary["kl"]["mean"]}
    for name, figures in summary["objectives"].items():
        row |= {f"base_{name}": figures["before"]["mean"], name: figures["after"]["mean"]}
    found = summary.get("clients", [])
    for stage, (i, data) in product(("before", "after", "personal"), enumerate(("careful", "poor"))):
        own = [client["primary"].get(stage, {}).get("mean", math.nan) for client in found[i::2]]  # as in CLIENTS
        row[f"{data}_{stage}"] = float(np.mean(own)) if own else math.nan
    eighths = [part.tolist() for part in np.array_split(metrics, EIGHTHS)]
    for kind, name in product(("lambda", "reward", "zero_spread"), summary["objectives"]):
        curve = [float(np.mean([m.get(f"{kind}/{name}", math.nan) for m in part])) for part in eighths if part]
        row |= {f"{kind}_{name}@{i}": value for i, value in enumerate(curve + [math.nan] * (EIGHTHS - len(curve)))}
        row[f"{kind}_{name}"] = curve[-1]
    return row | byte_figures(metrics) | {"training_seconds": sum(m["seconds"] for m in metrics)}


def soups(job: dict, scratch: Path) -> list[dict]:
    """Rewarded Soups: a specialist per objective, then a row for every one of `preferences` (p₁)."""
    config = Config.from_flat(BASE | {k: v for k, v in job.items() if k != "preferences"})
    ps = [[p, round(1.0 - p, 12)] for p in job["preferences"]]
    specialists = sweep.trainings(config, job["method"], ps, NAMES, scratch)
    for specialist in specialists:
        run.train(specialist, progress=False)
    sweep.soups(specialists, ps, scratch)
    homes = [Path(specialist.run.out) for specialist in specialists]
    sent = byte_figures([line for home in homes for line in read_lines(home / "metrics.jsonl")])
    rows = []
    for p in ps:
        summary = read_json((scratch / sweep.label(p) / "summary.json").read_text("utf-8"))
        rows.append(progress_figures(job | {"preference": p}, summary, homes[0]) | sent)
    return rows


def cold_figures(config: Config, temperature: float, out: Path) -> dict[str, float]:
    """Held-out means, in raw units, of a finished run's policy at another sampling temperature."""
    session = Session(replace(config, rollout=replace(config.rollout, temperature=temperature)), progress=False)
    session.policy.adapter.load(out / "adapter")
    means = session.evaluate("cold").scores.mean((0, 1)).tolist()
    return {f"cold_{name}": mean for name, mean in zip(session.names, means, strict=True)}


# ---- its figures ----------------------------------------------------------------------------------------------


def progress_figures(job: dict, summary: dict, out: Path) -> dict:
    """Held-out means in raw units, gains, and gains normalised by what the ideal point would gain. out: the run's."""
    prompts = [sample["prompt"] for sample in read_lines(out / "samples.jsonl")]
    ideal = toy.pareto_front(prompts, points=0).max(0)  # [2]
    p = (job.get("preference") or [1 / len(summary["objectives"])])[0]
    row = {"method": job["method"], "seed": job["seed"], "p": p, "held_out": len(prompts)}
    row["risky"] = sum(toy.topic_of(prompt) in toy.RISKY for prompt in prompts)
    for j, name in enumerate(NAMES):
        before, after, gain = (summary["objectives"][name][stage] for stage in ("before", "after", "gain"))
        row |= {f"base_{name}": before["mean"], name: after["mean"], f"gain_{name}": gain["mean"]}
        row[f"error_{name}"] = after["standard_error"]
        row[f"normalised_{name}"] = gain["mean"] / (ideal[j] - before["mean"])
    row["worst_gain"] = min(row[f"normalised_{name}"] for name in NAMES)
    return row | {"kl": summary["kl"]["mean"]}


def byte_figures(metrics: list[dict]) -> dict:
    """Bytes per client and round, by part."""
    parts = [(way, part) for way in ("upload", "download") for part in ("payload", "header", "scalars")]
    return {f"{way}_{part}": float(np.mean([m[f"{way}/{part}"] for m in metrics])) for way, part in parts}


def round_figures(job: dict, metrics: list[dict], summary: dict) -> dict:
    """Means over the rounds of what is logged every round. Movement is ‖λ̄_t − λ̄_{t−1}‖, λ̄ [M] the logged weights.

    The explained variance is that of rounds 4 to the last, NaN for a method without a critic for each objective.
    The averaging residual is relative to ‖mean(ΔW)‖, stationarity is that of the second half of the rounds. Roughness
    is in deviations of the base policy's rewards; `net_roughness` is without what sampling the round's N responses
    alone would make, √max(roughness² − mean(s² / N), 0), s the deviation of the round's rewards; NaN with groups, whose
    responses to one prompt are alike.
    """
    later = metrics[1:] or metrics  # the first round starts from an adapter of zero
    rounds = {"stationarity": metrics[len(metrics) // 2 :]}
    row = {name: float(np.mean([m[log] for m in rounds.get(name, metrics)])) for name, log in LOGGED.items()}
    weights = np.array([[m[f"lambda/{name}"] for name in summary["objectives"]] for m in metrics])  # [T, M]
    row["movement"] = float(np.linalg.norm(np.diff(weights, axis=0), axis=1).mean()) if len(metrics) > 1 else math.nan
    row["averaging_residual"] = float(np.mean([m["adapter/averaging_residual"] / m["adapter/norm"] for m in later]))
    grouped = LEARNERS.get(job.get("advantages"), PPO).group_size > 1
    for name in NAMES:
        scale = summary["objectives"][name]["calibration"]["scale"]
        rough = diagnostics.roughness([m[f"reward/{name}"] for m in metrics])
        N = job.get("clients", 8) * job.get("batch_size", 16)
        floor = float(np.mean([m[f"reward_sd/{name}"] ** 2 for m in metrics])) / N
        row[f"roughness_{name}"] = rough / scale
        net = max(rough**2 - floor, 0.0) ** 0.5 / scale
        row[f"net_roughness_{name}"] = math.nan if grouped else net
        explained = [m.get(f"explained_variance/{name}", math.nan) for m in metrics[3:] or metrics]
        row[f"explained_variance_{name}"] = float(np.mean(explained))
    return row | {"training_seconds": sum(m["seconds"] for m in metrics)}


def gram_figures(job: dict, grams: list[dict]) -> dict:
    """λ solved again on the Grams that the run kept: under every β, and from half-batches."""
    p = job.get("preference")
    rounds = [noise_figures(g, job.get("beta", 0.01), p) for g in grams]
    for g, figures in zip(grams, rounds, strict=True):
        for beta in BETAS:
            figures |= {f"{name}@{beta:g}": value for name, value in resolve(g, beta, p).items()}
    row = means(rounds)
    steps = [g["steps"].flatten(0, 2) for g in grams]  # [C · runs · K, M, M] of every round
    traces = [G.diagonal(dim1=1, dim2=2).sum(1) for G in steps]
    G = torch.cat(steps)
    gaps = (G[:, 0, 0] - 2 * G[:, 0, -1] + G[:, -1, -1]) / torch.cat(traces)  # ‖g₁ − g_M‖² / tr G
    row |= {"gap": float(gaps.mean()), "gap_max": float(gaps.max()), "gap_small": float((gaps <= 1e-6).double().mean())}
    quarter = max(len(grams) // 4, 1)
    for label, part in (("first", traces[:quarter]), ("last", traces[-quarter:])):
        row[f"trace_{label}"] = float(torch.cat(part).mean())
    return row


def means(rows: list[dict]) -> dict[str, float]:
    """The mean of every figure, over the rows that have it."""
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def resolve(g: dict, beta: float, preference: list[float] | None) -> dict[str, float]:
    """Disagreement (mean over steps), drift at θ_t, and disagreement in λ₁ − λ_M, with λ solved under `beta`."""
    steps = g["steps"][:, 0]  # [C, K, M, M]
    solve = lambda G: mgda.solve(mgda.normalise(G), beta, preference)  # noqa: E731
    lam = torch.stack([torch.stack([solve(G) for G in client]) for client in steps])  # [C, K, M]
    difference = lam[..., 0] - lam[..., -1]  # [C, K]
    return {
        "disagreement": float(np.mean([disagreement(step) for step in lam.unbind(1)])),
        "drift": diagnostics.drift(g["start"].sum((1, 4)), lam[:, 0], g["weights"]),
        "twin_disagreement": float((difference - difference.mean(0)).abs().mean()),
    }


def noise_figures(g: dict, beta: float, preference: list[float] | None = None) -> dict:
    """How far λ under FIRM's rule lies from what the other clients' gradients say: from one batch, from two halves, and
    for λ = p, which knows nothing.

    The reference is solved on the cross Gram of the others' mean gradient: C − 1 times the rows, none of them the
    client's own, and still noisy; on an iid split it is an estimate of the same λ. `half_cosine` is the cosine of two
    half-batch gradients of one objective on one client.
    """
    start, weights = g["start"], g["weights"]  # [C, 2, M, C, 2, M] and [C]
    figures, M = [], start.shape[2]
    for c in range(len(weights)):
        own = start[c, :, :, c]  # [2, M, 2, M]
        others = weights * (torch.arange(len(weights)) != c)
        federated = diagnostics.federated_gram(start, others)  # NaN where all others were rejected
        lam = {
            "batch": mgda.solve(mgda.normalise(own.sum((0, 2))), beta, preference),
            "cross": solve_cross(own, beta, preference),
            "constant": mgda.preference_vector(preference, M),
            "reference": solve_cross(federated, beta, preference) if others.any() else torch.full((M,), math.nan),
        }
        first, second, between = own[0, :, 0].diagonal(), own[1, :, 1].diagonal(), own[0, :, 1].diagonal()
        figures.append({"half_cosine": float((between / (first * second).sqrt()).mean())})
        for name in ("batch", "cross", "constant"):
            figures[-1][f"error_{name}"] = float((lam[name] - lam["reference"]).norm())
        for name in ("batch", "cross", "reference"):
            figures[-1][f"lambda1_{name}"] = float(lam[name][0])
    return means(figures)


def solve_cross(halves: torch.Tensor, beta: float, preference: list[float] | None = None) -> torch.Tensor:
    """λ [M] from the inner products of two half-batches [2, M, 2, M], as mgda.cross_gram would have it."""
    cross = halves[0, :, 1]
    return mgda.solve(mgda.normalise(mgda.positive_part(2.0 * (cross + cross.T))), beta, preference)


def front_of(row: dict) -> np.ndarray:
    """The exact front of this row's held-out prompts: only the share of risky ones matters to it. [K, 2]"""
    risky, benign = (next(t for t in toy.TOPICS if (t in toy.RISKY) == wanted) for wanted in (True, False))
    return toy.pareto_front([risky] * int(row["risky"]) + [benign] * int(row["held_out"] - row["risky"]))


def sweep_volume(rows: list[dict], kind: str = "") -> float:
    """Normalised hypervolume of one seed's sweep; kind `cold_`: of its policies sampled colder."""
    points, base = (np.array([[row[f"{k}{name}"] for name in NAMES] for row in rows]) for k in (kind, "base_"))
    return sweep.normalised_hypervolume(points, base[0], front_of(rows[0]))


def mean_points(rows: list[dict], preferences: Sequence[float]) -> dict[str, np.ndarray]:
    """Means over the seeds by preference p: mean [n, 2], kl, the worst gain and λ of helpful [n], and standard errors
    of the first three.
    """
    by_p = lambda figure: np.array([[row[figure] for row in rows if row["p"] == p] for p in preferences])  # noqa: E731
    points = np.stack([by_p(name) for name in NAMES], 1)  # [n, 2, seeds]
    figures = {"kl": "kl", "gain": "worst_gain", "lambda": "lambda_helpful"}
    root = max(points.shape[2] - 1, 1) ** 0.5
    by_name = {name: by_p(figure).mean(1) for name, figure in figures.items()}
    by_name |= {f"{name}_error": by_p(figures[name]).std(1) / root for name in ("kl", "gain")}
    return by_name | {"p": list(preferences), "mean": points.mean(2), "error": points.std(2) / root}
