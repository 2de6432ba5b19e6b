"""Many processes: two of them must come to what one comes to, and end together (three: `evidence/faults.py`)."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_run
import torch
from test_faults import home, spoil
from test_firm import federation
from test_run import adapter_of, command, metrics_without_times

import fedmoa
import run
from app import ranks
from app.files import new_directory
from app.program import run_to_the_end
from baselines import ADAPTIVE, FEDCMOO, FSMGDA
from fedmoa import FEDMOA, FedMOAConfig
from firm import FIRM

world = test_run.world  # the fixture

CASES = {
    "firm": {"method": FIRM},
    "moments": {"method": FIRM, "optimizer": "adam-keep", "clients_per_round": 2, "rounds": 4},
    "unequal": {"method": FIRM, "held": [[0], [0, 1], [1]]},
    "one client": {"method": FIRM, "clients": 1},
    "fsmgda": {"method": FSMGDA},
    "fedcmoo": {"method": FEDCMOO},
    "adaptive": {"method": ADAPTIVE, "diagnostics": False},
    "fedmoa": {"method": FEDMOA, "rounds": 3},
    "fault": {"method": FIRM, "diagnostics": False, "optimizer": "adam-keep"},
    "fault, fedcmoo": {"method": FEDCMOO, "diagnostics": False},
}


def train(case: str) -> dict:
    """What comes of a small federation after two rounds or more, here."""
    built = federation(**CASES[case])
    if "fault" in case:
        spoil(built, 1)
    built.calibrate()
    lines = [built.round() for _ in range(built.config.firm.rounds)]
    found = {"theta": built.theta, "kl_coef": built.kl_coef, "calibration": built.calibration.to_dict()}
    found["lines"] = [{k: v for k, v in line.items() if k not in ("seconds", "logp_gap")} for line in lines]
    found["home"] = [home(client) for client in built.clients]
    found["server"] = built.server_state
    if case == "fedmoa":
        own = {
            c.index: fedmoa.personalise(built, c, FedMOAConfig(personal_rounds=1))
            for c in ranks.of_this_process(built.clients)
        }
        found["own"] = ranks.merged(own)
    return found


def fails(rank: int) -> int:
    """A command that fails on this rank alone, while the others wait for it."""

    def work() -> None:
        if ranks.size() > 1 and torch.distributed.get_rank() == rank:
            raise OSError(28, "No space left on device", "here")
        ranks.merged({})

    return run_to_the_end("this.py", work)


def member(rank: int, size: int, port: int, folder: Path) -> None:
    """One of the processes: all cases, then an end by another's error."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "x"}
    os.environ |= {
        name: str(value) for name, value in (own | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}).items()
    }
    torch.set_num_threads(1)
    ranks.join()
    found = {case: train(case) for case in CASES}
    with open(folder / f"{rank}.err", "w") as sys.stderr:
        found["status"] = fails(size - 1)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=[2])
def together(request, tmp_path_factory) -> tuple[list[dict], list[str]]:
    """What every process found, and what it printed as its error."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(member, (size, port, folder), nprocs=size)
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return found, [(folder / f"{rank}.err").read_text() for rank in range(size)]


def same(one, other) -> bool:
    """Whether two results are the same to the last bit; NaN is NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@pytest.mark.parametrize("case", CASES)
def test_processes_together_come_to_the_last_bit_of_what_one_comes_to(together, case):
    alone = train(case)
    for found in together[0]:
        for what, value in alone.items():
            assert same(found[case][what], value), what


def test_an_error_of_one_process_ends_all_and_the_first_says_it_once(together):
    found, errors = together
    assert [each["status"] for each in found] == [2] * len(found)
    assert errors[0] == "this.py: error: here cannot be read or written (No space left on device)\n"
    assert set(errors[1:]) == {""}


def test_more_processes_than_gpus_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: 2 processes for 1 GPUs; start one for each"):
        ranks.take_gpu()


def test_variables_of_another_launcher_do_not_make_several_processes(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ranks.join()
    assert ranks.size() == 1 and ranks.first()


@pytest.mark.parametrize(("error", "kept"), [(ranks.Ended, True), (ranks.Elsewhere, False)])
def test_a_run_is_kept_where_another_process_has_ended_and_not_where_it_found_bad_input(tmp_path, error, kept):
    with contextlib.suppress(error), new_directory(str(tmp_path / "run"), "run") as out:
        (out / "config.json").write_text("{}")
        raise error("told")
    assert (tmp_path / "run" / "config.json").exists() == kept


KILL = """
import os, signal
from pathlib import Path

def f(completions, **_):
    global calls
    calls = globals().get("calls", 0) + 1
    here = Path(__file__).with_name("killed")
    if os.environ.get("RANK") == "1" and calls == {calls} and not here.exists():
        here.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(text) / 10 for text in completions]
"""


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node 2 run.py` with these arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", run.__file__]
    return subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_processes_end_together_and_one_goes_on_to_what_it_would_have_come_to_alone(world, tmp_path):
    (tmp_path / "mine.py").write_text(KILL.replace("{calls}", "4"))  # in round 3, when the first has a checkpoint
    out, alone = tmp_path / "run", tmp_path / "alone"
    arguments = command(world, rounds=3, objectives=[f"py:{tmp_path}/mine.py:f", "rule:length"], out=out)
    killed = torchrun(*arguments)
    assert killed.returncode != 0 and (tmp_path / "killed").exists()
    assert "run.py: error: another process of this run has ended" in killed.stderr or "stopped" in killed.stderr
    (out / "samples.jsonl").mkdir()  # the first process's last writes fail, while the other has nothing left to do
    failed = torchrun("--resume", out)
    assert failed.returncode != 0 and "goes on after round" in failed.stdout
    assert failed.stderr.count("samples.jsonl cannot be read or written (Is a directory)") == 1
    (out / "samples.jsonl").rmdir()
    assert run.main(["--resume", str(out)]) == 0
    assert run.main([*arguments[:-1], str(alone)]) == 0
    assert adapter_of(out) == adapter_of(alone)
    found, expected = (
        [{k: v for k, v in line.items() if k != "logp_gap"} for line in metrics_without_times(each)]
        for each in (out, alone)
    )
    assert repr(found) == repr(expected)
