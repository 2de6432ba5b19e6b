"""Sweeps and comparisons: hypervolume against an exact oracle, the directory, going on after a stop, refusals."""

import gzip
import json
import shutil
import weakref

import numpy as np
import pytest
import test_run
from test_run import adapter_of, command, metrics_without_times, refused

import run
from app import report, sweep
from app.session import Session
from firm import Federation
from settings import METHODS

world = test_run.world  # the fixture: a checkpoint, prompts and two objectives, even and short


def arguments(world, out, **changes) -> list[str]:
    """A one-round sweep over (0, 1) and (0.4, 0.6) with firm, mgda and soups; a change of None drops the flag."""
    flags = {"out": out, "rounds": 1, "sweep": [0, 0.4], "compare": ["firm", "mgda", "soups"]}
    return command(world, **flags | changes)


@pytest.fixture(scope="module")
def sessions():
    """How many sessions were alive when another one had been made."""
    return []


@pytest.fixture(scope="module")
def swept(world, sessions):
    """The directory of one finished sweep."""
    real, alive = Session.__init__, weakref.WeakSet()

    def counting(session, *args, **kwargs):
        real(session, *args, **kwargs)
        alive.add(session)
        sessions.append(len(alive))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", counting)
        assert run.main(arguments(world, world / "swept")) == 0
    return world / "swept"


def results(directory) -> list[dict]:
    return json.loads((directory / "sweep.json").read_text())["results"]


# hypervolume


def covered_area(points, reference) -> float:
    """Oracle: cut the plane at every coordinate; a cell counts if a point lies at or beyond its upper right corner."""
    cuts = [np.unique([reference[k], *(p[k] for p in points if p[k] > reference[k])]) for k in (0, 1)]
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in zip(cuts[0], cuts[0][1:], strict=False)
        for y0, y1 in zip(cuts[1], cuts[1][1:], strict=False)
        if any(p[0] >= x1 and p[1] >= y1 for p in points)
    )


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_dominated_area(seed):
    rng = np.random.default_rng(seed)
    points, reference = rng.standard_normal((12, 2)), rng.standard_normal(2) - 0.5
    assert sweep.hypervolume(points, reference) == pytest.approx(covered_area(points, reference), abs=1e-12)


def test_hypervolume_of_ties_counts_every_strip_once():
    points = np.array([[1.0, 2.0], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert sweep.hypervolume(points, np.zeros(2)) == 3.0


def test_points_that_are_not_above_the_reference_contribute_nothing():
    assert sweep.hypervolume(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 5.0]]), np.zeros(2)) == 0.0
    assert sweep.hypervolume(np.empty((0, 2)), np.zeros(2)) == 0.0


FRONT = np.array([[0.4, 1.0], [1.0, 0.4]])
BASE = np.array([0.2, 0.5])  # with the front's nadir (0.4, 0.4) the reference is (0.2, 0.4)


def test_the_base_model_alone_has_normalised_hypervolume_zero():
    assert sweep.normalised_hypervolume(BASE[None], BASE, FRONT) == 0.0


def test_the_whole_front_has_normalised_hypervolume_one():
    dense = np.linspace(*FRONT, 10_001)
    assert sweep.normalised_hypervolume(dense, BASE, FRONT) == pytest.approx(1.0, abs=1e-3)
    assert sweep.normalised_hypervolume(dense, BASE, FRONT) < 1.0  # the front counts with all its points


def test_normalised_hypervolume_by_hand():
    # Front above (0.2, 0.4): 0.2 × 0.6 left of it and half of 0.6 × 0.6 under it; the base's first coordinate is the
    # reference's, so its own area is 0; the point (0.6, 0.7) dominates 0.4 × 0.3.
    assert sweep.normalised_hypervolume([[0.6, 0.7]], BASE, FRONT) == pytest.approx(0.12 / 0.30)


def test_a_method_that_lost_ground_has_a_negative_normalised_hypervolume():
    base = np.array([0.5, 0.5])
    assert sweep.normalised_hypervolume(base[None] - 0.05, base, FRONT) < 0.0


def test_without_a_front_hypervolume_is_of_calibrated_gains_above_the_worst_point():
    rows = lambda *gains: [{"gain": list(gain), "scale": [2.0, 0.5]} for gain in gains]  # noqa: E731
    groups = {"firm": rows((2.0, 0.5), (4.0, -0.5)), "mgda": rows((0.0, 0.5))}  # calibrated: (1, 1), (2, −1), (0, 1)
    volumes, meaning = sweep.hypervolumes(groups, np.zeros(2), None)
    assert volumes == {"firm": 2.0, "base model": 0.0} and "+0.00/-1.00" in meaning


# what is asked for


def test_a_value_is_the_first_objectives_share():
    assert sweep.parse_preference("0.3", 2) == [0.3, 0.7]


def test_values_with_colons_are_shares_of_any_objectives():
    assert sweep.parse_preference("1:1:2", 3) == [0.25, 0.25, 0.5]


def test_directories_are_named_by_preference_with_as_many_digits_as_it_takes():
    assert [sweep.label(p) for p in ([0.3, 0.7], [0, 1], [0.125, 0.875])] == [
        "p0.30-0.70",
        "p0.00-1.00",
        "p0.125-0.875",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_runs_every_method_that_takes_a_preference_at_each_and_refuses_the_others(method):
    config, _, ps, methods = run.parse(["--sweep", "0.9", "0.1", "--compare", method])
    if METHODS[method].takes_preference:
        assert sweep.plan(config, ps, methods) == {method: [[0.1, 0.9], [0.9, 0.1]]}
    else:
        with pytest.raises(ValueError, match=f"{method} takes no preference"):
            sweep.plan(config, ps, methods)


def test_methods_that_take_no_preference_run_once_at_the_centre():
    config, _, ps, methods = run.parse(["--sweep", "0.9", "0.1", "--compare", "soups", "fedcmoo", "linear"])
    both = [[0.1, 0.9], [0.9, 0.1]]
    assert list(sweep.plan(config, ps, methods).items()) == [
        ("soups", both),
        ("fedcmoo", [[0.5, 0.5]]),
        ("linear", both),
    ]


def test_a_comparison_without_sweep_is_at_the_preference():
    config, _, ps, methods = run.parse(["--compare", "firm", "mgda", "--preference", "3", "1"])
    assert sweep.plan(config, ps, methods) == {"firm": [[0.75, 0.25]], "mgda": [[0.5, 0.5]]}


def test_help_shows_both_flags(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    assert "--sweep" in text and "--compare" in text


BAD = {
    "a word": ({"sweep": ["much"]}, "sweep: 'much'"),
    "a share above one": ({"sweep": ["1.2"]}, "sweep: '1.2'"),
    "a negative share": ({"sweep": ["-0.1"]}, "sweep: '-0.1'"),
    "not a number": ({"sweep": ["nan"]}, "sweep: 'nan'"),
    "shares of three objectives": ({"sweep": ["1:2:3"]}, "no preference for 2 objectives"),
    "a preference twice": ({"sweep": ["0.3", "3:7"]}, "p0.30-0.70 is named twice"),
    "an unknown method": ({"compare": ["firm", "magic"]}, "'magic' is none of firm"),
    "a method twice": ({"compare": ["firm", "firm"]}, "firm is named twice"),
    "nothing to sweep": ({"compare": ["mgda", "fsmgda"]}, "mgda, fsmgda takes no preference"),
    "method beside compare": ({"method": "linear"}, "leave --method out"),
    "preference beside sweep": ({"preference": [1, 1]}, "leave --preference out"),
    "resume beside sweep": ({"resume": "somewhere"}, "--out naming its directory"),
    "no objectives": ({"objectives": None}, "objectives"),
    "soups alone": ({"compare": None, "sweep": None, "method": "soups"}, "--sweep"),
    "a missing model": ({"model": "nobody/no-such-model"}, "--model DIR"),
    "more clients than prompts": ({"clients": 100}, "clients"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sweep_is_refused_in_one_line_and_leaves_nothing(case, world, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, message = BAD[case]
    assert message in refused(capsys, arguments(world, tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


# what comes of it


def test_the_directory_holds_a_run_per_point_and_the_pictures(swept):
    assert {str(p.relative_to(swept)) for p in [*swept.glob("*.*"), *swept.glob("*/*")]} == {
        "sweep.json", "pareto.png", "weights.png", "firm/p0.00-1.00", "firm/p0.40-0.60", "mgda/p0.50-0.50",
        "soups/specialist-even", "soups/specialist-short", "soups/p0.00-1.00", "soups/p0.40-0.60",
    }  # fmt: skip
    assert not list(swept.rglob("*.tmp"))


def test_only_one_session_is_in_memory_at_a_time(swept, sessions):
    assert sessions == [1] * 7  # the check, five runs, and the tasting of the soups


def test_a_point_is_what_the_single_command_gives(swept, world, tmp_path):
    assert run.main(command(world, out=tmp_path / "one", rounds=1, preference=[0.4, 0.6])) == 0
    assert adapter_of(tmp_path / "one") == adapter_of(swept / "firm" / "p0.40-0.60")


def test_a_soup_at_a_corner_measures_as_its_specialist(swept):
    soup, specialist = (
        json.loads((swept / "soups" / name / "summary.json").read_text()) for name in ("p0.00-1.00", "specialist-short")
    )
    for name in ("even", "short"):
        for stage in ("before", "after", "gain", "calibration"):
            assert soup["objectives"][name][stage] == specialist["objectives"][name][stage]
    assert soup["kl"] == specialist["kl"]


def test_a_soup_between_corners_is_neither_specialist(swept):
    rows = {tuple(row["preference"] or ()): row for row in results(swept) if row["method"] == "soups"}
    assert rows[0.4, 0.6]["kl"] != rows[0.0, 1.0]["kl"] > 0.0


def test_a_soup_costs_the_uploads_of_all_specialists(swept):
    bytes_up = {row["method"]: row["upload_bytes_per_client"] for row in results(swept)}
    assert bytes_up["soups"] == 2 * bytes_up["firm"] == 2 * bytes_up["mgda"]


def test_the_results_are_those_of_the_runs(swept):
    row = next(row for row in results(swept) if row["preference"] == [0.4, 0.6] and row["method"] == "firm")
    summary = json.loads((swept / "firm" / "p0.40-0.60" / "summary.json").read_text())
    assert row["mean"] == [summary["objectives"][name]["after"]["mean"] for name in ("even", "short")]
    assert row["kl"] == summary["kl"]["mean"]
    (line,) = metrics_without_times(swept / "firm" / "p0.40-0.60")
    assert row["mean_lambda"] == [line["lambda/even"], line["lambda/short"]]


@pytest.mark.parametrize(("moves", "dominated"), [((-0.1, 0.0), True), ((-0.1, 0.1), False), ((0.0, 0.0), False)])
def test_a_point_is_dominated_if_it_is_worse_somewhere_and_better_nowhere(swept, tmp_path, moves, dominated):
    summary = json.loads((swept / "soups" / "p0.40-0.60" / "summary.json").read_text())
    for entry, move in zip(summary["objectives"].values(), moves, strict=True):
        entry["after"]["mean"] = entry["before"]["mean"] + move
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    config = run.parse([])[0]
    assert sweep.figures(config, "soups", [0.4, 0.6], ["even", "short"], tmp_path)["dominated"] is dominated


def test_the_same_command_keeps_finished_runs_and_prints_the_same_table(swept, world, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("*/*/*")}
    printed = []
    for _ in range(2):
        assert run.main(arguments(world, tmp_path / "copy")) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    table = [line.split() for line in printed[0].splitlines()]
    assert [line[0] for line in table if "±" in line][1:] == ["base", "firm", "firm", "mgda", "soups", "soups"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("*/*/*")}


@pytest.mark.parametrize("asked", [None, True])
def test_a_setting_that_a_sweep_did_not_know_yet_counts_as_its_default_there(swept, world, tmp_path, capsys, asked):
    shutil.copytree(swept, tmp_path / "old")
    saved = json.loads((tmp_path / "old" / "sweep.json").read_text())
    del saved["settings"]["diagnostics"]
    (tmp_path / "old" / "sweep.json").write_text(json.dumps(saved))
    if asked:
        message = refused(capsys, arguments(world, tmp_path / "old", diagnostics=True))
        assert "diagnostics False, not True" in message
    else:
        assert run.main(arguments(world, tmp_path / "old")) == 0
        assert "finished before" in capsys.readouterr().out


def test_a_stopped_sweep_goes_on_to_the_same_result(world, tmp_path, monkeypatch, capsys):
    asked = arguments(world, tmp_path / "stopped", compare=None, method="linear", rounds=2)
    real, calls = Federation.round, []

    def stopping(federation):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(federation)

    monkeypatch.setattr(Federation, "round", stopping)
    assert run.main(asked) == 130
    monkeypatch.undo()
    assert f"--out {tmp_path / 'stopped'}" in capsys.readouterr().out
    half = tmp_path / "stopped" / "linear" / "p0.40-0.60"
    assert len(metrics_without_times(half)) == 1
    assert run.main(asked) == 0
    assert "linear p0.00-1.00: finished before" in capsys.readouterr().out
    assert run.main(command(world, out=tmp_path / "whole", method="linear", preference=[0.4, 0.6])) == 0
    assert adapter_of(half) == adapter_of(tmp_path / "whole")
    assert repr(metrics_without_times(half)) == repr(metrics_without_times(tmp_path / "whole"))


def test_a_run_killed_before_its_first_checkpoint_is_begun_anew(swept, world, tmp_path):
    shutil.copytree(swept, tmp_path / "copy")
    point = tmp_path / "copy" / "firm" / "p0.40-0.60"
    shutil.rmtree(point)
    (point / "checkpoint").mkdir(parents=True)
    (point / "metrics.jsonl").write_text("")
    assert run.main(arguments(world, tmp_path / "copy")) == 0
    assert adapter_of(point) == adapter_of(swept / "firm" / "p0.40-0.60")


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"sweep": [0, 0.5]}, {"compare": ["firm"]}, {"rounds": 2}])
def test_a_sweep_of_other_settings_is_refused_and_names_the_first(swept, world, capsys, change):
    before = {p: p.stat().st_mtime_ns for p in swept.rglob("*")}
    name = {"sweep": "preferences", "compare": "methods"}.get(*change, *change)
    assert f"holds a sweep with {name} " in refused(capsys, arguments(world, swept, **change))
    assert before == {p: p.stat().st_mtime_ns for p in swept.rglob("*")}


def test_a_sweep_goes_on_only_from_what_it_began_with(world, tmp_path, capsys):
    for name in ("first", "second"):
        seed = {"seed": 7} if name == "second" else {}
        assert run.main(command(world, rounds=0, held_out=4, eval_samples=1, out=tmp_path / name, **seed)) == 0
    shutil.copy(world / "prompts.jsonl.gz", tmp_path / "own.jsonl.gz")
    adapter = tmp_path / "first" / "adapter"
    flags = {"sweep": [0.2, 0.4], "rounds": 1, "method": "linear", "adapter": adapter, "out": tmp_path / "swept"}
    asked = command(world, held_out=4, eval_samples=1, **flags | {"prompts": tmp_path / "own.jsonl.gz"})
    assert run.main(asked) == 0
    assert capsys.readouterr().out.count("gains are over the base model without --adapter") == 1
    shutil.rmtree(tmp_path / "swept" / "linear" / "p0.40-0.60")
    shutil.move(adapter, tmp_path / "kept")
    shutil.copytree(tmp_path / "second" / "adapter", adapter)
    assert f"out: the adapter changed since {tmp_path}/swept/sweep.json was made" in refused(capsys, asked)
    shutil.rmtree(adapter)
    shutil.move(tmp_path / "kept", adapter)
    rows = gzip.decompress((tmp_path / "own.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[:-1])))
    assert "out: the prompts changed since" in refused(capsys, asked)
    file = tmp_path / "swept" / "sweep.json"
    file.write_text(json.dumps({"settings": json.loads(file.read_text())["settings"]}))  # as older ones were
    assert f"the prompts changed since {tmp_path}/swept/linear/p0.20-0.80 was" in refused(capsys, asked)


def test_a_point_that_went_on_to_more_rounds_is_not_compared_with_the_others(swept, world, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "swept")
    point = tmp_path / "swept" / "firm" / "p0.40-0.60"
    assert run.main(["--resume", str(point), "--rounds", "2"]) == 0
    shutil.rmtree(tmp_path / "swept" / "firm" / "p0.00-1.00")  # nothing is trained before the refusal
    capsys.readouterr()
    assert f"{point} went on to 2 rounds, of 1 here" in refused(capsys, arguments(world, tmp_path / "swept"))
    assert not (tmp_path / "swept" / "firm" / "p0.00-1.00").exists()


def test_a_finished_sweep_needs_no_checkpoint_of_its_points(swept, world, tmp_path):
    shutil.copytree(swept, tmp_path / "swept")
    for file in (tmp_path / "swept" / "firm" / "p0.40-0.60" / "checkpoint").iterdir():
        file.write_text("damaged")
    assert run.main(arguments(world, tmp_path / "swept")) == 0


def test_a_specialist_is_not_trained_anew_from_other_inputs(swept, world, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "swept")
    shutil.rmtree(tmp_path / "swept" / "soups" / "specialist-even")
    file = tmp_path / "swept" / "sweep.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"fingerprint": saved["fingerprint"] | {"the base model": "another"}}))
    assert "out: the base model changed since" in refused(capsys, arguments(world, tmp_path / "swept"))


def test_what_no_preference_of_a_sweep_can_do_is_refused_before_the_first(world, tmp_path, capsys):
    flags = {"sweep": [0.5, 1], "method": "linear", "rounds": 1, "client_objectives": "2=short"}
    message = refused(capsys, command(world, out=tmp_path / "swept", **flags))
    assert "preference: client 2 holds only objectives of weight 0" in message
    assert not (tmp_path / "swept").exists()


def test_the_mean_lambda_is_that_of_the_rounds_that_had_one(swept, tmp_path):
    shutil.copytree(swept / "firm" / "p0.40-0.60", tmp_path / "point")
    with open(tmp_path / "point" / "metrics.jsonl", "a") as file:
        file.write('{"round": 1, "lambda/even": null, "lambda/short": 1.0}\n')
    config = run.parse(["--clients", "3"])[0]
    (first,) = metrics_without_times(swept / "firm" / "p0.40-0.60")
    found = sweep.figures(config, "firm", [0.4, 0.6], ["even", "short"], tmp_path / "point")["mean_lambda"]
    assert found == pytest.approx([first["lambda/even"], (first["lambda/short"] + 1) / 2])


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON"])
def test_an_out_that_holds_something_else_is_refused(world, capsys, tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    assert "sweep.json is damaged, or of something else" in refused(capsys, arguments(world, tmp_path))


def test_a_failing_run_is_named(world, capsys, tmp_path):
    broken = [f"py:{world}/objectives.py:even", f"py:{world}/objectives.py:broken"]
    assert run.main(arguments(world, tmp_path / "broken", objectives=broken, compare=None)) == 2
    assert "error: firm p0.00-1.00: " in capsys.readouterr().err.splitlines()[-1]


def test_three_objectives_are_swept_without_a_hypervolume(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    three = [f"py:{world}/objectives.py:even", f"py:{world}/objectives.py:short", "rule:distinct"]
    flags = {"objectives": three, "sweep": ["1:1:2", "2:1:1"], "compare": None, "method": "linear"}
    assert run.main(arguments(world, None, **flags)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("runs/sweep-paper: ") and "0.25/0.25/0.50" in printed and "hypervolume" not in printed
    assert (tmp_path / "runs" / "sweep-paper" / "linear" / "p0.25-0.25-0.50" / "summary.json").exists()


# table and picture


def row(method, mean, base, **changes) -> dict:
    return {
        "method": method, "preference": [0.3, 0.7], "mean_lambda": [0.41, 0.59], "mean": mean,
        "standard_error": [0.01, 0.02], "gain": [a - b for a, b in zip(mean, base, strict=True)], "kl": 1.234,
        "upload_bytes_per_client": 5_678_000, "dominated": False,
        "base": {"mean": base, "standard_error": [0.03, 0.04]},
    } | changes  # fmt: skip


def test_the_table_shows_every_figure_of_a_point():
    text = report.comparison([row("firm", [0.5, 0.6], [0.4, 0.7])], ["even", "short"], run.parse([])[0])
    (line,) = [line for line in text.splitlines() if line.startswith("firm")]
    wanted = "firm 0.30/0.70 0.41/0.59 +0.500 ± 0.010 +0.100 +0.600 ± 0.020 -0.100 1.23 5.68"
    assert line.split() == wanted.split()
    assert "base model" in text and "+0.400 ± 0.030" in text and "*" not in text


def test_points_dominated_by_the_base_model_are_marked():
    rows = [row("linear", [0.3, 0.7], [0.4, 0.7], dominated=True), row("firm", [0.5, 0.6], [0.4, 0.7])]
    text = report.comparison(rows, ["even", "short"], run.parse([])[0])
    assert [line.split()[0] for line in text.splitlines() if line.endswith(" *")] == ["linear"]
    assert "* dominated by the base model" in text
