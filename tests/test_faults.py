"""What goes wrong in a federation, on a disk, or in a terminal: who is left out, what is kept, how a run ends."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_run
import torch
from test_firm import broken_clients, fedcmoo, federation
from test_run import adapter_of, command, metrics_without_times, refused

import fedavg
import mgda
import run
from app.files import new_directory, owned
from baselines import FSMGDA
from fedmoa import FEDMOA
from firm import FIRM, Federation
from rollout import Policy

world, finished = test_run.world, test_run.finished  # the fixtures

# ---- clients -------------------------------------------------------------------------------------------------


def spoil(built, *indices) -> None:
    """From now on the rewards of these clients are NaN by the time that their gradients are taken."""
    real = built.prepare

    def prepare(cohort, responses):
        batches = real(cohort, responses)
        return [
            replace(batch, scores=batch.scores * torch.nan) if client.index in indices else batch
            for client, batch in zip(cohort, batches, strict=True)
        ]

    built.prepare = prepare


def home(client) -> dict:
    """What a client keeps to itself."""
    return {f"{i}.{n}": t.clone() for i, own in enumerate(client.trainings) for n, t in own.state().items()}


@pytest.mark.parametrize("method", [FIRM, FSMGDA, fedcmoo()], ids=lambda method: method.name)
@pytest.mark.parametrize("where", ["gradient", "upload"])
def test_a_client_that_is_not_finite_leaves_the_round_to_the_others_and_keeps_what_it_had(method, where):
    built = federation(method=method, optimizer="adam-keep", diagnostics=False)
    built.round()
    before, (first, last) = home(built.clients[1]), (home(built.clients[c]) for c in (0, 2))
    if where == "gradient":
        spoil(built, 1)
    with broken_clients(*([1] if where == "upload" else [])):
        line = built.round()
    assert [client.index for client in built.record.cohort] == [0, 2]
    assert line["rejected_clients"] == 1 and "not finite" in line["rejected"]["client1"]
    after = home(built.clients[1])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(first[name], t) for name, t in home(built.clients[0]).items())
    assert any(not torch.equal(last[name], t) for name, t in home(built.clients[2]).items())


def test_a_round_without_a_client_is_bit_for_bit_the_average_of_the_others():
    built = federation()
    spoil(built, 1)
    for _ in range(3):
        theta = built.theta
        built.round()
        uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
        held = fedavg.prompts_held(built.record.cohort)
        assert held.tolist() == [4, 6]
        assert torch.equal(built.theta, theta + fedavg.average(uploads - theta, held))


def test_the_survivors_of_a_fault_do_what_they_would_without_the_client():
    alone, with_fault = federation(clients=3), federation(clients=3)
    spoil(with_fault, 2)
    with broken_clients(2):
        alone.round()
    with_fault.round()
    assert torch.equal(alone.theta, with_fault.theta) and alone.kl_coef == with_fault.kl_coef


def test_a_client_that_vanishes_leaves_the_round_to_the_others():
    built = federation(clients=3, client_dropout=0.5, server_lr=1.0)
    seen = []
    for _ in range(6):
        theta = built.theta
        line = built.round()
        uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
        held = fedavg.prompts_held(built.record.cohort)
        assert torch.equal(built.theta, theta + fedavg.average(uploads - theta, held))
        assert line["dropped_clients"] == 3 - len(uploads)
        seen.append(tuple(client.index for client in built.record.cohort))
    assert len(set(seen)) > 2


def test_without_dropout_nothing_changes():
    assert torch.equal(federation(client_dropout=0.0).theta, federation().theta)


def test_where_no_client_is_left_the_run_ends_with_what_was_not_finite_first():
    built = federation()
    spoil(built, 0, 1, 2)
    with pytest.raises(
        ValueError, match="no client's update can be used; client 0: its calibrated rewards are not finite"
    ):
        built.round()


def test_a_server_rate_that_throws_the_adapter_out_of_range_is_named():
    built = federation(server_lr=1e30, lr=1e20, optimizer="sgd", ppo={"epochs": 1})
    with pytest.raises(ValueError, match="server_lr: .* lower server_lr or lr"):
        built.round()
    assert torch.isfinite(built.theta).all()


def test_a_kl_that_is_not_finite_is_no_result(world, tmp_path, monkeypatch, capsys):
    real = Policy.expected_kl
    monkeypatch.setattr(Policy, "expected_kl", lambda self, *args: real(self, *args) * float("nan"))
    assert run.main(command(world, out=tmp_path / "run")) == 2
    assert "KL to the base model is not finite; lower lr or server_lr" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_fedmoa_forgets_nothing_of_a_client_that_failed(monkeypatch):
    monkeypatch.setattr("test_firm.score", lambda prompts, rollout, M: torch.rand(len(prompts), M).double())
    built = federation(method=FEDMOA, diagnostics=False)
    built.round()
    before = home(built.clients[1])
    spoil(built, 1)
    built.round()
    after = home(built.clients[1])
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_huge_preferences_are_shares_all_the_same():
    assert mgda.preference_vector([1e308, 1e308], 2).tolist() == [0.5, 0.5]


# ---- a run's directory ---------------------------------------------------------------------------------------


MINE = """
from neighbour import factor

def f(completions, **_):
    return [factor] * len(completions)
"""
HOLD = """
import sys, time
from pathlib import Path
from app.files import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A directory that another process owns, and the process."""
    (tmp_path / "run").mkdir()
    root = Path(run.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield tmp_path / "run", process
    process.kill()
    process.wait()


def test_a_directory_belongs_to_one_process_until_it_ends_however_it_ends(elsewhere):
    directory, process = elsewhere
    with pytest.raises(ValueError, match=f"out: another run is at work in {directory}"), owned(directory):
        pass
    process.kill()
    process.wait()
    with owned(directory):
        pass
    assert not list(directory.iterdir())


def test_a_new_run_does_not_move_in_with_one_that_has_written_nothing_yet(elsewhere):
    with (
        pytest.raises(ValueError, match="out: another run is at work"),
        new_directory(str(elsewhere[0]), "x"),
    ):
        pass
    assert elsewhere[0].is_dir()


def test_a_run_that_is_going_on_is_not_resumed_beside_itself(finished, capsys):
    with owned(finished):
        assert "another run is at work" in refused(capsys, ["--resume", str(finished)])


def flip(file, position) -> None:
    """One bit of a file, as a bad disk has it."""
    found = bytearray(file.read_bytes())
    found[position] ^= 1
    file.write_bytes(found)


@pytest.mark.parametrize("damage", ["a bit", "half of it", "all of it"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_it_leads_to_the_same_end(
    finished, tmp_path, damage, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint" / "state.safetensors"
    if damage == "a bit":
        flip(state, -5)
    else:
        state.write_bytes(state.read_bytes()[: len(state.read_bytes()) // 2 if damage == "half of it" else 0])
    assert run.main(["--resume", str(tmp_path / "run")]) == 0
    assert "is damaged; the run goes on from the checkpoint before it" in capsys.readouterr().out
    assert adapter_of(tmp_path / "run") == adapter_of(finished)
    assert repr(metrics_without_times(tmp_path / "run")) == repr(metrics_without_times(finished))


def test_two_damaged_checkpoints_are_refused_and_nothing_is_lost(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("state", "previous"):
        flip(tmp_path / "run" / "checkpoint" / f"{name}.safetensors", -5)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "is damaged (state.safetensors: its checksum is another; previous" in refused(
        capsys, ["--resume", str(tmp_path / "run")]
    )
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


LOST = {  # what happened to a run, and what is said of it
    "metrics.jsonl is gone": (lambda out: (out / "metrics.jsonl").unlink(), "metrics.jsonl cannot be used"),
    "metrics.jsonl is empty": (lambda out: (out / "metrics.jsonl").write_text(""), "it has 0 of 2 rounds"),
    "a line of it is damaged": (lambda out: flip(out / "metrics.jsonl", 0), "metrics.jsonl cannot be used"),
    "config.json is a list": (lambda out: (out / "config.json").write_text("[]"), "config.json holds no settings"),
    "config.json is cut": (lambda out: (out / "config.json").write_text('{"rou'), "config.json holds no settings"),
    "config.json is gone": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "eval_samples": (lambda out: edit(out / "config.json", eval_samples=4), "eval_samples is 4 in .* and was 2"),
    "temperature": (lambda out: edit(out / "config.json", temperature=0.5), "temperature is 0.5 in .* and was 1.0"),
    "lora_alpha": (lambda out: edit(out / "config.json", lora_alpha=1.0), "lora_alpha is 1.0 in .* and was None"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_run_does_not_go_on_where_something_of_it_was_lost_or_changed_and_loses_nothing_more(
    finished, tmp_path, capsys, case
):
    shutil.copytree(finished, tmp_path / "run")
    change, message = LOST[case]
    change(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert re.search(message, refused(capsys, ["--resume", str(tmp_path / "run")]))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_run_does_not_go_on_with_an_objective_that_was_edited_since(world, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("factor = 1.0\n")
    arguments = command(world, objectives=[f"py:{tmp_path}/mine.py:f", "rule:length"], out=tmp_path / "run", rounds=1)
    assert run.main(arguments) == 0
    (tmp_path / "neighbour.py").write_text("factor = 2.0\n")
    capsys.readouterr()
    assert "resume: objective f changed since the run began" in refused(capsys, ["--resume", str(tmp_path / "run")])


def test_a_run_without_a_checkpoint_yet_starts_anew(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "run" / "config.json")
    assert run.main(["--resume", str(tmp_path / "run")]) == 0
    assert adapter_of(tmp_path / "run") == adapter_of(finished)


# ---- writes --------------------------------------------------------------------------------------------------


def test_a_fault_at_any_write_leaves_a_run_that_goes_on_to_the_same_end(finished, world, tmp_path, monkeypatch, capsys):
    arguments, real, done = command(world), os.replace, 0
    for at in itertools.count():
        calls, out = [], tmp_path / f"run{at}"

        def failing(*paths, calls=calls, at=at):
            calls.append(paths)
            if len(calls) == at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[1]))
            return real(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            status = run.main([*arguments, "--out", str(out)])
        if status == 0:
            break
        done += 1
        assert status == 2 and "cannot be read or written (No space left on device)" in capsys.readouterr().err
        assert (
            run.main(["--resume", str(out)] if (out / "config.json").exists() else [*arguments, "--out", str(out)]) == 0
        )
        assert adapter_of(out) == adapter_of(finished)
        assert repr(metrics_without_times(out)) == repr(metrics_without_times(finished))
    assert done > 10


# ---- how a command ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_stops_a_run_is_told_how_to_go_on(finished, world, tmp_path, monkeypatch, capsys, number, status):
    real = Federation.round

    def stopped(federation):
        if federation.rounds_done == 1:
            os.kill(os.getpid(), number)
        return real(federation)

    monkeypatch.setattr(Federation, "round", stopped)
    assert run.main(command(world, out=tmp_path / "run")) == status
    monkeypatch.undo()
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "stopped" and f"--resume {tmp_path / 'run'} goes on" in printed.out
    assert run.main(["--resume", str(tmp_path / "run")]) == 0
    assert adapter_of(tmp_path / "run") == adapter_of(finished)


def test_a_killed_run_goes_on_to_the_same_end(finished, world, tmp_path):
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, run.__file__, *command(world, out=out)], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run.main(["--resume", str(out)]) == 0
    assert adapter_of(out) == adapter_of(finished)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc when the import has begun")
def test_ctrl_c_while_modules_are_imported_ends_the_program_without_a_traceback():
    process = subprocess.Popen([sys.executable, run.__file__, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():  # its import has begun
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGINT and not out and not err


def test_where_nobody_reads_a_run_stops_without_a_traceback_and_can_go_on(finished, world, tmp_path):
    script = f"{sys.executable} {run.__file__} {' '.join(command(world, out=tmp_path / 'r'))} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert run.main(["--resume", str(tmp_path / "r")]) == 0
    assert adapter_of(tmp_path / "r") == adapter_of(finished)


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "GPU memory (CUDA out of memory)"),
     (MemoryError("Unable to allocate 7 TiB"), "memory (Unable to allocate 7 TiB)")],
)  # fmt: skip
def test_out_of_memory_says_what_to_lower(world, tmp_path, monkeypatch, capsys, error, said):
    def full(federation):
        raise error

    monkeypatch.setattr(Federation, "round", full)
    assert run.main(command(world, out=tmp_path / "run")) == 2
    assert f"error: out of {said}; lower micro_batch_size" in capsys.readouterr().err


def test_an_error_stands_on_a_line_of_its_own_beside_a_progress_bar(world, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [float('nan')] * len(completions)\n")
    assert run.main(command(world, objectives=[f"py:{tmp_path}/mine.py:f"], out=tmp_path / "run")) == 2
    assert re.search(r"(^|\n|\r)run\.py: error: objective 'f' returned nan", capsys.readouterr().err)
