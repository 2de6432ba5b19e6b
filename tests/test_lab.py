"""The experiments' machinery: many runs, the rows that they leave, the figures of a row."""

import csv
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_firm import federation

from evidence import diagnostics, lab
from firm import LINEAR
from worlds import toy

RESULTS = Path(lab.__file__).parents[1] / "results"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A Lab whose jobs are not trained: they leave a row that says which call it was."""
    calls = []

    def fake(job):
        calls.append(job)
        time.sleep(job.get("slow", 0))
        if job["seed"] == 99:
            raise RuntimeError("stopped")
        return [{"method": job["method"], "seed": job["seed"], "figure": float(len(calls))}]

    monkeypatch.setattr(lab, "run_job", fake)
    monkeypatch.setattr(lab, "ProcessPoolExecutor", lambda workers, context, *_: ThreadPoolExecutor(1))
    return lab.Lab(tmp_path, quick=False, workers=1), calls


def test_a_row_that_is_there_is_not_run_again(bench):
    made, calls = bench
    jobs = [{"method": "firm", "seed": s} for s in (0, 1)]
    first = made.rows("x", jobs)
    assert made.rows("x", jobs) == first and len(calls) == 2


def test_a_stopped_experiment_keeps_its_finished_rows(bench):
    made, calls = bench
    with pytest.raises(RuntimeError, match="stopped"):
        made.rows("x", [{"method": "firm", "seed": s} for s in (0, 99)])
    assert made.rows("x", [{"method": "firm", "seed": 0}])[0]["figure"] == 1.0 and len(calls) == 2  # not run again


def test_a_stop_does_not_wait_for_the_queue(bench, monkeypatch):
    made, calls = bench
    monkeypatch.setattr(lab, "append_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.rows("x", [{"method": "firm", "seed": s, "slow": 0.05} for s in range(50)])
    assert len(calls) < 50


def test_equal_jobs_are_run_once_and_both_get_the_row(bench):
    made, calls = bench
    groups = made.groups("x", {name: [{"method": "firm", "seed": 0}] for name in "ab"})
    assert groups["a"] == groups["b"] and len(calls) == 1


def test_another_setting_is_another_row(bench):
    made, calls = bench
    made.rows("x", [{"method": "firm", "seed": 0}])
    assert made.rows("x", [{"method": "firm", "seed": 0, "beta": 1.0}])[0]["beta"] == 1.0 and len(calls) == 2


def test_a_row_of_another_version_of_the_update_is_not_found(bench, monkeypatch):
    made, calls = bench
    made.rows("x", [{"method": "firm", "seed": 0}])
    monkeypatch.setattr(lab, "UPDATE", lab.UPDATE + 1)
    made.rows("x", [{"method": "firm", "seed": 0}])
    assert len(calls) == 2


def test_every_row_says_which_commit_made_it(bench, monkeypatch):
    made, _ = bench
    monkeypatch.setattr(lab, "commit", lambda: "1234567")  # all digits, and still no number
    assert made.rows("x", [{"method": "firm", "seed": 0}])[0]["commit"] == "1234567"


@pytest.mark.parametrize("rows", sorted(RESULTS.glob("**/*.csv")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_row_that_is_kept_says_which_commit_made_it(rows):
    with open(rows, encoding="utf-8", newline="") as file:
        assert all(re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) for row in csv.DictReader(file))


def test_every_row_of_the_bench_says_which_commit_made_it():
    rows = json.loads((RESULTS / "bench.json").read_text("utf-8"))
    assert rows and all(re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) for row in rows)


def test_a_commit_with_code_changed_since_is_marked(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)  # noqa: E731
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "lab.py"))
    assert lab.commit() == "unknown"  # outside of git
    (tmp_path / "lab.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    clean = lab.commit()
    (tmp_path / "rows.csv").write_text("a result\n")
    assert lab.commit() == clean and re.fullmatch(r"[0-9a-f]{7,}", clean)
    (tmp_path / "lab.py").write_text("2\n")
    assert lab.commit() == clean + "+"


def test_rows_come_in_the_order_of_the_jobs(bench):
    made, _ = bench
    made.rows("x", [{"method": "firm", "seed": 1}])
    assert [row["seed"] for row in made.rows("x", [{"method": "firm", "seed": s} for s in (0, 1)])] == [0, 1]


def test_miniature_rows_are_not_taken_for_real_ones(bench):
    made, _ = bench
    small = lab.Lab(made.results, quick=True, workers=1)
    small.rows("x", [{"method": "firm", "seed": 0}])
    assert lab.key({"method": "firm", "seed": 0}) not in lab.read_rows(made.results / "x.csv")


def test_a_figure_goes_under_its_own_name_whatever_its_place(tmp_path):
    lab.append_rows(tmp_path / "x.csv", [{"settings": '{"seed": 0}', "method": "firm", "kl": 1.0, "gap": 2.0}])
    lab.append_rows(tmp_path / "x.csv", [{"gap": 4.0, "kl": 3.0, "method": "firm", "settings": '{"seed": 1}'}])
    row = lab.read_rows(tmp_path / "x.csv")['{"seed": 1}'][0]
    assert (row["kl"], row["gap"]) == (3.0, 4.0)


def test_a_figure_that_older_rows_lack_is_refused(tmp_path):
    lab.append_rows(tmp_path / "x.csv", [{"settings": "{}", "method": "firm", "kl": 1.0}])
    with pytest.raises(ValueError, match="new"):
        lab.append_rows(tmp_path / "x.csv", [{"settings": "{}", "method": "firm", "kl": 1.0, "new": 2.0}])


@pytest.mark.parametrize("risky", [0, 3, 8])
def test_the_front_of_a_row_is_that_of_its_prompts(risky):
    topics = {wanted: [t for t in toy.TOPICS if (t in toy.RISKY) == wanted] for wanted in (True, False)}
    prompts = [topics[True][i % 8] for i in range(risky)] + [topics[False][i % 8] for i in range(8 - risky)]
    assert np.array_equal(lab.front_of({"risky": float(risky), "held_out": 8.0}), toy.pareto_front(prompts))


@pytest.fixture(scope="module")
def round_of_firm():
    trained = federation(beta=0.01, preference=[0.3, 0.7])
    return trained.round(), trained.grams


@pytest.mark.parametrize("figure", ["disagreement", "drift"])
def test_solving_again_under_the_same_beta_gives_the_logged_figure(round_of_firm, figure):
    metrics, grams = round_of_firm
    row = lab.gram_figures({"beta": 0.01, "preference": [0.3, 0.7]}, [grams])
    assert row[f"{figure}@0.01"] == pytest.approx(metrics[lab.LOGGED[figure]], rel=1e-9)


def test_the_kept_grams_of_fixed_weights_show_what_other_weights_would_have_done():
    trained = federation(method=LINEAR)
    metrics = trained.round()
    row = lab.gram_figures({}, [trained.grams])
    assert metrics[lab.LOGGED["disagreement"]] == pytest.approx(0.0, abs=1e-12)
    assert row["disagreement@0"] > row["disagreement@1"] > row["disagreement@10"] > 0.0


def test_equal_clients_without_noise_have_no_error_in_lambda():
    # Two gradients of unequal length, the same on every client and half: every estimate of λ is the reference.
    J = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0]], dtype=torch.float64)
    rows = (0.5 * J).expand(4, 2, 2, 3).reshape(-1, 3)  # [C · 2 · M, d], halves that add up to J
    start = (rows @ rows.T).view(4, 2, 2, 4, 2, 2)
    figures = lab.noise_figures({"start": start, "weights": torch.ones(4, dtype=torch.float64)}, 0.01)
    assert figures["error_batch"] == pytest.approx(0.0, abs=1e-9)
    assert figures["error_cross"] == pytest.approx(0.0, abs=1e-9)
    assert figures["half_cosine"] == pytest.approx(1.0)


def test_noise_biases_lambda_from_one_batch_towards_inverse_variance_and_not_from_halves():
    # Equal true gradients norms, orthogonal, so the true λ is ½; the second one's noise is three times as large.
    rng = np.random.default_rng(0)
    d, C = 400, 6
    truth = np.zeros((2, d))
    truth[0, 0] = truth[1, 1] = 1.0
    scale = np.array([0.05, 0.15])[:, None]
    batch, cross = [], []
    for _ in range(30):
        rows = torch.tensor(0.5 * truth + scale * rng.normal(size=(C, 2, 2, d))).reshape(-1, d)
        start = (rows @ rows.T).view(C, 2, 2, C, 2, 2)
        figures = lab.noise_figures({"start": start, "weights": torch.ones(C, dtype=torch.float64)}, 0.01)
        batch.append(figures["lambda1_batch"])
        cross.append(figures["lambda1_cross"])
    assert np.mean(batch) > 0.8 and abs(np.mean(cross) - 0.5) < 0.1


def rounds_of(rewards, spread):
    """metrics.jsonl lines with these mean rewards, and a summary."""
    names = (*lab.LOGGED.values(), "seconds", "adapter/averaging_residual", "adapter/norm")
    figures = {f"reward_sd/{name}": spread for name in lab.NAMES}
    lines = [dict.fromkeys(names, 1.0) | figures | {f"reward/{n}": float(r) for n in lab.NAMES} for r in rewards]
    return lines, {"objectives": {name: {"calibration": {"scale": 0.5}} for name in lab.NAMES}}


def test_roughness_is_that_of_the_logged_rewards_in_deviations_of_the_base_policy():
    rewards = [0.0, 1.0, 0.5, 2.0]
    row = lab.round_figures({}, *rounds_of(rewards, 0.0))
    assert row["roughness_helpful"] == pytest.approx(diagnostics.roughness(rewards) / 0.5)
    assert row["net_roughness_helpful"] == pytest.approx(row["roughness_helpful"])  # nothing of it is sampling noise


def test_movement_is_the_mean_distance_between_the_lambdas_of_two_rounds():
    lines, summary = rounds_of([0.0, 1.0, 2.0], 0.0)
    for line, first in zip(lines, (0.5, 0.8, 0.7), strict=True):
        line |= {"lambda/helpful": first, "lambda/harmless": 1.0 - first}
    assert lab.round_figures({}, lines, summary)["movement"] == pytest.approx((0.3 + 0.1) / 2 * np.sqrt(2))


def test_the_noise_of_sampling_alone_leaves_no_net_roughness():
    rng = np.random.default_rng(0)
    spread = 2.0  # of the rewards of a round's 4 · 25 responses, whose mean then has deviation 0.2
    quiet, loud = 0.05 * np.arange(2000), rng.normal(0.0, spread / 10, 2000)
    wild = loud + rng.normal(0.0, 0.5, 2000)
    job = {"clients": 4, "batch_size": 25}
    net = [lab.round_figures(job, *rounds_of(r, spread))["net_roughness_helpful"] for r in (quiet, loud, wild)]
    assert net[0] == 0.0 and net[1] < 0.1 and net[2] == pytest.approx(0.5 / 0.5, rel=0.1)


def test_groups_have_no_net_roughness_since_their_responses_are_no_independent_samples():
    row = lab.round_figures({"advantages": "group"}, *rounds_of([0.0, 1.0, 0.5], 1.0))
    assert np.isnan(row["net_roughness_helpful"]) and row["roughness_helpful"] > 0


def test_a_jobs_key_does_not_depend_on_the_order_of_its_settings():
    assert lab.key({"a": 1, "b": [0.1]}) == lab.key(json.loads('{"b": [0.1], "a": 1}'))


def test_cold_figures_at_the_training_temperature_are_the_runs_own_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = {"method": "firm", "seed": 0, "rounds": 1, "held_out": 8, "eval_samples": 2, "advantages": "group"}
    (same,), (cold,) = (lab.run_job(job | {"cold": temperature}) for temperature in (1.0, 0.1))
    assert [same[f"cold_{name}"] for name in lab.NAMES] == [same[name] for name in lab.NAMES]
    assert [cold[name] for name in lab.NAMES] == [same[name] for name in lab.NAMES]
    assert all(cold[f"cold_{name}"] != same[name] for name in lab.NAMES)


def test_soups_give_a_row_for_every_preference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = {"method": "soups", "seed": 0, "rounds": 1, "held_out": 8, "eval_samples": 1, "batch_size": 4, "clients": 2}
    rows = lab.run_job(job | {"preferences": [0.2, 0.8]})
    assert [row["p"] for row in rows] == [0.2, 0.8] and rows[0]["kl"] != rows[1]["kl"]


def test_what_is_logged_every_round_is_found_under_its_name(round_of_firm):
    names = {name.replace("helpful", "even").replace("harmless", "low") for name in lab.LOGGED.values()}
    assert names <= round_of_firm[0].keys()


def test_a_figure_that_a_row_lacks_is_nan(tmp_path):
    lab.append_rows(tmp_path / "x.csv", [{"settings": '{"seed": 0}', "method": "firm", "kl": 1.0, "gap": 2.0}])
    lab.append_rows(tmp_path / "x.csv", [{"settings": '{"seed": 1}', "method": "soups", "kl": 3.0}])
    assert np.isnan(lab.read_rows(tmp_path / "x.csv")['{"seed": 1}'][0]["gap"])


def test_a_new_row_has_the_columns_of_those_that_are_there(round_of_firm, tmp_path):
    metrics, grams = round_of_firm
    metrics = {name.replace("even", "helpful").replace("low", "harmless"): value for name, value in metrics.items()}
    objectives = {
        name: {k: {"mean": 0.5, "standard_error": 0.1} for k in ("before", "after", "gain")}
        | {"calibration": {"scale": 1.0}}
        for name in lab.NAMES
    }
    summary = {"objectives": objectives, "kl": {"mean": 0.0}}
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": next(iter(toy.TOPICS))}) + "\n")
    job = {"method": "firm", "seed": 0}
    row = lab.progress_figures(job, summary, tmp_path) | lab.round_figures(job, [metrics], summary)
    row |= lab.byte_figures([metrics]) | lab.gram_figures(job, [grams])
    with open(RESULTS / "groups.csv", encoding="utf-8", newline="") as file:
        assert {"settings", "commit", *row} == set(next(csv.reader(file)))
