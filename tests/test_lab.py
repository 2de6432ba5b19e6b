"""The experiments' machinery: jobs that leave rows, and the figures of a row."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_diagnostics import federation

pytest.importorskip("scipy", reason="the experiments need SciPy, see requirements-dev.txt")

import metrics  # noqa: E402
from experiments import diagnostics, lab, toy  # noqa: E402
from settings import Config  # noqa: E402

RESULTS = Path(lab.__file__).parents[1] / "results"


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """(a function that gives the rows of jobs, a list as long as the jobs that were run): seed 99 fails."""
    calls = []

    def measure(job, directory):
        calls.append(1 / (job["seed"] - 99))
        return [{"method": "firm", "figure": float(len(calls))}]

    monkeypatch.setattr(lab, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    return lambda *jobs: lab.rows_of(tmp_path / "x.csv", jobs, measure, 1), calls


def test_a_row_is_found_by_its_settings_and_the_version_of_the_update(laboratory, monkeypatch):
    rows, calls = laboratory
    first = rows({"seed": 0}, {"seed": 1}, {"seed": 0})  # equal jobs are run once
    assert rows({"seed": 1}, {"seed": 0}) == first and len(calls) == 2
    other = {"beta": 1.0, "seed": 0}
    assert rows(other)[lab.key(other)][0]["beta"] == 1.0 and len(calls) == 3
    monkeypatch.setattr(lab, "UPDATE", lab.UPDATE + 1)
    rows(other)
    assert len(calls) == 4


def test_a_stopped_experiment_keeps_its_finished_rows_and_drops_the_queue(laboratory):
    rows, calls = laboratory
    with pytest.raises(ZeroDivisionError):
        rows(*({"seed": seed} for seed in (0, 99, *range(1, 50))))
    assert len(calls) < 50
    calls.clear()
    assert rows({"seed": 0})[lab.key({"seed": 0})][0]["figure"] == 1.0 and not calls


def test_figures_go_under_their_own_names_and_are_nan_if_a_row_lacks_them(tmp_path):
    for row in ({"settings": '{"seed": 0}', "kl": 1.0, "gap": 2.0}, {"new": 4.0, "kl": 3.0, "settings": '{"seed": 1}'}):
        lab.append_rows(tmp_path / "x.csv", [row])
    (first,), (second,) = lab.read_rows(tmp_path / "x.csv").values()
    figures = [first["kl"], first["gap"], second["kl"], second["new"], first["new"], second["gap"]]
    assert figures == pytest.approx([1.0, 2.0, 3.0, 4.0, np.nan, np.nan], nan_ok=True)


def test_every_row_on_disk_says_which_commit_made_it():
    tables = [list(csv.DictReader(path.read_text("utf-8").splitlines())) for path in RESULTS.glob("*.csv")]
    for rows in (*tables, json.loads((RESULTS / "bench.json").read_text("utf-8"))):
        assert rows and all(re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) for row in rows)


def test_solving_again_under_the_same_beta_gives_the_logged_figures():
    trained = federation(beta=0.1, preference=[0.3, 0.7])
    lines, grams = [], []
    for _ in range(2):
        record = trained.round()
        figures, tensors = diagnostics.observe(trained.policy, record, trained.config)
        lines.append(metrics.line(record, trained.clients, trained.names, trained.policy.adapter) | figures)
        grams.append(tensors)
    row = toy.of_grams(grams, [0.3, 0.7])
    assert row["disagreement@0.1"] == pytest.approx(np.mean([line["lambda/disagreement"] for line in lines]))
    assert row["drift@0.1"] == pytest.approx(np.mean([line["drift"] for line in lines]))
    assert row["disagreement@0"] > row["disagreement@0.1"] > row["disagreement@10"] > 0.0


def net_roughness(rewards, spread, **settings):
    """Of rounds with these mean rewards, whose 100 responses have this deviation; the base policy's is 0.5."""
    logged = ("drift", "upload_bytes", "download_bytes", "lambda/disagreement", "lambda/helpful")
    figures = dict.fromkeys(logged, 1.0) | {f"reward_sd/{name}": spread for name in toy.NAMES}
    lines = [figures | {f"reward/{name}": float(reward) for name in toy.NAMES} for reward in rewards]
    summary = {"objectives": {name: {"calibration": {"scale": 0.5}} for name in toy.NAMES}}
    return toy.of_rounds(Config(clients=4, batch_size=25, **settings), summary, lines)["net_roughness_helpful"]


def test_roughness_is_net_of_a_trend_and_of_sampling_in_deviations_of_the_base_policy():
    rng = np.random.default_rng(0)
    trend, noise = 0.05 * np.arange(2000), rng.normal(0.0, 0.2, 2000)  # 0.2: 100 responses of deviation 2
    assert net_roughness(trend, 2.0) == 0.0 and net_roughness(trend + noise, 2.0) < 0.1
    assert net_roughness(noise + rng.normal(0.0, 0.5, 2000), 2.0) == pytest.approx(0.5 / 0.5, rel=0.1)
    assert np.isnan(net_roughness(noise, 2.0, advantages="group"))  # responses to one prompt are not independent
