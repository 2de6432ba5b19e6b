"""The run that trains a predictor, the saved predictor, and the reward made from it."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import pluralllm
from app import checkpoint, predictor
from app.files import read_lines
from app.ranks import packed, unpacked
from pluralllm import Question
from settings import Config
from worlds import survey

OPTIONS = ["family", "faith", "order"]
ASKED = "what matters most for schools ?"


def config(out, **changes):
    small = {"model": "survey", "rounds": 4, "eval_every": 2, "local_steps": 1, "questions": [5, 20], "device": "cpu"}
    return Config(method="pluralllm", preset="pluralllm-tiny", lr=1e-3, out=str(out), **small | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pluralllm, "alignment", partial(pluralllm.alignment, draws=2))  # faster
        out = tmp_path_factory.mktemp("run") / "r"
        predictor.train(config(out), progress=False)
        yield out


def test_a_run_has_scores_of_both_sides_on_every_group(finished):
    lines, summary = read_lines(finished / "metrics.jsonl"), json.loads((finished / "summary.json").read_text("utf-8"))
    assert [line["round"] for line in lines if "alignment/federated" in line] == [1, 3]
    unseen = [figures["centralised"] for figures in summary["groups"].values() if figures["unseen"]]
    assert (len(lines), len(summary["groups"]), len(unseen)) == (4, 14, 6)
    assert lines[-1]["alignment/centralised"] == pytest.approx(sum(unseen) / 6)


@pytest.mark.parametrize("dies_in", [0, 3])
def test_a_killed_run_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, dies_in):
    out, do_round = tmp_path / "r", predictor.do_round
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        left = iter(range(dies_in))
        patch.setattr(predictor, "do_round", lambda sides: next(left) + 1 and do_round(sides))
        predictor.train(config(out), progress=False)
    if dies_in:
        with pytest.raises(ValueError, match="rounds, over which the rate decays, changed"):
            predictor.train(config(out, rounds=6), out, progress=False)
    predictor.train(config(out), out, progress=False)
    ended, expected = (load_file(run / "predictor/predictor.safetensors") for run in (out, finished))
    assert ended.keys() == expected.keys() and all(torch.equal(ended[name], expected[name]) for name in ended)
    ended, expected = (unpacked((run / checkpoint.FILE).read_bytes()[32:]) for run in (out, finished))
    assert all(packed(ended[side]) == packed(expected[side]) for side in ("federated", "centralised"))
    for file in ("metrics.jsonl", "summary.json"):
        timed = r'"(training_seconds": \{[^}]*|seconds[^,}]*)'
        assert re.sub(timed, "", (out / file).read_text("utf-8")) == re.sub(
            timed, "", (finished / file).read_text("utf-8")
        )


def test_an_embedding_is_the_mean_of_the_last_hidden_states_in_any_batch():
    encoder = predictor.Encoder(*predictor.pretrained("AutoModel", str(survey.prepare().model), new_head=True))
    questions = [Question(ASKED, ("family", "faith")), Question("family " * 500, ("faith",))]
    embeddings = encoder(questions, batch_size=2)
    for text, x in zip((f"{ASKED} family", f"{ASKED} faith", "family " * 500 + " faith"), embeddings, strict=True):
        ids = encoder.tokenizer(text)["input_ids"][-encoder.max_length :]  # the option stands at the end
        with torch.no_grad():
            expected = encoder.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)


def test_embeddings_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    encoder, questions = str(survey.prepare().encoder), [Question(ASKED, ("family", "faith"))]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = predictor.embedded(questions, encoder)
    monkeypatch.setattr(predictor, "Encoder", None)
    assert torch.equal(predictor.embedded(questions, encoder), x)
    with pytest.raises(TypeError):  # other texts are not in it
        predictor.embedded([Question(ASKED, ("family", "peace"))], encoder)


def test_a_loaded_predictor_answers_from_the_groups_context(finished):
    saved = predictor.load(str(finished / "predictor"))
    rows = json.loads((finished / "predictor" / "predictor.json").read_text("utf-8"))["groups"]["north 1"]
    assert len(rows) == 20
    x = saved.encoder([Question(row["question"], tuple(row["options"])) for row in rows])
    y = torch.tensor([share for row in rows for share in row["distribution"]])
    with torch.no_grad():
        expected = saved.model(x, y, saved.encoder([Question(ASKED, tuple(OPTIONS))]))[0].softmax(0)
    assert saved.ask("north-1", ASKED, OPTIONS) == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="group: the predictor does not know 'nord'"):
        saved.reward("nord")


def test_the_reward_is_the_predicted_share_of_the_chosen_option(finished):
    reward, _ = predictor.group_objective(f"{finished / 'predictor'}:south-1", "cpu", "float32")
    shares = predictor.load(str(finished / "predictor")).ask("south 1", ASKED, OPTIONS)
    given = reward(completions=["faith .", "(C)", "nothing"], question=[ASKED] * 3, options=[OPTIONS] * 3, prompts=[])
    assert given == [shares[1], shares[2], 0.0]
    for columns in ({}, {"question": [None], "options": [OPTIONS]}, {"question": [ASKED], "options": [None]}):
        with pytest.raises(ValueError, match="needs a question and its options"):
            reward(completions=["faith"], **columns)


def test_the_worlds_own_predictor_is_trained_once(tmp_path, monkeypatch):
    files = survey.prepare()
    monkeypatch.setattr(survey, "prepare", lambda *_, **__: files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(predictor.PRESETS, "pluralllm-tiny", {"model": "survey", "rounds": 1, "local_steps": 1})
    (spec,) = predictor.of_the_world(["x=group:survey:north-1"], 0, progress=False)
    assert re.fullmatch(rf"x=group:{tmp_path}/firm-toy/\w+/run/predictor:north-1", spec)
    monkeypatch.setattr(predictor, "train", None)
    assert predictor.of_the_world(["x=group:survey:north-1", "rule:length"], 0) == [spec, "rule:length"]
