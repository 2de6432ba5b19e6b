"""A run is killed at random moments, or spread over processes, and must come to the same end; and must not grow. [ours]

SIGKILL cannot be caught: what is on the disk at that moment is all there is. Moments are drawn evenly from the first
second to the end of an undisturbed run, imports and the first evaluation included. Where config.json is there, the run
goes on by --resume, else its own command is given again.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import fedavg
import run
from app.files import owned
from app.report import clustered, plus_minus
from app.session import Session
from clients import Client, Contribution
from evidence.lab import BASE, Lab
from evidence.rules import seeds_of
from evidence.statistics import show
from firm import Federation
from ppo import Batch
from settings import Config

SHORT = ["--rounds", "6", "--held_out", "32", "--eval_samples", "2", "--show", "0", "--threads", "1"]


def what_came_of_it(out: Path) -> tuple[bytes, list[dict]]:
    """The adapter, and the lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    figures = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), figures


def program(*arguments: str | Path, processes: int = 1) -> subprocess.Popen:
    """`python run.py` with these arguments, or `torchrun`, silent."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *launcher, run.__file__, *map(str, arguments)], **quiet)


def faults(lab: Lab) -> None:
    """SIGKILL at 20 random moments, and what the resumed run has in common with the undisturbed one."""
    kills, rng, lines = 2 if lab.quick else 20, np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as root:
        started, whole = time.perf_counter(), Path(root, "whole")
        assert program(*SHORT, "--out", whole).wait() == 0
        seconds = time.perf_counter() - started
        adapter, figures = what_came_of_it(whole)
        for number, moment in enumerate(sorted(rng.uniform(1.0, seconds, kills))):
            out = Path(root, f"killed{number}")
            killed = program(*SHORT, "--out", out)
            time.sleep(moment)
            killed.kill()
            killed.wait()
            begun, metrics = (out / "config.json").exists(), out / "metrics.jsonl"
            there = "started" if begun else "nothing"
            if metrics.exists():
                there = f"{len(metrics.read_text('utf-8').splitlines())} rounds"
            if (out / "summary.json").exists():
                there = "finished"
            status = program(*(["--resume", out] if begun else [*SHORT, "--out", out])).wait()
            again, after = what_came_of_it(out) if status == 0 else (b"", [])
            lines.append([f"{moment:.1f}", there, status, "yes" * (again == adapter), "yes" * (after == figures)])
    equal = sum(line[3:] == ["yes", "yes"] for line in lines)
    note = f"{equal} of {kills} equal the undisturbed run, which took {seconds:.1f} s on {os.cpu_count()} cores."
    head = ["killed after (s)", "on the disk then", "status of the resumed run", "same adapter", "same metrics"]
    show(lab.results, "faults", head, lines, note)


def survivors(lab: Lab) -> None:
    """Three clients in ten vanish from every round and client 0 has NaN: beside it, rounds of the survivors alone."""
    lines, rounds = [], 2 if lab.quick else 16
    for seed in lab.some(seeds_of(5)):
        settings = {"seed": seed, "client_dropout": 0.3, "rounds": rounds, "diagnostics": False}
        session = Session(Config.from_flat(BASE | settings), progress=False)
        before, federation, alone = session.evaluate("base"), session.federation, session.federate(session.config)
        federation.calibrate()
        alone.calibration = federation.calibration

        def contribution(client: Client, batch: Batch, *others, federation: Federation = federation) -> Contribution:
            if client.index == 0:
                batch = replace(batch, scores=batch.scores * math.nan)
            return Federation.contribution(federation, client, batch, *others)

        federation.contribution = contribution
        equal, vanished, rejected = 0, 0, 0
        for _ in range(rounds):
            record = federation.round()
            here = [client.index for client in record.cohort]
            with patch.object(fedavg, "staying", lambda *_, here=here: here):
                alone.round()
            equal += torch.equal(federation.theta, alone.theta)
            vanished, rejected = vanished + record.dropped, rejected + len(record.faults)
        session.policy.adapter.assign(federation.theta)
        gains = session.evaluate("trained").scores - before.scores
        cells = [plus_minus(clustered(gains[..., j])) for j in range(len(session.names))]
        lines.append([seed, vanished, rejected, f"{equal} of {rounds}", *cells])
    head = ["seed", "uploads that vanished", "uploads with NaN", "rounds equal, bit for bit", "helpful", "harmless"]
    note = "The toy world at the settings of tiny; held-out gain over the base model ± its standard error."
    show(lab.results, "survivors", head, lines, note)


def processes(lab: Lab) -> None:
    """A run by 1, 2 and 3 processes: what they have in common, and how much faster two are than one, in turn."""
    repeats, found = 1 if lab.quick else 5, {1: [], 2: [], 3: []}
    arguments = [*SHORT, "--rounds", "2" if lab.quick else "16", "--profile"]
    with tempfile.TemporaryDirectory() as root:
        for number, count in enumerate([1, 2] * repeats + [3]):
            out = Path(root, str(number))
            assert program(*arguments, "--out", out, processes=count).wait() == 0
            summary = json.loads((out / "summary.json").read_text("utf-8"))
            adapter, lines = what_came_of_it(out)
            seconds = summary["profile"]["seconds"]
            seconds["whole round"] = sum(seconds.values())
            for line in lines:
                del line["logp_gap"]  # how far sampling rounds otherwise, as batches do
            found[count].append((adapter, lines, {name: s / len(lines) for name, s in seconds.items()}))
    alone = found[1][0]
    lines = [
        [count, len(runs), "yes" * all(each[0] == alone[0] for each in runs),
         "yes" * all(repr(each[1]) == repr(alone[1]) for each in runs)]
        for count, runs in found.items()
    ]  # fmt: skip
    head = ["processes", "runs", "adapter, bit for bit", "metrics but for logp_gap and seconds"]
    show(lab.results, "processes", head, lines, "Each compared with the first run of one process.")
    lines = []
    for name in ("sample", "update", "whole round"):
        one, two = (np.array([each[2][name] for each in found[count]]) for count in (1, 2))
        ratios = one / two
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        lines.append([name, f"{np.median(one):.3f}", f"{np.median(two):.3f}", spread])
    head = ["of a round", "1 process (s)", "2 processes (s)", "times faster: median (least to most)"]
    note = f"{repeats} runs of each, in turn, a thread a process, {os.cpu_count()} cores; the first process's clock."
    show(lab.results, "processes_speed", head, lines, note)


def soak(lab: Lab) -> None:
    """Time per round and memory in every fifth of a run of 500 rounds, checkpoints and metrics.jsonl included."""
    fifth, lines = 2 if lab.quick else 100, []
    with tempfile.TemporaryDirectory() as root, owned(Path(root)) as out:
        settings = {"held_out": 16, "eval_samples": 1, "rounds": fifth, "diagnostics": False}
        session = Session(Config.from_flat(BASE | settings), progress=False)
        before = run.begin(session, out)
        for end in range(fifth, 5 * fifth + 1, fifth):
            session.config.firm.rounds = end
            seconds = [line["seconds"] for line in run.do_rounds(session, before, out, "")[0][-fifth:]]
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            size = (out / "checkpoint" / "state.safetensors").stat().st_size
            lines.append([f"{end - fifth + 1} to {end}", f"{np.median(seconds):.3f}", f"{memory:.0f}", f"{size:,}"])
    head = ["rounds", "median seconds of a round", "memory of the process at its end (MiB)", "checkpoint (bytes)"]
    show(lab.results, "soak", head, lines, "The toy world at the settings of tiny, one process, one thread.")
