"""Survey answers as files, and texts as embeddings."""

import csv
import gzip
import json

import pytest
import torch

from pluralllm import Question
from worlds import opinions, survey

ROW = {"question": "is it so ?", "group": "Nigeria", "options": ["yes", "no"], "distribution": [0.25, 0.75]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def upstream(**changes):
    """A row as GlobalOpinionQA's CSV holds it."""
    row = {
        "question": "is it so ?",
        "selections": "defaultdict(<class 'list'>, {'Nigeria': [0.25, 0.75], 'Egypt': [0.5, 0.5], 'Japan': [0, 0]})",
        "options": "['yes', 'no']",
        "source": "WVS",
    }
    return row | changes


# ---- reading ---------------------------------------------------------------------------------------------------


def test_a_row_is_one_groups_answer(tmp_path):
    questions, answers = opinions.read(write(tmp_path / "a.jsonl", ROW, ROW | {"country": "Egypt", "group": None}))
    assert questions == [Question("is it so ?", ("yes", "no"))]
    assert {group: own[0].tolist() for group, own in answers.items()} == {
        "Nigeria": [0.25, 0.75],
        "Egypt": [0.25, 0.75],
    }


def test_a_file_may_be_gzipped(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW))
    assert list(opinions.read(str(tmp_path / "a.jsonl.gz"))[1]) == ["Nigeria"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_upstreams_rows_hold_the_answers_of_many_groups(tmp_path, form):
    file = str(tmp_path / f"a.{form}")
    if form == "csv":
        with open(file, "w", newline="") as lines:
            writer = csv.DictWriter(lines, list(upstream()))
            writer.writeheader()
            writer.writerow(upstream())
    else:
        write(tmp_path / "a.jsonl", upstream(selections={"Nigeria": [0.25, 0.75], "Egypt": [0.5, 0.5], "Japan": []}))
    questions, answers = opinions.read(file)
    assert questions == [Question("is it so ?", ("yes", "no"))]
    assert {group: own[0].tolist() for group, own in answers.items()} == {"Nigeria": [0.25, 0.75], "Egypt": [0.5, 0.5]}


def test_options_may_hold_braces_and_a_csv_a_mark_of_its_order(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as lines:
        writer = csv.DictWriter(lines, list(upstream()))
        writer.writeheader()
        writer.writerow(upstream(options="['{yes}', 'no']"))
    questions, answers = opinions.read(str(tmp_path / "a.csv"))
    assert questions[0].options == ("{yes}", "no")
    assert list(answers) == ["Nigeria", "Egypt"]


def test_questions_of_one_text_and_other_options_are_two(tmp_path):
    other = ROW | {"options": ["yes", "no", "maybe"], "distribution": [0.2, 0.3, 0.5]}
    questions, answers = opinions.read(write(tmp_path / "a.jsonl", ROW, other))
    assert len(questions) == 2
    assert list(answers["Nigeria"]) == [0, 1]


def test_a_sum_within_two_per_cent_is_normalised(tmp_path):
    _, answers = opinions.read(write(tmp_path / "a.jsonl", ROW | {"distribution": [0.255, 0.76]}))
    assert float(answers["Nigeria"][0].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution": [-0.1, 1.1]}, r"a.jsonl:1: Nigeria's distribution has negative or missing shares"),
        ({"distribution": [float("nan"), 1.0]}, "negative or missing"),
        ({"distribution": [0.5, 0.47]}, "sums to 0.97, not to 1"),
        ({"distribution": [0.5, 0.3, 0.2]}, "one share for each of the 2 options"),
        ({"distribution": ["most", "few"]}, "no number"),
        ({"distribution": None}, "one share for each"),
        ({"options": ["yes"], "distribution": [1.0]}, "two options at least"),
        ({"options": "yes or no"}, "'options' is no list"),
        ({"options": ["yes", "yes"]}, "'options' lists one twice"),
        ({"distribution": [10**400, 0]}, "no number"),
        ({"selections": [0.5, 0.5]}, "'selections' must map"),
        ({"selections": None}, "'selections' must map"),
        ({"selections": {"Egypt": 3}}, "'selections' must map"),
        ({"question": ""}, "no text in 'question'"),
        ({"group": None}, "no text in 'group' or 'country'"),
    ],
)
def test_a_bad_row_gets_one_line_with_its_place(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        opinions.read(write(tmp_path / "a.jsonl", ROW | changes))
    assert "\n" not in str(caught.value)
    assert "a.jsonl:1" in str(caught.value)


def test_a_second_answer_to_a_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl:2: Nigeria answers this question a second time"):
        opinions.read(write(tmp_path / "a.jsonl", ROW, ROW))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no answer"):
        opinions.read(write(tmp_path / "a.jsonl"))


def test_an_unknown_group_gets_the_nearest_names():
    known = ["India (Current national sample)", "Indonesia", "France"]
    with pytest.raises(ValueError, match=r"train_groups: f.jsonl has no group 'India'; the nearest are .*Indonesia"):
        opinions.check_groups("train_groups", ["India"], known, "f.jsonl")


def test_a_group_named_twice_is_refused():
    with pytest.raises(ValueError, match="unseen_groups: France is named twice"):
        opinions.check_groups("unseen_groups", ["France", "France"], ["France"], "f.jsonl")


# ---- embeddings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return opinions.Encoder(str(survey.prepare(progress=False).model))


def test_an_embedding_is_the_mean_of_the_last_hidden_states(encoder):
    text = "what matters most for schools ? family"
    ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = encoder.model(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder([text])[0], expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch(encoder):
    texts = ["family", "what matters most for schools ? faith", "what matters most for roads ? order"]
    alone = torch.cat([encoder([text]) for text in texts])
    torch.testing.assert_close(encoder(texts, batch_size=2), alone, rtol=1e-4, atol=1e-5)


def test_a_text_beyond_the_context_is_cut(encoder):
    long = "family " * 500 + "faith"
    kept = encoder.tokenizer(long)["input_ids"][-encoder.max_length :]
    with torch.no_grad():
        expected = encoder.model(torch.tensor([kept])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder([long])[0], expected, rtol=1e-3, atol=1e-4)  # the option stands at the end


def test_embeddings_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    model, asked = str(survey.prepare(progress=False).model), [Question("q ?", ("family", "faith"))]
    first = opinions.embedded(asked, model, progress=False, cache_dir=tmp_path)
    monkeypatch.setattr(opinions, "Encoder", None)
    assert torch.equal(opinions.embedded(asked, model, progress=False, cache_dir=tmp_path), first)
    with pytest.raises(TypeError):  # other texts are computed
        opinions.embedded([Question("q ?", ("family", "peace"))], model, progress=False, cache_dir=tmp_path)


def test_an_encoder_that_is_none_gets_one_line(tmp_path):
    with pytest.raises(ValueError, match="encoder: .* cannot be loaded") as caught:
        opinions.Encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_survey_keeps_what_its_groups_were_asked():
    questions = [Question(f"q{i} ?", ("family", "faith")) for i in range(3)]
    half = torch.tensor([0.5, 0.5])
    answers = {"a": {0: half}, "b": {2: half}, "c": {1: half}}
    found = opinions.survey_of(
        questions, answers, ["b", "a"], str(survey.prepare(progress=False).model), progress=False
    )
    assert [q.text for q in found.questions] == ["q0 ?", "q2 ?"]
    assert {group: list(own) for group, own in found.answers.items()} == {"b": [1], "a": [0]}
    assert len(found.embeddings) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("United States", "united-states"), ("India (Current national sample)", "india-current-national-sample"),
     ("north 1", "north-1")],
)  # fmt: skip
def test_a_groups_slug(name, expected):
    assert opinions.slug(name) == expected
