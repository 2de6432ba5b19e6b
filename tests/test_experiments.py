"""The experiments as data: tables that are those of the rows, settings that were chosen fairly."""

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the experiments need SciPy, see requirements-dev.txt")

from app import plots  # noqa: E402
from experiments import extensions, lab  # noqa: E402
from experiments.__main__ import EXPERIMENTS  # noqa: E402
from methods import METHODS  # noqa: E402

RESULTS = Path(lab.__file__).parents[1] / "results"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_table_is_that_of_the_rows_and_no_run_is_missing(name, tmp_path, monkeypatch, capsys):
    shutil.copy(RESULTS / f"{name}.csv", tmp_path)
    monkeypatch.setattr(lab, "run_job", None)  # a job to run would fail
    for picture in ("panels", "pareto"):
        monkeypatch.setattr(plots, picture, lambda *_, **__: None)
    lab.conduct(name, EXPERIMENTS[name], tmp_path)
    assert (tmp_path / f"{name}.md").read_text("utf-8") == (RESULTS / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_names_methods_that_are_registered_and_is_short_in_miniature(name):
    assert all(settings.get("method", "firm") in METHODS for settings in EXPERIMENTS[name].variants.values())
    small = EXPERIMENTS[name].miniature()
    assert len(small.variants) * len(small.repeats) <= 8 and all(s["rounds"] == 3 for s in small.variants.values())


def test_what_is_used_is_the_best_of_equally_many_settings():
    e, rows, scores = EXPERIMENTS["fedmoa_tuning"], lab.read_rows(RESULTS / "fedmoa_tuning.csv"), {}
    for label, settings in e.variants.items():
        score = np.mean([rows[lab.key(repeat | settings)][0]["accuracy"] for repeat in e.repeats])
        scores.setdefault(label.split()[0], {})[label] = score
    best = [e.variants[max(of_method, key=of_method.get)] for of_method in scores.values()]
    assert best == extensions.TUNED
    assert len({len(of_method) for of_method in scores.values()}) == 1
    assert not {repeat["seed"] for repeat in e.repeats} & {repeat["seed"] for repeat in lab.seeds(10)}


def test_the_common_setting_is_the_best_on_average_of_the_tuning():
    lines = [line.strip("| ").split(" | ") for line in (RESULTS / "tuning.md").read_text("utf-8").splitlines()]
    scores = {tuple(map(float, line[:3])): float(line[-1]) for line in lines if line[0][:1].isdigit()}
    assert len(scores) == 12 and max(scores, key=scores.get) == (*lab.COMMON.values(), lab.KAPPAS[1])
