"""The experiments: one budget for every method, one common setting, and tables that are those of the rows."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("scipy.stats", reason="the experiments need SciPy, see requirements-dev.txt")

from app import plots  # noqa: E402
from evidence import experiments, lab, moa, rules  # noqa: E402
from settings import PRESETS, Config  # noqa: E402

RESULTS = Path(experiments.__file__).parents[1] / "results"
RUN = [name for name in experiments.EXPERIMENTS if (RESULTS / f"{name}.csv").is_file()]  # older ones are in older/


@pytest.mark.parametrize("name", RUN)
def test_every_table_is_that_of_the_rows_and_no_run_is_missing(name, tmp_path, monkeypatch, capsys):
    for rows in RESULTS.glob("*.csv"):
        shutil.copy(rows, tmp_path)
    monkeypatch.setattr(
        lab.Lab, "run_jobs", lambda self, name, jobs, path: pytest.fail(f"{name}: {len(jobs)} runs missing")
    )
    for picture in ("panels", "pareto"):
        monkeypatch.setattr(plots, picture, lambda *_, **__: None)
    experiments.EXPERIMENTS[name](lab.Lab(tmp_path, quick=False, workers=1))
    tables = list(tmp_path.glob("*.md"))
    assert tables
    for table in tables:
        assert table.read_text("utf-8") == (RESULTS / table.name).read_text("utf-8")


def test_every_method_gets_the_same_tuning_budget():
    jobs = rules.tuning_jobs(lab.Lab(None, quick=False, workers=1))
    budgets = {m: sum(job["method"] == m for job in jobs) for m in rules.COMPARED}
    assert len(set(budgets.values())) == 1 and not {job["seed"] for job in jobs} & set(rules.seeds_of(10))


@pytest.mark.parametrize(
    ("label", "settings", "critic"),
    [("firm", {"method": "firm"}, "firm"), ("mgda groups", {"method": "mgda", "advantages": "group"}, "mgda"),
     ("firm β=10 groups", {"method": "firm", "beta": 10.0, "advantages": "group"}, "firm β=10")],
)  # fmt: skip
def test_a_label_names_a_method_its_beta_and_how_it_learns(label, settings, critic):
    assert rules.variant(label) == settings and rules.with_critic(label) == critic


def test_the_best_setting_is_that_of_the_best_mean_over_seeds():
    common = {"server_lr": 1.0, "kl_coef": 0.01}
    scores = {1e-3: (0.1, 0.5), 3e-3: (0.35, 0.4), 6e-3: (0.6, 0.0)}
    rows = [common | {"lr": lr, "seed": s, "worst_gain": v} for lr, pair in scores.items() for s, v in enumerate(pair)]
    assert rules.ranking(rows)[0][1]["lr"] == 3e-3


def test_an_unknown_experiment_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["parteo"])
    assert "parteo" in capsys.readouterr().err


def test_the_common_setting_is_the_best_on_average_of_the_tuning_that_is_kept():
    rows = [row for found in lab.read_rows(RESULTS / "older" / "tuning.csv").values() for row in found]
    assert rules.ranking(rows)[0][1] == rules.COMMON


def test_a_method_is_tuned_by_its_own_rows(monkeypatch):
    made = lab.Lab(None, quick=False, workers=1)
    scores = {("firm", 1e-3): 0.9, ("mgda", 1e-3): 0.0, ("firm", 3e-3): 0.5, ("mgda", 3e-3): 0.5}
    rows = [
        {"method": m, "seed": 101, "lr": lr, "server_lr": 1.0, "kl_coef": 0.01, "worst_gain": v}
        for (m, lr), v in scores.items()
    ]
    monkeypatch.setattr(lab.Lab, "rows", lambda *_: rows)
    assert [rules.best_setting(made, m)["lr"] for m in ("firm", "mgda")] == [1e-3, 3e-3]


def test_fedmoa_and_what_it_is_compared_with_get_the_same_tuning_budget():
    assert len({len(grid) for grid in moa.GRIDS.values()}) == 1
    assert not set(rules.TUNING_SEEDS) & set(rules.seeds_of(10))


def test_what_fedmoa_is_compared_with_differs_by_what_its_label_says_and_nothing_else():
    made = {
        label: Config.from_flat(PRESETS["fedmoa-tiny"] | {"preset": "fedmoa-tiny"} | changes)
        for label, changes in moa.METHODS.items()
    }
    fedmoa = made["fedmoa"].method
    for label, config in made.items():
        parts = config.method
        assert (parts.learner is fedmoa.learner) == (label != "fedmoa groups")
        assert (parts.adapt is fedmoa.adapt) == (label in ("fedmoa", "fedmoa weights alone", "fedmoa groups"))
        assert (parts.client_weights is fedmoa.client_weights) == (
            label in ("fedmoa", "fedmoa average alone", "fedmoa average, primary", "fedmoa groups")
        )
        assert config.firm.rounds == made["fedmoa"].firm.rounds and config.client == made["fedmoa"].client
