"""The experiments' machinery: jobs that leave rows, and the figures of a row."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the experiments need SciPy, see requirements-dev.txt")

from experiments import lab, toy  # noqa: E402
from settings import Config  # noqa: E402

RESULTS = Path(lab.__file__).parents[1] / "results"


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """(a function that gives the rows of jobs, a list as long as the jobs that were run): seed 99 fails."""
    calls = []

    def measure(job, directory):
        calls.append(1 / (job["seed"] - 99))
        return [{"figure": float(len(calls))}]

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


def test_errors_of_lambda_and_of_p_are_told_from_the_halves_of_batches():
    # λ₁ is 0.7 ± 0.1 on a half, so 0.7 ± 0.1 / √2 on the whole; of orthogonal gradients λ₁ = |g₂|² / (|g₁|² + |g₂|²)
    start = torch.zeros(4, 2, 2, 4, 2, 2, dtype=torch.float64)
    for c, halves in enumerate(product((0.6, 0.8), repeat=2)):
        for half, lam in enumerate(halves):
            start[c, half, :, c, half] = torch.diag(torch.tensor([1 - lam, lam]))
    steps = torch.eye(2, dtype=torch.float64).expand(4, 1, 1, 2, 2)
    row = toy.of_grams([{"start": start, "steps": steps}] * 2, Config(method="mgda"))
    assert row["lambda_error"] == pytest.approx(0.1) and row["p_error"] == pytest.approx(0.2 * 2**0.5)
    assert (row["gap"], row["length_ratio"], row["twin_disagreement"]) == (pytest.approx(1.0), 1.0, 0.0)
    assert row["signal"] == 0.0  # the halves have nothing in common


def test_the_signal_is_what_halves_of_a_batch_share_of_its_gradients_squares():
    g, noise = torch.Generator().manual_seed(0), 2.0
    J = torch.randn(3, 1, 2, 5000, dtype=torch.float64, generator=g).expand(3, 2, 2, 5000) / 2
    J = J + noise / 2**0.5 * torch.randn(3, 2, 2, 5000, dtype=torch.float64, generator=g)
    flat = J.flatten(0, 2)
    grams = {"start": (flat @ flat.T).view(3, 2, 2, 3, 2, 2), "steps": torch.eye(2).expand(3, 1, 1, 2, 2)}
    assert toy.of_grams([grams], Config(method="linear"))["signal"] == pytest.approx(1 / (1 + noise**2), rel=0.15)


def of_rounds(**columns):
    """Figures of rounds with these columns, the others 1; the base policy's deviation is 0.5."""
    logged = ("lambda/disagreement", "lambda/helpful", "adapter/dispersion", "cosine", "drift", "stationarity")
    rounds = len(next(iter(columns.values())))
    ones = dict.fromkeys(
        (*logged, "upload_bytes", "download_bytes", "rejected_clients", "held_out_kl", "held_out/helpful"),
        [1.0] * rounds,
    )
    lines = [{name: float(values[t]) for name, values in (ones | columns).items()} for t in range(rounds)]
    return toy.of_rounds(lines, {"objectives": {"helpful": {"calibration": {"scale": 0.5}}}})


def test_roughness_is_the_deviation_of_noise_around_a_trend_in_base_deviations():
    trend, noise = 0.05 * np.arange(2000), np.random.default_rng(0).normal(0.0, 0.2, 2000)
    assert of_rounds(**{"held_out/helpful": trend})["roughness"] == pytest.approx(0.0, abs=1e-9)
    assert of_rounds(**{"held_out/helpful": trend + noise})["roughness"] == pytest.approx(0.4, rel=0.1)


def test_stationarity_is_a_mean_over_the_first_rounds_and_its_slope_that_of_the_logarithms(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "panels", lambda *_, **__: None)
    rows = [of_rounds(stationarity=c * np.diff(np.arange(129) ** 0.5)) for c in (1.0, 1.0, 3.0)]  # over T rounds √T
    assert rows[0]["stationarity@16"] == pytest.approx(16**-0.5)
    assert "| firm | -0.50 ± 0.00 |" in toy.over_rounds({"firm": rows}, tmp_path)
