"""The experiments' machinery: rows, figures, statistics. The experiments themselves are run by `experiments.py`."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="the experiments need SciPy, see requirements-dev.txt")

import torch  # noqa: E402
from test_firm import federation  # noqa: E402

from evidence import experiments, lab  # noqa: E402
from firm import LINEAR  # noqa: E402
from worlds import toy  # noqa: E402


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
    monkeypatch.setattr(lab, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
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


def test_holm_by_hand():
    # 0.01 · 3, then 0.03 · 2 = 0.06, then max(0.06, 0.04 · 1)
    assert lab.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_never_exceeds_one_and_keeps_nan():
    adjusted = lab.holm([0.9, float("nan"), 0.8])
    assert adjusted[0] == 1.0 and np.isnan(adjusted[1]) and adjusted[2] == 1.0


def test_a_paired_difference_is_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 10))
    rows = [[{"seed": s, "v": v} for s, v in enumerate(values)] for values in (x, y)]
    mean, half, p = lab.paired(rows[0], rows[1][::-1], "v")  # paired by seed, whatever the order
    test = stats.ttest_rel(x, y)
    low, high = test.confidence_interval(0.95)
    assert (mean, p) == pytest.approx(((x - y).mean(), test.pvalue))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_difference_that_never_varies_is_not_tested():
    rows = [[{"seed": s, "v": v} for s in range(3)] for v in (1.0, 0.0)]
    assert lab.paired(*rows, "v")[0] == 1.0 and np.isnan(lab.paired(*rows, "v")[2])


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
    assert row[f"{figure}@0.01"] == pytest.approx(metrics[f"lambda/{figure}"], rel=1e-9)


def test_the_kept_grams_of_fixed_weights_show_what_other_weights_would_have_done():
    trained = federation(method=LINEAR)
    metrics = trained.round()
    row = lab.gram_figures({}, [trained.grams])
    assert metrics["lambda/disagreement"] == pytest.approx(0.0, abs=1e-12)
    assert row["disagreement@0"] > row["disagreement@1"] > row["disagreement@10"] > 0.0


def test_every_row_has_every_figure_of_the_grams(round_of_firm):
    assert set(lab.gram_figures({}, [round_of_firm[1]])) == set(lab.GRAM_FIGURES)


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


def test_every_method_gets_the_same_tuning_budget():
    jobs = experiments.tuning_jobs(lab.Lab(None, quick=False, workers=1))
    budgets = {m: sum(job["method"] == m for job in jobs) for m in experiments.METHODS}
    assert len(set(budgets.values())) == 1 and not {job["seed"] for job in jobs} & set(range(10))


def test_the_best_setting_is_that_of_the_best_mean_over_seeds():
    common = {"server_lr": 1.0, "kl_coef": 0.01}
    scores = {1e-3: (0.1, 0.5), 3e-3: (0.35, 0.4), 6e-3: (0.6, 0.0)}
    rows = [common | {"lr": lr, "seed": s, "worst_gain": v} for lr, pair in scores.items() for s, v in enumerate(pair)]
    assert experiments.ranking(rows)[0][1]["lr"] == 3e-3


def test_an_unknown_experiment_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["parteo"])
    assert "parteo" in capsys.readouterr().err


def test_the_common_setting_is_best_on_average_over_the_methods(bench, monkeypatch):
    made, _ = bench
    scores = {("firm", 1e-3): 0.9, ("mgda", 1e-3): 0.0, ("firm", 3e-3): 0.5, ("mgda", 3e-3): 0.5}
    rows = [
        {"method": m, "seed": 101, "lr": lr, "server_lr": 1.0, "kl_coef": 0.01, "worst_gain": v}
        for (m, lr), v in scores.items()
    ]
    monkeypatch.setattr(lab.Lab, "rows", lambda *_: rows)
    assert experiments.common(made)["lr"] == 3e-3 and experiments.tuned(made, "firm")["lr"] == 1e-3


def test_holms_family_leaves_out_other_settings_of_our_own_method():
    rng = np.random.default_rng(0)
    groups = {
        label: [{"seed": s, "v": v} for s, v in enumerate(rng.normal(shift, 1.0, 10))]
        for label, shift in (("firm", 0.0), ("firm β=1", 1.0), ("mgda", 1.0), ("linear", 0.5))
    }
    test = lab.against(groups, "firm", "v")
    p = [lab.paired(groups["firm"], groups[label], "v")[2] for label in ("mgda", "linear")]
    assert test["firm β=1"][1] == "" and test["firm"] == ("", "")
    assert [test[label][1] for label in ("mgda", "linear")] == [f"{q:.2g}" for q in lab.holm(p)]


def rounds_of(rewards, spread):
    """metrics.jsonl lines with these mean rewards, and a summary."""
    names = ("lambda/helpful", "lambda/harmless", "lambda/disagreement", "lambda/drift", "lambda/movement", "seconds",
             "adapter/dispersion", "adapter/averaging_residual", "adapter/norm", "cosine", "stationarity")  # fmt: skip
    lines = [
        dict.fromkeys(names, 1.0) | {f"reward/{n}": float(r) for n in lab.NAMES}
        | {f"reward_sd/{n}": spread for n in lab.NAMES}
        for r in rewards
    ]  # fmt: skip
    rough = lab.diagnostics.roughness(rewards)
    return lines, {"objectives": {n: {"roughness": rough, "calibration": {"scale": 0.5}} for n in lab.NAMES}}


def test_the_noise_of_sampling_alone_leaves_no_net_roughness():
    rng = np.random.default_rng(0)
    spread = 2.0  # of the rewards of a round's 4 · 25 responses, whose mean then has deviation 0.2
    quiet, loud = 0.05 * np.arange(2000), rng.normal(0.0, spread / 10, 2000)
    wild = loud + rng.normal(0.0, 0.5, 2000)
    job = {"clients": 4, "batch_size": 25}
    net = [lab.round_figures(job, *rounds_of(r, spread))["net_roughness_helpful"] for r in (quiet, loud, wild)]
    assert net[0] == 0.0 and net[1] < 0.1 and net[2] == pytest.approx(0.5 / 0.5, rel=0.1)


def test_every_row_has_every_figure_of_the_rounds():
    assert set(lab.round_figures({}, *rounds_of([0.0, 1.0, 0.0], 1.0))) == set(lab.ROUND_FIGURES)


def test_a_table_has_a_line_per_group(tmp_path, capsys):
    rows = {("a", 1): [{"kl": 1.0}, {"kl": 3.0}], ("b", 2): [{"kl": 2.0}, {"kl": 2.0}]}
    lab.table(lab.Lab(tmp_path, False, 1), "x", ["name", "n"], rows, ["kl"])
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert lines[0] == "| name | n | KL (nats per response) |" and lines[3] == "| b | 2 | 2.000 |"
    half = stats.t.ppf(0.975, 1) * np.sqrt(2) / np.sqrt(2)
    assert lines[2] == f"| a | 1 | 2.000 ± {half:.3f} |"


def test_a_jobs_key_does_not_depend_on_the_order_of_its_settings():
    assert lab.key({"a": 1, "b": [0.1]}) == lab.key(json.loads('{"b": [0.1], "a": 1}'))
