"""The bench: rows of the agreed form, and a list on disk that keeps what was measured elsewhere."""

import json

import numpy as np
import pytest
import torch

from evidence import bench
from evidence.bench import SHAPES, Bench, keep
from worlds import tiny_llama, toy


def row(name, device="cpu", value=1.0):
    return {"name": name, "device": device, "dtype": "float32", "value": value, "unit": "s", "ratio": None, "pairs": 0}


def test_new_rows_replace_their_own_and_leave_another_devices(tmp_path):
    out = tmp_path / "bench.json"
    keep([row("x"), row("y"), row("x", "cuda", 3.0)], out)
    keep([row("x", value=2.0)], out)
    kept = {(r["name"], r["device"]): r["value"] for r in json.loads(out.read_text())}
    assert kept == {("x", "cpu"): 2.0, ("y", "cpu"): 1.0, ("x", "cuda"): 3.0}


def test_the_ratio_is_their_time_over_ours_and_its_interval_holds_it(monkeypatch):
    measured = Bench(SHAPES["tiny"], "cpu", "float32", pairs=40)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(measured, "clock", lambda work: work() * rng.uniform(0.9, 1.1))
    measured.compare("twice", lambda: 1.0, lambda: 2.0)
    measured.compare("half", lambda: 1.0, lambda: 2.0, inverse=True)
    for result, expected in zip(measured.rows, (2.0, 0.5), strict=True):
        low, high = result["interval"]
        assert low <= result["ratio"] <= high and low < expected < high and result["pairs"] == 40


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ("tiny", 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)),
        ("stories260k", 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172 + 2 * 64)),  # 4 heads of 8 for keys and values
    ],
)
def test_a_shape_is_that_of_its_model(shape, layers):
    model = Bench(SHAPES[shape], "cpu", "float32", pairs=2).model()
    assert sum(p.numel() for p in model.model.layers.parameters()) == layers
    assert model.lm_head.weight.shape == (SHAPES[shape].vocabulary, 64)


def test_the_tiny_shape_is_the_embedded_worlds():
    world = tiny_llama.make_model(tiny_llama.make_tokenizer(toy.vocabulary()))
    model = Bench(SHAPES["tiny"], "cpu", "float32", pairs=2).model()
    assert [p.shape for p in model.model.parameters()] == [p.shape for p in world.model.parameters()]


def test_the_benchs_responses_never_end_early():
    measured = Bench(SHAPES["tiny"], "cpu", "float32", pairs=2)
    rollout = measured.policy().sample(measured.prompts(32), np.random.default_rng(0).random((32, 12)))
    assert rollout.mask.sum() == 32 * 12


def test_the_command_leaves_rows_of_the_agreed_form(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    arguments = ["bench.py", "--shapes", "tiny", "--only", "d", "--pairs", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    threads = torch.get_num_threads()
    bench.main()
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())
    assert len(rows) == 2
    for r in rows:
        assert {"name", "device", "dtype", "value", "unit", "ratio", "pairs"} <= r.keys()
        assert r["value"] > 0 and r["ratio"] > 0 and r["pairs"] == 2
