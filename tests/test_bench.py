"""The bench: ratios of pairs, and a list on disk that keeps what was measured elsewhere."""

import json
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy", reason="the experiments need SciPy, see requirements-dev.txt")

from experiments import bench  # noqa: E402


def test_new_rows_replace_their_own_and_leave_another_devices(tmp_path):
    row = {"name": "x", "device": "cpu", "dtype": "float32", "value": 1.0}
    for changes in ({}, {"name": "y"}, {"device": "cuda", "value": 3.0}, {"value": 2.0}):
        bench.save(row | changes, tmp_path / "bench.json")
    table = {(r["name"], r["device"]): r["value"] for r in json.loads((tmp_path / "bench.json").read_text())}
    assert table == {("x", "cpu"): 2.0, ("y", "cpu"): 1.0, ("x", "cuda"): 3.0}


def test_the_ratio_is_the_peers_time_over_ours_unless_its_name_says_otherwise(monkeypatch):
    clock = []  # seconds that passed
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    ours, peer = (partial(clock.append, seconds) for seconds in (0.01, 0.03))
    rows = list(bench.measured([("x / y", ours, peer, 60), ("our time / y's", ours, peer, 0)], pairs=5))
    for row, ratio in zip(rows, (3.0, 1 / 3), strict=True):
        assert [row["ratio"], *row["interval"]] == pytest.approx([ratio] * 3) and row["pairs"] == 5
    assert [row["value"] for row in rows] == pytest.approx([6000.0, 0.01])  # a rate, and seconds


def test_ours_and_a_peer_do_equal_work(tmp_path):
    pytest.importorskip("peft")
    small = bench.Bench("tiny", "cpu", "float32", tmp_path)
    for _, ours, peer, tokens in bench.sampler(small):
        peer()
        assert ours().mask.sum() == tokens == bench.N * small.L
    first = islice(bench.jacobian(small), 2)
    assert [(len(ours().J), len(peer().J)) for _, ours, peer, _ in first] == [(2, 1), (4, 1)]
