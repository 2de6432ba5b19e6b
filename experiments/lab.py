"""Experiments as data, and how they are conducted: runs, rows of their figures, a page of tables. [ours]

A job is a dict of settings. A worker process of one thread calls `measure(job, directory)`, which trains and measures
it in an empty directory and returns its rows. They go to results/NAME.csv as soon as the job ends, and a job whose rows
are there is not run: a stopped experiment goes on. Rows are found by settings and `UPDATE`, and name their commit.
"""

import csv
import io
import json
import multiprocessing
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from app.files import write_text
from experiments import tables
from experiments.tables import Groups, Row

UPDATE = 2  # raise it with every change that alters more than the rounding of a run of equal settings
COMMON = {"lr": 3e-3, "server_lr": 2.0}  # with the middle of KAPPAS the best of results/tuning.md, over 7 methods
TUNING_SEEDS = [{"seed": seed} for seed in (101, 102)]
KAPPAS = (0.001, 0.003, 0.03)  # KL coefficients, so that gains compare at equal KL


@dataclass(frozen=True)
class Experiment:
    """Variants that are run on the same repeats, and what is shown of their rows."""

    measure: Callable[[dict[str, Any], Path], list[Row]]
    variants: dict[str, dict[str, Any]]  # label -> settings; one of None leaves out that of the repeat
    repeats: Sequence[dict[str, Any]]
    figures: Sequence[str]  # columns of the table of means
    families: dict[str, Sequence[tuple[str, str]]] = field(default_factory=dict)  # title -> differences a − b, by label
    compared: Sequence[str] = ()  # figures whose differences are tested
    derive: Callable[[Groups], Groups] = lambda groups: groups  # rows of the runs -> rows of the tables
    drawn: Sequence[str] = ()  # x and one or more y of a picture
    more: Callable[[Groups, Path], str] | None = None  # a further table from the runs' rows, and a picture: PATH.png
    note: str = ""

    def miniature(self) -> "Experiment":
        """The same with short runs: the first and the last variant, one seed."""
        small, (one, *_, other) = {"rounds": 3, "held_out": 32, "eval_samples": 2}, [*self.variants] * 2
        some = {label: self.variants[label] | small for label in (one, other)}
        first = [repeat | {"seed": 0} for repeat in self.repeats if repeat["seed"] == self.repeats[0]["seed"]]
        return replace(self, variants=some, repeats=first[:2])


def seeds(n: int, first: int = 40) -> list[dict[str, int]]:
    """The n seeds that are reported. Designs were chosen on earlier seeds, rates on TUNING_SEEDS."""
    return [{"seed": seed} for seed in range(first, first + n)]


def at_kappas(n: int, kappas: Sequence[float] = KAPPAS, first: int = 40) -> list[dict[str, Any]]:
    """The n seeds that are reported, each at several KL coefficients."""
    return [seed | {"kl_coef": kappa} for seed in seeds(n, first) for kappa in kappas]


def by_rate(variants: dict[str, dict], rates: Sequence[float] = (1.5e-3, 3e-3, 6e-3)) -> dict[str, dict]:
    """Every variant at each of these rates."""
    return {f"{label}, rate {lr:g}": v | {"lr": lr} for label, v in variants.items() for lr in rates}


def settings_of(label: str) -> dict[str, Any]:
    """What a label names: `firm β=10 groups` is FIRM at β = 10 with groups of responses in the critic's place."""
    method, *changes = label.split()
    settings = {"method": method}
    for change in changes:
        settings |= {"beta": float(change[2:])} if change.startswith("β=") else {"advantages": change.removesuffix("s")}
    return settings


def conduct(name: str, e: Experiment, results: Path, workers: int = 1) -> None:
    """Run what is missing; then write NAME.md, and the pictures if there are any."""
    jobs = {
        label: [{k: v for k, v in (repeat | settings).items() if v is not None} for repeat in e.repeats]
        for label, settings in e.variants.items()
    }
    whole_seeds = [job for of_repeat in zip(*jobs.values(), strict=True) for job in of_repeat]
    rows = rows_of(results / f"{name}.csv", whole_seeds, e.measure, workers)  # unfinished, it is a smaller experiment
    keys = {label: dict.fromkeys(map(key, some)) for label, some in jobs.items()}  # equal jobs count once
    groups = {label: [row for text in some for row in rows[text]] for label, some in keys.items()}
    shown = e.derive(groups)
    apart = tables.by_kappa(shown)
    page = [tables.means(apart, e.figures)]
    if e.drawn:
        tables.picture(apart, e.drawn[0], e.drawn[1:], results / f"{name}.png")
    for title, pairs in e.families.items():
        present = [pair for pair in pairs if shown.keys() >= set(pair)]
        page += [f"{title}:", tables.differences(shown, e.compared, present)] if present else []
    page += [e.more(groups, results / name)] if e.more else []
    about = f"{len({r['seed'] for r in e.repeats})} seeds; ± is half a 95 % interval over them."
    page.append(" ".join([e.note, about, tables.NOTE if e.families else ""]).strip())
    text = "\n\n".join(page) + "\n"
    write_text(results / f"{name}.md", text)
    print(f"\n{name}\n\n{text}")


def rows_of(path: Path, jobs: Sequence[dict], measure: Callable, workers: int) -> dict[str, list[Row]]:
    """The rows of a file by the keys of their jobs, after the missing jobs have run. Stops at the first that fails."""
    present, version = read_rows(path), commit()
    missing = {key(job): job for job in jobs if key(job) not in present}
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    with ProcessPoolExecutor(workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        futures = {pool.submit(run_job, measure, job): text for text, job in missing.items()}
        try:
            for future in tqdm(as_completed(futures), path.stem, total=len(missing), unit="run"):
                append_rows(path, [{"settings": futures[future], "commit": version} | r for r in future.result()])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits for the jobs under way, not for those in the queue
            raise
    return read_rows(path)


def run_job(measure: Callable, job: dict) -> list[Row]:
    """The rows of one job. Its directory is gone afterwards."""
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="experiment-", dir="runs") as directory:
        return measure(job, Path(directory))


def key(job: dict) -> str:
    """A job's settings and the version of the update, as text."""
    return json.dumps(job | {"update": UPDATE}, sort_keys=True)


def commit() -> str:
    """The commit that is checked out, with a + if code has changed since; `unknown` outside of git."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    head = git(["git", "log", "-1", "--format=%h"]).stdout.strip() or "unknown"
    return head + "+" * bool(git(["git", "status", "--porcelain", "--", ":/*.py", ":/presets.toml"]).stdout)


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows at the end; the file is written whole or not at all. A figure that a row lacks is NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table, text = [*texts(path), *rows], io.StringIO()
    header = dict.fromkeys(name for row in table for name in row)
    writer = csv.DictWriter(text, header, restval="nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(path, text.getvalue())


def texts(path: Path) -> list[dict[str, str]]:
    """The rows of a file as they stand there."""
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.exists() else []


def read_rows(path: Path) -> dict[str, list[Row]]:
    """Rows by the key of their job: its settings, and figures as numbers."""
    rows: dict[str, list[Row]] = {}
    for row in texts(path):
        figures = {k: v if k in ("settings", "commit", "side") else float(v) for k, v in row.items()}
        rows.setdefault(row["settings"], []).append(figures | json.loads(row["settings"]))
    return rows
