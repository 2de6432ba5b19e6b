"""Sweeps and comparisons: what is planned, what comes of it, going on after a stop, refusals, the hypervolume."""

import json
import shutil

import numpy as np
import pytest
import test_run
from safetensors.torch import load_file, save_file
from test_run import adapter_of, command, contents, metrics_of, refused, summary_of

import run
from app import metrics, options, sweep
from firm import Federation
from worlds import toy

world = test_run.world  # the fixture


def arguments(world, out, **changes) -> list[str]:
    """A one-round sweep over (0, 1) and (0.4, 0.6) with firm, mgda and soups; a change of None drops the flag."""
    flags = {"out": out, "rounds": 1, "eval_samples": 1, "sweep": [0, 0.4], "compare": ["firm", "mgda", "soups"]}
    return command(world, **flags | changes)


@pytest.fixture(scope="module")
def swept(world):
    """The directory of one finished sweep."""
    assert run.main(arguments(world, world / "swept")) == 0
    return world / "swept"


def results(directory) -> dict:
    return json.loads((directory / "sweep.json").read_text())["results"]


def plan(compare, *flags) -> dict[str, list]:
    config, commands = options.parse([*flags, "--compare", *compare])
    return sweep.plan(config, commands.sweep, commands.compare)


def test_methods_that_take_no_preference_run_once_at_the_centre():
    swept, once = ["firm", "linear", "morlhf", "soups", "fedmoa"], ["mgda", "fsmgda", "fedcmoo", "minimum"]
    runs = plan(swept + once, "--sweep", "0.9", "0.1")
    preferences = {text: [run.preference for run in configs] for text, configs in runs.items()}
    assert all(preferences[text] == [[0.1, 0.9], [0.9, 0.1]] for text in swept)
    assert all(preferences[text] == [[0.5, 0.5]] for text in once)


def test_a_comparison_without_sweep_is_at_the_preference_and_a_method_may_bring_flags():
    texts = ["firm", "mgda", "firm beta=1 advantages=group"]
    (firm,), (mgda,), (variant,) = plan(texts, "--preference", "3", "1").values()
    assert firm.preference == variant.preference == [0.75, 0.25] and mgda.preference == [0.5, 0.5]
    assert (firm.beta, firm.advantages) == (0.01, None) and (variant.beta, variant.advantages) == (1.0, "group")


def test_preferences_are_shares_and_name_a_directory():
    assert sweep.parse_preference("1:1:2", 3) == [0.25, 0.25, 0.5] and sweep.parse_preference("0.3", 2) == [0.3, 0.7]
    assert (sweep.label([0.3, 0.7]), sweep.label([0.125, 0.875])) == ("p0.30-0.70", "p0.125-0.875")


REFUSED = {
    "a word": ({"sweep": ["much"]}, "sweep: 'much'"),
    "shares of three": ({"sweep": ["1:2:3"]}, "'1:2:3' is not a preference for 2 objectives"),
    "a preference twice": ({"sweep": ["0.3", "3:7"]}, "sweep: 0.3 3:7 names a preference twice"),
    "nothing to sweep": ({"compare": ["mgda", "fsmgda"]}, "mgda, fsmgda takes no preference"),
    "an unknown method": ({"compare": ["firm", "magic"]}, "'magic' is none of firm"),
    "an idle flag": ({"compare": ["mgda beta=1"]}, "beta: mgda does not read it"),
    "a method that cannot": (
        {"compare": ["firm", "fsmgda"], "sweep": ["0.5"], "client_objectives": ["0=even"]},
        "fsmgda compares clients",
    ),
    "another question": ({"compare": ["firm", "firm temperature=0.5"]}, "sets temperature, which all runs share"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_sweep_is_refused_in_one_line_and_leaves_nothing(case, world, capsys, tmp_path):
    changes, message = REFUSED[case]
    assert message in refused(capsys, arguments(world, tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


def test_the_directory_holds_a_run_per_point_and_the_pictures(swept):
    assert {str(p.relative_to(swept)) for p in [*swept.glob("*.*"), *swept.glob("*/*")]} - {".lock"} == {
        "sweep.json", "pareto.png", "firm/p0.00-1.00", "firm/p0.40-0.60", "mgda/p0.50-0.50",
        "soups/specialist-even", "soups/specialist-short", "soups/p0.00-1.00", "soups/p0.40-0.60",
    }  # fmt: skip


def test_a_point_is_what_the_single_command_gives_and_its_row_has_its_figures(swept, world, tmp_path):
    assert run.main(command(world, out=tmp_path, rounds=1, eval_samples=1, preference=[0.4, 0.6])) == 0
    assert adapter_of(tmp_path) == adapter_of(swept / "firm" / "p0.40-0.60")
    (row,) = (row for row in results(swept)["firm"] if row["preference"] == [0.4, 0.6])
    summary, (line,) = summary_of(tmp_path), metrics_of(tmp_path)
    assert row["objectives"] == summary["objectives"] and row["kl"] == summary["kl"]
    assert row["mean_lambda"] == [line["lambda/even"], line["lambda/short"]]


def test_soups_are_the_interpolation_of_the_specialists_and_cost_the_uploads_of_both(swept, world, tmp_path):
    soups, file = swept / "soups", "adapter/adapter_model.safetensors"
    even, short = (load_file(soups / f"specialist-{name}" / file) for name in ("even", "short"))
    shutil.copytree(soups / "specialist-even" / "adapter", tmp_path / "adapter")
    save_file({name: 0.4 * even[name] + 0.6 * short[name] for name in even}, tmp_path / file)
    assert run.main(command(world, rounds=0, eval_samples=1, adapter=tmp_path / "adapter", out=tmp_path / "run")) == 0
    served, direct = summary_of(soups / "p0.40-0.60"), summary_of(tmp_path / "run")
    assert served["kl"]["mean"] == pytest.approx(direct["kl"]["mean"], rel=1e-4)
    for name in ("even", "short"):
        assert served["objectives"][name]["after"] == direct["objectives"][name]["after"]
    assert summary_of(soups / "p0.00-1.00")["kl"] == summary_of(soups / "specialist-short")["kl"] != served["kl"]
    bytes_up = {text: rows[0]["upload_bytes_per_client"] for text, rows in results(swept).items()}
    assert bytes_up["soups"] == 2 * bytes_up["firm"] == 2 * bytes_up["mgda"]


def test_a_stopped_sweep_goes_on_to_the_same_result(world, tmp_path, monkeypatch, capsys):
    asked = arguments(world, tmp_path / "sweep", compare=None, method="linear", rounds=2)
    real, rounds = Federation.round, []

    def stopping(federation):
        rounds.append(1)
        if len(rounds) == 4:
            raise KeyboardInterrupt
        return real(federation)

    monkeypatch.setattr(Federation, "round", stopping)
    assert run.main(asked) == 130
    half = tmp_path / "sweep" / "linear" / "p0.40-0.60"
    assert len(metrics_of(half)) == 1
    assert run.main(asked) == 0
    assert "linear p0.00-1.00: finished before" in capsys.readouterr().out and len(rounds) == 5
    flags = {"method": "linear", "preference": [0.4, 0.6], "eval_samples": 1}
    assert run.main(command(world, out=tmp_path / "whole", **flags)) == 0
    assert adapter_of(half) == adapter_of(tmp_path / "whole")


def test_the_same_command_keeps_finished_runs_and_another_method_joins_them(swept, world, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "copy")
    before = contents(swept / "firm")
    assert run.main(arguments(world, tmp_path / "copy", compare=["firm", "linear"])) == 0
    assert list(contents(tmp_path / "copy" / "firm").values()) == list(before.values())
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert table[-5:] == ["base", "firm", "firm", "linear", "linear"]


def test_a_sweep_of_other_settings_is_refused_by_name(swept, world, capsys):
    before = contents(swept)
    assert "holds a sweep with another lr" in refused(capsys, arguments(world, swept, lr=0.5))
    assert contents(swept) == before


@pytest.mark.parametrize("what", ["the clients' prompts", "the base model", "the starting adapter"])
def test_runs_of_other_prompts_or_weights_are_not_compared(swept, world, tmp_path, what):
    shutil.copytree(swept, tmp_path / "copy")
    point = tmp_path / "copy" / "firm" / "p0.40-0.60"
    summary = summary_of(point)
    summary["inputs"][what] += "another"
    (point / "summary.json").write_text(json.dumps(summary))
    assert run.main(arguments(world, tmp_path / "copy")) == 2


def test_a_run_that_went_on_alone_is_not_compared(swept, world, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "copy")
    point = tmp_path / "copy" / "firm" / "p0.40-0.60"
    (point / "summary.json").write_text(json.dumps(summary_of(point) | {"rounds": 7}))
    assert "went on to 7 rounds" in refused(capsys, arguments(world, tmp_path / "copy"))


def test_on_the_toy_world_the_hypervolume_is_the_share_of_the_exact_front(tmp_path):
    small = ["--rounds", "1", "--held_out", "8", "--eval_samples", "1", "--batch_size", "4", "--clients", "2"]
    assert run.main([*small, "--method", "linear", "--sweep", "0.2", "0.8", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "linear/p0.20-0.80/samples.jsonl").read_text().splitlines()]
    base = np.mean([list(line["before"]["scores"].values()) for line in lines], axis=0)
    front = toy.pareto_front([line["prompt"] for line in lines])
    rows = [row["objectives"].values() for row in results(tmp_path)["linear"]]
    means = [[objective["after"]["mean"] for objective in objectives] for objectives in rows]
    volume = metrics.normalised_hypervolume(means, base, front)
    assert json.loads((tmp_path / "sweep.json").read_text())["hypervolume"] == {"linear": pytest.approx(volume)}


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_number_of_dominated_unit_squares(seed):
    rng = np.random.default_rng(seed)
    points, (left, low) = rng.integers(-3, 4, (8, 2)), rng.integers(-3, 2, 2)
    squares = [(x, y) for x in range(left, 4) for y in range(low, 4) if any(p[0] > x and p[1] > y for p in points)]
    assert metrics.hypervolume(points, np.array([left, low])) == len(squares)


def test_normalised_hypervolume_is_zero_at_the_base_and_one_on_the_whole_front():
    front, base = np.array([[0.4, 1.0], [1.0, 0.4]]), np.array([0.2, 0.5])
    assert metrics.normalised_hypervolume(base[None], base, front) == 0.0
    assert metrics.normalised_hypervolume(np.linspace(*front, 10_001), base, front) == pytest.approx(1.0, abs=1e-3)
    # The reference is (0.2, 0.4). Above it the front has 0.2 × 0.6 on its left and half of 0.6 × 0.6 under it.
    assert metrics.normalised_hypervolume([[0.6, 0.7]], base, front) == pytest.approx(0.4 * 0.3 / 0.30)
    assert metrics.normalised_hypervolume([[0.25, 0.45]], np.array([0.5, 0.5]), front) < 0.0
