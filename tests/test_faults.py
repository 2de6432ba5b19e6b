"""What goes wrong in a run: who is left out, what survives a kill, and what a resumed run refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_run
import torch
from test_run import adapter_of, command, contents, metrics_of, refused, summary_of

import fedavg
import run
from app import options
from app.session import Session
from firm import Federation

world, finished = test_run.world, test_run.finished  # the fixtures


def federation(world, **changes) -> Federation:
    """A calibrated federation of three clients."""
    built = Session(options.parse(command(world, **changes))[0], progress=False).federation
    built.calibrate()
    return built


def spoil(monkeypatch, *clients) -> None:
    """From now on the calibrated rewards of these clients are NaN."""
    real = Federation.batches

    def batches(self, cohort):
        for client, batch, raw in real(self, cohort):
            batch.scores = batch.scores * (torch.nan if client.index in clients else 1.0)
            yield client, batch, raw

    monkeypatch.setattr(Federation, "batches", batches)


@pytest.mark.parametrize("method", ["firm", "fedcmoo"])
def test_a_client_that_is_not_finite_is_left_out_named_and_keeps_what_it_had(world, monkeypatch, method):
    built = federation(world, method=method)
    built.round()
    before = [dict(client.state[0]) for client in built.clients]
    spoil(monkeypatch, 1)
    theta, record = built.theta, built.round()
    assert list(record.arrived) == [0, 2] and "not finite" in record.faults[1]
    uploads = torch.stack([part.upload.tensors["theta"][0] for part in record.arrived.values()])
    prompts = torch.tensor([float(len(built.clients[c].prompts)) for c in (0, 2)])
    assert torch.equal(built.theta, theta + fedavg.average(uploads - theta, prompts))
    same = [
        all(torch.equal(built.clients[c].state[0][name], old[name]) for name in old) for c, old in enumerate(before)
    ]
    assert same == [False, True, False]


def test_the_log_names_who_was_left_out_and_a_run_without_clients_ends(world, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 1)
    assert run.main(command(world, out=tmp_path / "two", rounds=1)) == 0
    (line,) = metrics_of(tmp_path / "two")
    assert line["rejected_clients"] == 1 and "not finite" in line["rejected"]["client1"] and "kl/client1" not in line
    assert "warning: round 0: client 1 is left out" in capsys.readouterr().err
    spoil(monkeypatch, 0, 2)
    assert "no client's update can be used; client 0" in refused(capsys, command(world, out=tmp_path / "none"))


def test_sampled_clients_may_vanish_and_the_bill_is_of_those_that_did_not(world, tmp_path):
    flags = {"clients": 4, "clients_per_round": 3, "client_dropout": 0.5, "rounds": 8, "epochs": 1, "eval_samples": 1}
    assert run.main(command(world, out=tmp_path, **flags)) == 0
    lines = metrics_of(tmp_path)
    there = [{c for c in range(4) if f"kl/client{c}" in line} for line in lines]
    assert [3 - len(clients) for clients in there] == [line["dropped_clients"] for line in lines]
    assert {len(clients) for clients in there} == {1, 2, 3} and set.union(*there) == {0, 1, 2, 3}
    bill = sum(len(clients) * line["upload_bytes"] for clients, line in zip(there, lines, strict=True))
    assert summary_of(tmp_path)["upload_bytes_total"] == bill


KILL = """
import json, os, signal, sys
import app.plots, run
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # once, not in every child

def rename(temporary, path, real=os.replace, seen=[]):
    seen.append(str(path).endswith(name))
    now = seen[-1] and sum(seen) == int(number)
    if now and when == "in":
        os.truncate(temporary, os.path.getsize(temporary) // 2)
    else:
        real(temporary, path)
    if now:
        os.kill(os.getpid(), signal.SIGKILL)

for moment, arguments in json.load(sys.stdin):
    when, name, number = moment.split()
    if os.fork() == 0:
        os.replace = rename
        os._exit(run.main(arguments))
    assert os.wait()[1] == signal.SIGKILL
"""
MOMENTS = [  # half-way through writing a file for the n-th time, or after it: between rounds
    "in checkpoint 1", "after checkpoint 2", "in checkpoint 3", "in summary.json 1",
]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_end(finished, world):
    jobs = json.dumps([(moment, command(world, out=world / moment)) for moment in MOMENTS])
    subprocess.run([sys.executable, "-c", KILL], cwd=Path(run.__file__).parent, input=jobs, text=True, check=True)
    for moment in MOMENTS:
        assert not (world / moment / "summary.json").exists()
        assert run.main(["--resume", str(world / moment)]) == 0
        assert adapter_of(world / moment) == adapter_of(finished), moment
        assert metrics_of(world / moment) == metrics_of(finished), moment
        assert summary_of(world / moment)["objectives"] == summary_of(finished)["objectives"], moment


def edit(old, new):
    return lambda file: file.write_text(file.read_text().replace(old, new))


def flip_the_last_bit(file):
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))


CHANGES = {  # what happened to a file of the run or of its inputs, and what the refusal says
    "a setting": ("run/config.json", edit('"temperature": 1.0', '"temperature": 0.5'), "temperature changed"),
    "the prompts": ("prompts.jsonl", edit("w3 ", "w4 w5 "), "prompts changed"),
    "the rewards' code": ("objectives.py", edit("/ 8", "/ 9"), "objective (even|short) changed"),
    "the base model": ("model/config.json", edit("\n}", "\n\n}"), "the base model changed"),
    "a bit of a checkpoint": ("run/checkpoint", flip_the_last_bit, "is damaged"),
    "no checkpoint": ("run/checkpoint", os.remove, "is gone"),
    "a link": ("run/notes", lambda file: file.symlink_to(file.parent / "config.json"), "notes is a link"),
    "half a checkpoint": ("run/checkpoint", lambda file: os.truncate(file, 9999), "is damaged"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_does_not_go_on_from_something_else_and_loses_nothing(world, tmp_path, capsys, case):
    name, change, message = CHANGES[case]
    shutil.copytree(world, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("finished", "* *", "run"))
    assert run.main(command(tmp_path, out=tmp_path / "run", rounds=1, eval_samples=1)) == 0
    change(tmp_path / name)
    before = contents(tmp_path / "run")
    assert re.search(message, refused(capsys, ["--resume", tmp_path / "run"]))
    assert contents(tmp_path / "run") == before
