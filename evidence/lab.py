"""Many runs, their figures, their statistics: what the experiments are made with. [ours]

A job is a dict of settings that differ from the preset `tiny`; `Lab.rows` turns jobs into rows of results/NAME.csv,
each an ordinary run through `run.train`, on worker processes of one thread each. A finished run is a row at once, and a
row that is there is not run again.

Progress is measured against the exact Pareto front of the held-out prompts: a gain is normalised by what the ideal
point would gain, gain_j / (ideal_j − base_j), and of a sweep `sweep.normalised_hypervolume` counts.
Differences are paired by seed: equal seeds mean equal splits, prompts and uniforms.
"""

import csv
import io
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy import stats
from tqdm import tqdm

import mgda
import run
from app import plots, report, sweep
from evidence import diagnostics
from settings import PRESETS, Config
from worlds import toy

ROUND_FIGURES = [
    *("lambda_helpful", "lambda_harmless", "disagreement", "drift", "movement", "dispersion", "averaging_residual"),
    *("cosine", "stationarity", "roughness_helpful", "roughness_harmless", "net_roughness_helpful"),
    *("net_roughness_harmless", "training_seconds"),
]
BASE = PRESETS["tiny"] | {"preset": "tiny"}
NAMES = ("helpful", "harmless")
BETAS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
GRAM_FIGURES = [
    *(f"{figure}@{beta:g}" for beta in BETAS for figure in ("disagreement", "drift", "twin_disagreement")),
    *("gap", "gap_max", "gap_small", "trace_first", "trace_last", "half_cosine", "error_batch", "error_cross"),
    *("error_constant", "lambda1_batch", "lambda1_cross", "lambda1_reference"),
]


@dataclass
class Lab:
    """Where results go, and how much work is allowed."""

    results: Path
    quick: bool
    workers: int
    most_seeds: int = 100

    def seeds(self, n: int) -> tuple[int, ...]:
        """The reporting seeds 0, 1, …, as many as allowed; two in miniature."""
        return tuple(range(min(2 if self.quick else n, self.most_seeds)))

    def some(self, values: Sequence) -> Sequence:
        """All values, or the two ends of them in miniature."""
        return (values[0], values[-1]) if self.quick and len(values) > 2 else values

    def rows(self, name: str, jobs: Sequence[dict]) -> list[dict]:
        """One row per job (per preference for soups), in the order of the jobs; what is missing is run now."""
        path = self.results / f"{name}.csv"
        small = {"rounds": 2, "held_out": 32, "eval_samples": 2} if self.quick else {}
        jobs = [job | {k: v for k, v in small.items() if k not in job or k == "rounds"} for job in jobs]
        done = read_rows(path)
        missing = list({key(job): job for job in jobs if key(job) not in done}.values())
        if missing:
            spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
            failed = []
            pool = ProcessPoolExecutor(self.workers, spawn)
            try:
                futures = {pool.submit(run_job, job): job for job in missing}
                for future in tqdm(as_completed(futures), name, total=len(missing), unit="run"):
                    settings = key(futures[future])
                    if error := future.exception():
                        failed.append((settings, error))
                    else:
                        append_rows(path, [{"settings": settings} | row for row in future.result()])
            finally:
                pool.shutdown(cancel_futures=True)  # a stop waits for the runs under way, not for those in the queue
            if failed:  # only now: the other runs are kept
                settings, error = failed[0]
                raise RuntimeError(f"{name}: {len(failed)} runs failed, first {settings}: {error}") from error
            done = read_rows(path)
        return [row for job in jobs for row in done[key(job)]]

    def groups(self, name: str, jobs: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
        """The same for named groups of jobs."""
        self.rows(name, [job for group in jobs.values() for job in group])
        return {label: self.rows(name, group) for label, group in jobs.items()}


def key(job: dict) -> str:
    """A job's settings as text: what a row is found by."""
    return json.dumps(job, sort_keys=True)


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows at the end, under the header that the first ones made; the file is written whole or not at all.

    Raises ValueError for a column that the header lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text("utf-8") if path.exists() else ""
    text = io.StringIO()
    header = next(csv.reader([before.split("\n")[0]])) if before else list(rows[0])
    writer = csv.DictWriter(text, header, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    report.write(path, before + text.getvalue())


def read_rows(path: Path) -> dict[str, list[dict]]:
    """Rows by the key of their job; figures as numbers."""
    found: dict[str, list[dict]] = {}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {k: float(v) for k, v in row.items() if k not in ("settings", "method") and v != ""}
                found.setdefault(row["settings"], []).append(row | numbers | json.loads(row["settings"]))
    return found


# ---- one job --------------------------------------------------------------------------------------------------


def run_job(job: dict) -> list[dict]:
    """Train, measure, clean up. Runs in a worker process; soups give one row per preference, all others one."""
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="experiment-", dir="runs") as scratch:
        if job["method"] == "soups":
            return soups(job, Path(scratch))
        out = Path(scratch) / "run"
        summary = run.train(Config.from_flat(BASE | job | {"out": str(out)}), progress=False)
        metrics, grams = read_run(out)
        row = progress_figures(job, summary, read_prompts(out)) | round_figures(job, metrics, summary)
        row |= byte_figures(metrics)
        own = job["method"] in ("firm", "mgda", "linear")  # their clients have the Gram of all objectives
        return [row | (gram_figures(job, grams) if own else dict.fromkeys(GRAM_FIGURES, float("nan")))]


def soups(job: dict, scratch: Path) -> list[dict]:
    """Rewarded Soups: a specialist per objective, then a row for every one of `preferences` (p₁)."""
    quiet = lambda config, resume, title: run.train(config, resume, progress=False)  # noqa: E731
    config = Config.from_flat(BASE | {k: v for k, v in job.items() if k != "preferences"})
    ps = [[p, round(1.0 - p, 12)] for p in job["preferences"]]
    sweep.soups(config, ps, NAMES, scratch, quiet, lambda config: run.Session(config, progress=False))
    homes = [scratch / f"specialist-{name}" for name in NAMES]
    metrics = [line for home in homes for line in read_run(home)[0]]
    rows = []
    for p in ps:
        summary = json.loads((scratch / sweep.label(p) / "summary.json").read_text("utf-8"))
        row = progress_figures(job | {"preference": p}, summary, read_prompts(homes[0]))
        unknown = dict.fromkeys([*ROUND_FIGURES, *GRAM_FIGURES], float("nan"))
        rows.append(row | unknown | byte_figures(metrics))
    return rows


def read_run(out: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl (null is NaN), and the Grams of every round."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    metrics = [{k: float("nan") if v is None else v for k, v in line.items()} for line in lines]
    return metrics, [safetensors.torch.load_file(file) for file in sorted((out / "grams").glob("*.safetensors"))]


def read_prompts(out: Path) -> list[str]:
    """The held-out prompts, as the objectives saw them."""
    return [json.loads(line)["prompt"] for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]


def progress_figures(job: dict, summary: dict, prompts: list[str]) -> dict:
    """Held-out means in raw units, gains, and gains normalised by what the ideal point would gain."""
    front = toy.pareto_front(prompts, points=0)
    p = (job.get("preference") or [1 / len(summary["objectives"])])[0]
    row = {"method": job["method"], "seed": job["seed"], "p": p, "held_out": len(prompts)}
    row["risky"] = sum(toy.topic_of(prompt) in toy.RISKY for prompt in prompts)
    gains = []
    for j, name in enumerate(NAMES):
        o = summary["objectives"][name]
        gains.append(o["gain"]["mean"] / (front[:, j].max() - o["before"]["mean"]))
        row |= {f"base_{name}": o["before"]["mean"], name: o["after"]["mean"], f"gain_{name}": o["gain"]["mean"]}
        row |= {f"error_{name}": o["after"]["standard_error"], f"normalised_{name}": gains[-1]}
    return row | {"worst_gain": min(gains), "kl": summary["kl"]["mean"]}


def byte_figures(metrics: list[dict]) -> dict:
    """Bytes per client and round, by part."""
    row = {}
    for way in ("upload", "download"):
        for part in ("payload", "header", "scalars"):
            row[f"{way}_{part}"] = float(np.mean([m[f"{way}/{part}"] for m in metrics]))
    return row


def round_figures(job: dict, metrics: list[dict], summary: dict) -> dict:
    """Means over the rounds of what is logged every round.

    The averaging residual is relative to ‖mean(ΔW)‖, stationarity is that of the second half of the rounds. Roughness
    is in deviations of the base policy's rewards; `net_roughness` is without what sampling the round's N responses
    alone would make, √max(roughness² − mean(s² / N), 0), s the deviation of the round's rewards.
    """
    later = metrics[1:] or metrics  # the first round has no movement, and starts from an adapter of zero
    mean = lambda name, rows=metrics: float(np.mean([m[name] for m in rows]))  # noqa: E731
    row = {f"lambda_{name}": mean(f"lambda/{name}") for name in NAMES}
    row |= {"disagreement": mean("lambda/disagreement"), "drift": mean("lambda/drift")}
    row |= {"movement": mean("lambda/movement", later), "dispersion": mean("adapter/dispersion")}
    residuals = [m["adapter/averaging_residual"] / m["adapter/norm"] for m in later]
    row |= {"averaging_residual": float(np.mean(residuals)), "cosine": mean("cosine")}
    row["stationarity"] = mean("stationarity", metrics[len(metrics) // 2 :])
    for name in NAMES:
        o = summary["objectives"][name]
        scale, N = o["calibration"]["scale"], job.get("clients", 8) * job.get("batch_size", 16)
        floor = float(np.mean([m[f"reward_sd/{name}"] ** 2 for m in metrics])) / N
        row[f"roughness_{name}"] = o["roughness"] / scale
        row[f"net_roughness_{name}"] = max(o["roughness"] ** 2 - floor, 0.0) ** 0.5 / scale
    return row | {"training_seconds": sum(m["seconds"] for m in metrics)}


def gram_figures(job: dict, grams: list[dict]) -> dict:
    """λ solved again on the Grams that the run kept: under every β, and from half-batches."""
    row, p = {}, job.get("preference")
    for beta in BETAS:
        solved = [resolve(g, beta, p) for g in grams]
        row[f"disagreement@{beta:g}"] = float(np.mean([disagreement for disagreement, _, _ in solved]))
        row[f"drift@{beta:g}"] = float(np.nanmean([drift for _, drift, _ in solved]))
        row[f"twin_disagreement@{beta:g}"] = float(np.mean([twin for _, _, twin in solved]))
    steps = torch.cat([g["steps"].flatten(0, 2) for g in grams])  # [n, M, M]
    traces = steps.diagonal(dim1=1, dim2=2).sum(1)
    gaps = (steps[:, 0, 0] - 2 * steps[:, 0, -1] + steps[:, -1, -1]) / traces  # ‖g₁ − g_M‖² / tr G
    row |= {"gap": float(gaps.mean()), "gap_max": float(gaps.max()), "gap_small": float((gaps <= 1e-6).double().mean())}
    quarter = max(len(grams) // 4, 1)
    for label, part in (("first", grams[:quarter]), ("last", grams[-quarter:])):
        row[f"trace_{label}"] = float(
            torch.cat([g["steps"].diagonal(dim1=-2, dim2=-1).sum(-1).flatten() for g in part]).mean()
        )
    noise = [noise_figures(g, job.get("beta", 0.01), p) for g in grams]
    return row | {k: float(np.nanmean([n[k] for n in noise])) for k in noise[0]}


def resolve(g: dict, beta: float, preference: list[float] | None) -> tuple[float, float, float]:
    """Disagreement (mean over steps), drift at θ_t, and disagreement in λ₁ − λ_M, with λ solved under `beta`."""
    steps = g["steps"][:, 0]  # [C, K, M, M]
    lam = torch.stack(
        [torch.stack([mgda.solve(mgda.normalise(G), beta, preference) for G in client]) for client in steps]
    )  # [C, K, M]
    disagreement = float(np.mean([diagnostics.disagreement(step) for step in lam.unbind(1)]))
    difference = lam[..., 0] - lam[..., -1]  # [C, K]
    twin = float((difference - difference.mean(0)).abs().mean())
    return disagreement, diagnostics.drift(g["start"].sum((1, 4)), lam[:, 0], g["weights"]), twin


def noise_figures(g: dict, beta: float, preference: list[float] | None = None) -> dict:
    """How far λ under FIRM's rule lies from what the other clients' gradients say: from one batch, from two halves, and
    for λ = p, which knows nothing.

    The reference is solved on the cross Gram of the others' mean gradient: C − 1 times the rows, none of them the
    client's own, and still noisy; on an iid split it is an estimate of the same λ. `half_cosine` is the cosine of two
    half-batch gradients of one objective on one client.
    """
    start, w = g["start"], g["weights"]  # [C, 2, M, C, 2, M]
    C = len(w)
    batch, cross, constant, cosines, values = [], [], [], [], []
    centre = mgda.preference_vector(preference, start.shape[2])
    for c in range(C):
        rest = w.clone()
        rest[c] = 0.0
        own = start[c, :, :, c]  # [2, M, 2, M]
        cosines.append((own[0, :, 1].diagonal() / (own[0, :, 0].diagonal() * own[1, :, 1].diagonal()).sqrt()).mean())
        if C == 1 or not rest.any():
            continue
        reference = solve_cross(diagnostics.federated_gram(start, rest), beta, preference)
        from_batch = mgda.solve(mgda.normalise(own.sum((0, 2))), beta, preference)
        from_halves = solve_cross(own, beta, preference)
        constant.append(float((centre - reference).norm()))
        batch.append(float((from_batch - reference).norm()))
        cross.append(float((from_halves - reference).norm()))
        values.append([float(from_batch[0]), float(from_halves[0]), float(reference[0])])
    batch_1, cross_1, reference_1 = np.mean(values, 0) if values else (np.nan,) * 3
    return {
        "half_cosine": float(torch.stack(cosines).mean()),
        "error_batch": float(np.mean(batch or [np.nan])),
        "error_cross": float(np.mean(cross or [np.nan])),
        "error_constant": float(np.mean(constant or [np.nan])),
        "lambda1_batch": batch_1,
        "lambda1_cross": cross_1,
        "lambda1_reference": reference_1,
    }


def solve_cross(halves: torch.Tensor, beta: float, preference: list[float] | None = None) -> torch.Tensor:
    """λ [M] from the inner products of two half-batches [2, M, 2, M], as mgda.cross_gram would have it."""
    both = halves[0, :, 1]
    return mgda.solve(mgda.normalise(mgda.positive_part(2.0 * (both + both.T))), beta, preference)


# ---- statistics and tables ------------------------------------------------------------------------------------


def column(rows: list[dict], figure: str) -> list[float]:
    """One figure of every row."""
    return [row[figure] for row in rows]


def of(rows: list[dict], **wanted) -> list[dict]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval (Student's t); NaN for a single value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def paired(a: list[dict], b: list[dict], figure: str) -> tuple[float, float, float]:
    """Mean of a − b paired by seed, half-width of its 95 % interval, p-value of the paired t-test."""
    theirs = {row["seed"]: row[figure] for row in b}
    d = np.array([row[figure] - theirs[row["seed"]] for row in a])
    if len(d) < 2 or np.ptp(d) == 0.0:
        return float(d.mean()), float("nan"), float("nan")  # nothing to test
    return *interval(d), float(stats.ttest_1samp(d, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; a NaN stays NaN, and still counts as a test."""
    order, adjusted, running = np.argsort(p_values), [float("nan")] * len(p_values), 0.0
    for step, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = running if p_values[i] == p_values[i] else float("nan")
    return adjusted


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(stats.spearmanr(x, y).statistic)


def front_of(row: dict) -> np.ndarray:
    """The exact front of this row's held-out prompts: only the share of risky ones matters to it."""
    risky, benign = (next(t for t in toy.TOPICS if (t in toy.RISKY) == wanted) for wanted in (True, False))
    return toy.pareto_front([risky] * int(row["risky"]) + [benign] * int(row["held_out"] - row["risky"]))


def sweep_volume(rows: list[dict]) -> float:
    """Normalised hypervolume of one seed's sweep."""
    points = np.array([[row[name] for name in NAMES] for row in rows])
    base = np.array([rows[0][f"base_{name}"] for name in NAMES])
    return sweep.normalised_hypervolume(points, base, front_of(rows[0]))


# ---- tables and pictures --------------------------------------------------------------------------------------

LABELS = {
    "normalised_helpful": "normalised gain in helpful",
    "normalised_harmless": "normalised gain in harmless",
    "net_roughness_helpful": "roughness of helpful, net of sampling",
    "net_roughness_harmless": "roughness of harmless, net of sampling",
    "gap_small": "share of steps with a gap ≤ 1e-6",
    "error_constant": "‖λ − reference‖, λ = p",

    "helpful": "helpful, held out (raw units)", "harmless": "harmless, held out (raw units)",
    "worst_gain": "worst normalised gain", "kl": "KL (nats per response)", "disagreement": "disagreement ‖λ_c − λ̄‖",
    "drift": "drift / step", "movement": "movement of λ̄ per round", "dispersion": "dispersion ‖θ_c − θ̄‖",
    "averaging_residual": "averaging residual / ‖mean(ΔW)‖", "same_disagreement": "disagreement / at β = 0, same Grams",
    "same_drift": "drift / at β = 0, same Grams", "twin_disagreement": "disagreement in λ₁ − λ₃",
    "same_twin_disagreement": "disagreement in λ₁ − λ₃ / at β = 0, same Grams", "upload_payload": "payload up (bytes)",
    "trace_first": "tr G, first quarter of the rounds", "trace_last": "tr G, last quarter",
    "half_cosine": "cosine of two half-batches", "error_batch": "‖λ − reference‖, one batch",
    "error_cross": "‖λ − reference‖, two halves", "lambda1_batch": "λ₁, one batch", "lambda1_cross": "λ₁, two halves",
    "lambda1_reference": "λ₁, reference", "roughness_helpful": "roughness of helpful",
    "roughness_harmless": "roughness of harmless", "stationarity": "stationarity ‖Jᵀλ‖²",
}  # fmt: skip


def number(value: float) -> str:
    """Three significant digits below 0.1, three decimals below 100, else an integer."""
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def cell(rows: list[dict], figure: str) -> str:
    """mean ± half the 95 % interval over the seeds."""
    mean, half = interval(column(rows, figure))
    return number(mean) if np.isnan(half) or half == 0 else f"{number(mean)} ± {number(half)}"


def against(groups: dict[str, list[dict]], ours: str, figure: str) -> dict[str, tuple[str, str]]:
    """For every group: the paired difference ours − it with its 95 % interval, and the p-value after Holm.

    Holm's family is the baselines: other settings of our own method (labels like `firm β=1`) are not tested.
    """
    tests = {label: paired(groups[ours], rows, figure) for label, rows in groups.items() if label != ours}
    family = [label for label in tests if label.split()[0] != ours.split()[0]]
    corrected = dict(zip(family, holm([tests[label][2] for label in family]), strict=True))
    return {ours: ("", "")} | {
        label: (f"{number(d)} ± {number(half)}", f"{corrected[label]:.2g}" if label in corrected else "")
        for label, (d, half, _) in tests.items()
    }


def show(lab: Lab, name: str, head: Sequence[str], lines: Sequence[Sequence], note: str = "") -> None:
    """Print a table in Markdown, and keep it as NAME.md."""
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))
    text += f"\n\n{note}\n" if note else "\n"
    (lab.results / f"{name}.md").write_text(text, "utf-8")
    print(f"\n{name}\n{text}")


def table(
    lab: Lab, name: str, keys: Sequence[str], groups: dict[tuple, list[dict]], figures: Sequence[str], note: str = ""
) -> None:
    """One line per group: what it is, then a cell per figure."""
    head = [*keys, *(LABELS.get(figure, figure) for figure in figures)]
    lines = [[*key, *(cell(rows, figure) for figure in figures)] for key, rows in groups.items()]
    seeds = len(next(iter(groups.values())))
    show(lab, name, head, lines, f"{seeds} seeds; ± is half a 95 % interval. {note}".strip())


def curves(
    lab: Lab, name: str, label: str, groups: dict[str, list[dict]], x: str, figures: Sequence[str], log_x: bool = False,
    ticks: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """One panel per figure, one line per group, mean and 95 % interval against the column x."""
    panels = []
    for figure in figures:
        lines = {}
        for group, rows in groups.items():
            xs = list(dict.fromkeys(column(rows, x)))
            cells = [interval(column(of(rows, **{x: value}), figure)) for value in xs]
            lines[group] = (range(len(xs)) if ticks else xs, *map(list, zip(*cells, strict=True)))
        panels.append(plots.Panel(label, "", LABELS.get(figure, figure), lines, log_x=log_x, ticks=ticks))
    plots.panels(panels, lab.results / f"{name}.png")


def bars(lab: Lab, name: str, groups: dict[str, list[dict]], figures: Sequence[str]) -> None:
    """One panel per figure, one point with its 95 % interval per group."""
    panels = []
    for figure in figures:
        cells = [interval(column(rows, figure)) for rows in groups.values()]
        lines = {
            label: ([i], [mean], [half]) for i, (label, (mean, half)) in enumerate(zip(groups, cells, strict=True))
        }
        panels.append(plots.Panel("", "", LABELS.get(figure, figure), lines, ticks=list(groups)))
    plots.panels(panels, lab.results / f"{name}.png", legend=False)
