"""Many processes come to what one comes to, and end together."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import test_run
import torch
from conftest import make_model, make_tokenizer
from test_run import adapter_of, command, metrics_of, summary_of

import run
from app import metrics, ranks
from worlds import tiny_llama

world = test_run.world  # the fixture
ROOT = Path(run.__file__).parent

COMMANDS = {  # three clients, so that of three processes one has nothing to do in a round of two clients
    "firm": {"eval_every": 1, "client_objectives": ["0=even", "2=short"]},
    "two a round": {"clients_per_round": 2, "personal_rounds": 1},
    "fedcmoo": {"method": "fedcmoo", "rounds": 1},
    "fedmoa": {"method": "fedmoa", "advantages": "grpo"},
}
MANY = """
import json, os, socket, sys
from pathlib import Path
from matplotlib.figure import Figure
import app.plots, run
from app import metrics
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # once, not in every process

Figure.savefig = lambda figure, file, **_: file.write(b"")
metrics.EVAL_BATCH = 4
for size, jobs in json.load(sys.stdin).items():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = 1 if size == "2" else int(size)  # processes of a machine: two machines, or one
    start = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for rank in range(int(size)):
        if os.fork() == 0:
            start |= {"RANK": rank, "LOCAL_RANK": rank % here, "TORCHELASTIC_RUN_ID": "x"}
            os.environ |= {name: str(value) for name, value in start.items()}
            sys.exit(any([run.main(arguments) for arguments in jobs]))
    assert not any(os.wait()[1] for _ in range(int(size)))
"""


@pytest.fixture(scope="module")
def runs(world):
    """The folder that holds the runs by one process, by two, and by three."""
    tiny = {"eval_samples": 1, "epochs": 1}
    jobs = {
        size: [command(world, out=world / size / name, **tiny, **flags) for name, flags in COMMANDS.items()]
        for size in "123"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "EVAL_BATCH", 4)  # so that evaluation is shared out too
        assert not any([run.main(arguments) for arguments in jobs.pop("1")])
    done = subprocess.run(
        [sys.executable, "-c", MANY], cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapter/ (PEFT format)") == 2 * len(COMMANDS)  # only the first of them is heard
    return world


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("size", ["2", "3"])
def test_processes_together_come_to_the_last_bit_of_what_one_comes_to(runs, size, name):
    one, many = runs / "1" / name, runs / size / name
    assert summary_of(many)["processes"] == int(size)
    files = sorted(path.relative_to(one) for path in one.rglob("adapter_model.safetensors"))
    assert len(files) == {"firm": 3, "two a round": 4}.get(name, 1)
    assert all((one / file).read_bytes() == (many / file).read_bytes() for file in files)
    for expected, line in zip(metrics_of(one), metrics_of(many), strict=True):
        assert line == expected
    assert summary_of(many)["objectives"] == summary_of(one)["objectives"]


KILLED = """
import os, signal
calls = 0

def f(completions, **_):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # in the third round: the first process has surely kept one
    return [len(text) / 10 for text in completions]
"""


def test_a_process_that_dies_ends_the_others_and_one_goes_on_to_the_same_end(world, tmp_path):
    (tmp_path / "reward.py").write_text(KILLED)
    flags = {"objectives": [f"py:{tmp_path}/reward.py:f", "rule:length"], "rounds": 3}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", run.__file__]
    killed = subprocess.run(
        [*launcher, *command(world, out=tmp_path / "run", **flags)], capture_output=True, timeout=300
    )
    assert killed.returncode != 0 and not (tmp_path / "run" / "summary.json").exists()
    assert 0 < len(metrics_of(tmp_path / "run")) < 3
    assert run.main(["--resume", str(tmp_path / "run")]) == 0
    assert run.main(command(world, out=tmp_path / "alone", **flags)) == 0
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "alone")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: 2 processes for 1 GPUs"):
        ranks.take_gpu()


def test_every_machine_fills_a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)  # the first process of another machine
    entry = tiny_llama.saved({"model": lambda: (make_model("llama"), make_tokenizer())}, __file__, {}, tmp_path)
    assert (entry / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "value", [{3: [None, 1.5, "x", (True, {})], 1: torch.arange(3)}, math.inf, [torch.ones(2)[:1]]]
)
def test_what_travels_comes_back_as_it_was(value):
    assert str(ranks.unpacked(ranks.packed(value))) == str(value)
