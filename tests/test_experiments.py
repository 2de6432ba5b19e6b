"""The experiments as data: tables that are those of the rows, settings that were chosen fairly."""

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the experiments need SciPy, see requirements-dev.txt")

from app import plots  # noqa: E402
from experiments import extensions, lab, toy  # noqa: E402
from experiments.__main__ import EXPERIMENTS  # noqa: E402
from methods import METHODS  # noqa: E402

RESULTS = Path(lab.__file__).parents[1] / "results"


DONE = [name for name in EXPERIMENTS if (RESULTS / f"{name}.csv").is_file()]


@pytest.mark.parametrize("name", DONE)
def test_every_table_is_that_of_the_rows_and_no_run_is_missing(name, tmp_path, monkeypatch, capsys):
    shutil.copy(RESULTS / f"{name}.csv", tmp_path)
    monkeypatch.setattr(lab, "run_job", None)  # a job to run would fail
    monkeypatch.setattr(plots, "panels", lambda *_, **__: None)
    monkeypatch.setattr(toy, "panels", lambda *_, **__: None)
    lab.conduct(name, EXPERIMENTS[name], tmp_path)
    assert (tmp_path / f"{name}.md").read_text("utf-8") == (RESULTS / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_names_methods_that_are_registered_and_is_short_in_miniature(name):
    assert all(
        settings.get("method", "firm") in METHODS | toy.VARIANTS for settings in EXPERIMENTS[name].variants.values()
    )
    small = EXPERIMENTS[name].miniature()
    assert len(small.variants) * len(small.repeats) <= 8 and all(s["rounds"] == 3 for s in small.variants.values())


def scores_of(name):
    """Of a tuning: each label's score, by method."""
    e, rows, scores = EXPERIMENTS[name], lab.read_rows(RESULTS / f"{name}.csv"), {}
    for label, settings in e.variants.items():
        runs = [row for repeat in e.repeats for row in rows[lab.key(repeat | settings)]]
        scores.setdefault(label.partition(", ")[0], {})[label] = np.mean([row[e.figures[0]] for row in runs])
    assert len({len(of_method) for of_method in scores.values()}) == 1  # equally many settings for each
    return scores


CHOSEN = {
    "fedmoa_tuning": {*extensions.FEDMOA_BEST.values()},
    "predictor_tuning": {"both, rate 0.001"},
}


@pytest.mark.parametrize("name", [name for name in DONE if name in CHOSEN])
def test_what_is_used_is_the_best_of_equally_many_settings_on_other_seeds(name):
    assert {max(of_method, key=of_method.get) for of_method in scores_of(name).values()} == CHOSEN[name]
    seeds = [{r["seed"] for r in EXPERIMENTS[each].repeats} for each in (name, name.removesuffix("_tuning"))]
    assert not seeds[0] & seeds[1]


def test_where_lambda_is_picked_makes_no_difference_to_one_client_of_one_step(tmp_path):
    few = {"seed": 3, "clients": 1, "epochs": 1, "rounds": 2, "batch_size": 16, "held_out": 32, "diagnostics": False}
    names = ("firm", "firm-kept", "firm-shared")
    rows = [toy.measure(toy.SCOPE["firm"] | few | {"method": name}, tmp_path / name)[0] for name in names]
    assert rows[0]["kl"] > 0.01 and not METHODS.keys() & toy.VARIANTS.keys()
    assert [row["worst_gain"] for row in rows] == pytest.approx([rows[0]["worst_gain"]] * 3, abs=1e-6)


@pytest.mark.parametrize("name", ["worst", "minority"])
def test_no_rate_is_clearly_better_on_average_than_the_one_that_all_methods_have(name):
    low, common, high = np.mean([[*of_method.values()] for of_method in scores_of(f"{name}_tuning").values()], 0)
    assert low < common - 0.1 and abs(common - high) < 0.02
    assert {settings["lr"] for settings in EXPERIMENTS[name].variants.values()} == {lab.COMMON["lr"]}


def test_the_rate_of_policies_is_the_best_on_average_over_the_methods():
    low, *others = np.mean([[*of_method.values()] for of_method in scores_of("plural_tuning").values()], 0)
    rates = {settings["lr"] for settings in EXPERIMENTS["plural"].variants.values()}
    assert low > max(others) and rates == {1.5e-3}


def test_the_common_setting_is_the_best_on_average_of_the_tuning():
    lines = [line.strip("| ").split(" | ") for line in (RESULTS / "tuning.md").read_text("utf-8").splitlines()]
    scores = {tuple(map(float, line[:3])): float(line[-1]) for line in lines if line[0][:1].isdigit()}
    assert len(scores) == 12 and max(scores, key=scores.get) == (*lab.COMMON.values(), lab.KAPPAS[1])
