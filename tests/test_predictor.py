"""The run that trains a predictor, the saved predictor, and the reward made from it."""

import json
import shutil

import pytest
import safetensors.torch
import torch

import run
from app import predictor, predictor_run
from app.files import read_lines
from settings import parse

SMALL = "--preset pluralllm-tiny --rounds 4 --eval_every 2 --context_draws 2 --local_steps 1"
OPTIONS = ["family", "faith", "order"]


def config(*more):
    return parse([*SMALL.split(), *more])[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    assert run.main([*SMALL.split(), "--out", str(out)]) == 0
    return out


# ---- the run ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    assert {file.name for file in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "checkpoint", "curves.png", "groups.png", "predictor"
    }  # fmt: skip


def test_the_summary_has_every_group_and_both_sides(finished):
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    assert len(summary["groups"]) == 14
    assert sum(figures["unseen"] for figures in summary["groups"].values()) == 6
    assert set(summary["sides"]) == {"federated", "centralised"}
    assert summary["parameters"] == 1_188_354 - 128 * (4096 - 64)


def test_a_line_a_round_and_scores_where_they_were_measured(finished):
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert ["alignment/federated" in line for line in lines] == [False, True, False, True]
    assert all(line["upload/scalars"] == 8 for line in lines)


@pytest.mark.parametrize("dies_in", [1, 3])
def test_a_killed_run_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, dies_in):
    out, do_round, calls = tmp_path / "r", predictor_run.do_round, []

    def dying(*arguments, **named):
        calls.append(1)
        if len(calls) > dies_in:
            raise KeyboardInterrupt
        return do_round(*arguments, **named)

    monkeypatch.setattr(predictor_run, "do_round", dying)
    assert run.main([*SMALL.split(), "--out", str(out)]) == 130
    monkeypatch.undo()
    assert run.main(["--resume", str(out)]) == 0
    for file in ("predictor/predictor.safetensors", "checkpoint/state.safetensors"):
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    timeless = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in read_lines(where / "metrics.jsonl")]
        for where in (out, finished)
    ]
    assert timeless[0] == timeless[1]
    summaries = [json.loads((where / "summary.json").read_text("utf-8")) for where in (out, finished)]
    for summary in summaries:
        del summary["seconds"], summary["training_seconds"]
    assert summaries[0] == summaries[1]


def test_a_run_does_not_go_on_with_other_answers(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictor_run.Training, "fingerprint", {"the answers": "another"})
    assert run.main(["--resume", str(finished)]) == 2
    assert "resume: the answers changed since" in capsys.readouterr().err


def test_more_rounds_would_need_another_decay(finished, capsys):
    assert run.main(["--resume", str(finished), "--rounds", "6"]) == 2
    assert "rounds: the learning rate's decay was planned for 4" in capsys.readouterr().err


def test_without_the_central_side_only_the_federated_one_is_trained(tmp_path):
    summary = predictor_run.train(config("--central", "False", "--out", str(tmp_path / "r")), progress=False)
    assert set(summary["sides"]) == {"federated"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train_groups paris 1", "train_groups: .* has no group 'paris'"),
        ("--train_groups north", r"no group 'north'; the nearest are north \d"),
        ("--clients_per_round 2 --train_groups east-1", "has no group 'east-1'; the nearest are east 1"),
        ("--context_questions 48", "context_questions: north 1 has 48 questions and needs 49"),
        ("--min_questions 25 --max_questions 25", "min_questions: north 1 has 48 questions and needs 50"),
        ("--opinions nowhere.jsonl", "encoder: name the model"),
        ("--opinions nowhere.jsonl --encoder x", "nowhere.jsonl: no such file"),
        ("--world toy", "opinions: name the file of survey answers"),
        ("--clients_per_round 9", "clients_per_round: 9 is more than groups, 8"),
        ("--beta 1", "beta: pluralllm does not read it; leave --beta out"),
        ("--method firm", r"context_draws: firm does not read it"),
        ("--sweep 0.1 0.9", "method: pluralllm trains no policy; leave --sweep and --compare out"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    import re

    out = tmp_path / "r"
    try:
        status = run.main([*SMALL.split(), "--out", str(out), *arguments.split()])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert re.search(message, error), error
    assert "\n" not in error
    assert not out.exists()


# ---- the saved predictor ---------------------------------------------------------------------------------------


def test_a_loaded_predictor_answers_as_the_trained_one(finished):
    saved = predictor.load(str(finished / "predictor"))
    training = predictor_run.Training(config(), progress=False)
    training.restore(finished / "checkpoint")
    data = training.survey
    context = predictor.context_of(data, "east 3", training.config.plural, 0)
    q = next(q for q in data.questions_of("east 3") if q not in context)
    x, y, _ = data.points("east 3", context)
    target_x, _, which = data.points("east 3", [q])
    expected = training.sides["federated"].model.shares(x, y, target_x, which)
    found = saved.ask("east 3", data.questions[q].text, data.questions[q].options)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(found) == pytest.approx(1, abs=1e-5)


def test_a_groups_context_is_all_that_is_kept_of_its_answers(finished):
    about = json.loads((finished / "predictor" / "predictor.json").read_text("utf-8"))
    assert {len(context) for context in about["groups"].values()} == {20}


def test_a_group_goes_by_its_name_or_its_slug(finished):
    saved = predictor.load(str(finished / "predictor"))
    assert saved.group("north-1") == saved.group("north 1") == "north 1"
    with pytest.raises(ValueError, match="no group 'nord'"):
        saved.group("nord")


def copied(finished, tmp_path, change):
    """A copy of the saved predictor whose description is changed."""
    folder = tmp_path / "p"
    shutil.copytree(finished / "predictor", folder)
    about = json.loads((folder / "predictor.json").read_text("utf-8"))
    change(about)
    (folder / "predictor.json").write_text(json.dumps(about), "utf-8")
    return str(folder)


def test_a_predictor_of_another_architecture_is_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, lambda about: about["architecture"].update(layers=4))
    with pytest.raises(ValueError, match="of another architecture"):
        predictor.load(folder)


def test_an_encoder_of_another_width_is_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, lambda about: about.update(width=384))
    with pytest.raises(ValueError, match="encoder: it embeds in 64 numbers and the predictor reads 384"):
        predictor.load(folder)


@pytest.mark.parametrize(
    "change",
    [lambda about: about.pop("encoder"), lambda about: about.update(groups=[]),
     lambda about: about["groups"].update({"north 1": []}),
     lambda about: about["groups"]["north 1"][0].pop("distribution")],
)  # fmt: skip
def test_a_damaged_description_is_refused(finished, tmp_path, change):
    with pytest.raises(ValueError, match="does not fit its description; train it anew"):
        predictor.load(copied(finished, tmp_path, change))


def test_weights_that_are_not_finite_are_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, lambda about: None)
    tensors = safetensors.torch.load_file(f"{folder}/predictor.safetensors")
    tensors["head.2.bias"][0] = torch.nan
    safetensors.torch.save_file(tensors, f"{folder}/predictor.safetensors")
    with pytest.raises(ValueError, match="weights that are not finite"):
        predictor.load(folder)


def test_weights_that_do_not_fit_are_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, lambda about: None)
    safetensors.torch.save_file({"x": torch.zeros(1)}, f"{folder}/predictor.safetensors")
    with pytest.raises(ValueError, match="does not fit its description"):
        predictor.load(folder)


def test_a_directory_without_a_predictor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none .*name the predictor/ of a pluralllm run"):
        predictor.load(str(tmp_path))


# ---- the reward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("family", 0), (" Faith .", 1), ("order", 2), ("A", 0), ("b.", 1), ("(C)", 2), ("B) faith", 1), ("B: faith", 1),
        ("", None), ("D", None), ("peace", None), ("family faith", None), ("B) order", None), ("a family", 0),
        ("I like faith", None),
    ],
)  # fmt: skip
def test_which_option_a_response_chose(response, expected):
    assert predictor.chosen(response, OPTIONS) == expected


def test_options_that_begin_alike_are_told_apart():
    assert predictor.chosen("Very important", ["Not important", "Very important"]) == 1
    assert predictor.chosen("A great deal", ["A great deal", "Not at all"]) == 0


def test_the_reward_is_the_predicted_share_of_the_chosen_option(finished):
    reward, _ = predictor.group_objective(str(finished / "predictor"), "south-1")
    question = "what matters most for schools ?"
    shares = predictor.load(str(finished / "predictor")).ask("south 1", question, OPTIONS)
    given = reward(["p"] * 3, ["faith .", "order", "nothing"], question=[question] * 3, options=[OPTIONS] * 3)
    assert given == pytest.approx([shares[1], shares[2], 0.0])


@pytest.mark.parametrize("columns", [{}, {"question": [None], "options": [OPTIONS]}])
def test_the_reward_needs_questions_with_options(finished, columns):
    reward, _ = predictor.group_objective(str(finished / "predictor"), "south-1")
    with pytest.raises(ValueError, match="a group's reward needs"):
        reward(["p"], ["faith"], **columns)


def test_an_empty_answer_chooses_nothing_and_signs_are_told_apart():
    assert predictor.chosen("", ["+", "-"]) is None
    assert predictor.chosen("-", ["+", "-"]) == 1
    assert predictor.chosen("10+", ["10", "10+"]) == 1
