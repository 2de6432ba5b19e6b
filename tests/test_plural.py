"""The survey world as a run, and how its policies are judged by what groups truly think."""

import shutil

import pytest
import torch

pytest.importorskip("scipy", reason="the evidence needs requirements-dev.txt")

import pluralllm
import run
from app import predictor_run
from app.session import Session
from evidence import plural
from settings import PRESETS, Config, parse
from worlds import survey


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Objectives of a predictor that has trained for two rounds."""
    out = tmp_path_factory.mktemp("predictor") / "r"
    small = "--preset pluralllm-tiny --rounds 2 --central False --context_draws 1 --local_steps 1 --eval_every 2"
    predictor_run.train(parse([*small.split(), "--out", str(out)])[0], progress=False)
    return [f"group:{out / 'predictor'}:{name}" for name in plural.GROUPS]


def settings(specs, **changes):
    small = {"objectives": specs, "rounds": 2, "batch_size": 16, "held_out": 32, "eval_samples": 1, "show": 0}
    return Config.from_flat(PRESETS["plural-firm-tiny"] | small | changes)


@pytest.mark.parametrize("changes", [{}, {"advantages": "group"}, {"method": "adaptive"}, {"method": "minimum"}])
def test_a_policy_trains_on_what_groups_prefer(specs, tmp_path, changes):
    summary = run.train(settings(specs, out=str(tmp_path / "r"), **changes), progress=False)
    assert list(summary["objectives"]) == ["north-1", "south-1", "east-1", "west-1"]
    assert all(0 < figures["after"]["mean"] < 1 for figures in summary["objectives"].values())


def test_the_truth_is_the_expected_share_and_the_distance_under_the_policys_own_probabilities(specs):
    session = Session(settings(specs), progress=False)
    found, prompt = plural.truth(session, 0), session.held_out[0]
    session.held_out = [prompt]
    one, options = plural.truth(session, 0), prompt.columns["options"]
    ids = session.policy.tokenizer(prompt.rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pi = session.policy.model(ids).logits[0, -1].double().softmax(0)
    pi = torch.stack([pi[session.policy.tokenizer.vocab[option]] for option in options])
    true = survey.Opinions.drawn(0).shares("south 1", survey.issue_of(prompt.columns["question"]), options)
    assert one["share_south-1"] == pytest.approx(float(pi @ torch.tensor(true)))
    apart = pluralllm.distances(pi / pi.sum(), torch.tensor(true), torch.zeros(len(options), dtype=torch.long))
    assert one["alignment_south-1"] == pytest.approx(1 - float(apart))
    assert found["answered"] > 0.9
    assert found["worst_share"] == min(found[f"share_{group}"] for group in plural.GROUPS)


def test_the_worlds_own_predictor_comes_from_the_cache_the_second_time(tmp_path, monkeypatch):
    world = survey.prepare(0, progress=False).model.parent  # is in the cache, and takes its time
    shutil.copytree(world, tmp_path / "firm-toy" / world.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = PRESETS["pluralllm-tiny"] | {"rounds": 1, "local_steps": 1}
    monkeypatch.setitem(predictor_run.PRESETS, "pluralllm-tiny", tiny)
    (spec,) = predictor_run.of_the_world(["x=group:survey:north-1"], 0, progress=False)
    assert spec.startswith("x=group:/")
    assert spec.endswith("/predictor:north-1")
    monkeypatch.setattr(predictor_run, "train", None)
    assert predictor_run.of_the_world(["x=group:survey:north-1"], 0, progress=False) == [spec]
    assert predictor_run.of_the_world(["rule:length"], 0) == ["rule:length"]


def test_a_group_that_the_survey_world_lacks_is_found_before_its_predictor_is_trained(monkeypatch):
    monkeypatch.setattr(predictor_run, "train", None)
    with pytest.raises(ValueError, match="objectives: the survey world has no group 'nord-1'; the nearest are north"):
        predictor_run.of_the_world(["group:survey:nord-1"], 0)


def test_convergence_is_counted_in_rounds_against_the_better_side():
    rows = [{"a_start": 0.5, "b_start": 0.5, **{f"{s}@{2 * i}": v for s in "ab" for i, v in enumerate(c[s], 1)}}
            for c in [{"a": [0.5, 0.9, 0.9, 0.9, 0.9], "b": [0.5, 0.5, 0.6, 0.7, 0.7]}]]  # fmt: skip
    assert plural.curves_of(rows, "a") == [([2, 4, 6, 8, 10], [0.5, 0.9, 0.9, 0.9, 0.9])]
    assert plural.mean_curve(rows * 2, "b") == ([10], [0.7], [0.0])  # every fifth
