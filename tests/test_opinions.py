"""Survey rows as questions and shares, and which option a text names."""

import math

import pytest

from pluralllm import Question
from worlds import opinions

ROW = {"question": "is it so ?", "group": "Nigeria", "options": ["yes", "no"], "distribution": [0.25, 0.75]}
WORDS = ["family", "faith", "order"]
SELECTIONS = {"Nigeria": [0.25, 0.75], "Egypt": [0.5, 0.5], "Japan": [0, 0], "Spain": []}


def read(*rows):
    questions, answers = opinions.read([(f"a.jsonl:{i}", row) for i, row in enumerate(rows, 1)])
    return questions, {group: {q: y.tolist() for q, y in asked.items()} for group, asked in answers.items()}


def test_a_row_is_one_groups_answer():
    questions, answers = read(ROW, {k: v for k, v in ROW.items() if k != "group"} | {"country": "Egypt"})
    assert questions == [Question("is it so ?", ("yes", "no"))]
    assert answers == {"Nigeria": {0: [0.25, 0.75]}, "Egypt": {0: [0.25, 0.75]}}


@pytest.mark.parametrize("selections", [SELECTIONS, f"defaultdict(<class 'list'>, {SELECTIONS})", str(SELECTIONS)])
def test_upstreams_rows_hold_the_answers_of_all_groups_that_were_asked(selections):
    questions, answers = read({"question": "is it so ?", "selections": selections, "options": "['{yes}', 'no']"})
    assert questions == [Question("is it so ?", ("{yes}", "no"))]
    assert answers == {"Nigeria": {0: [0.25, 0.75]}, "Egypt": {0: [0.5, 0.5]}}


def test_questions_with_one_text_and_other_options_are_two():
    questions, answers = read(ROW, ROW | {"options": ["yes", "no", "maybe"], "distribution": [0.25, 0.25, 0.5]})
    assert len(questions) == 2
    assert answers == {"Nigeria": {0: [0.25, 0.75], 1: [0.25, 0.25, 0.5]}}


def test_a_sum_within_two_per_cent_is_normalised():
    assert read(ROW | {"distribution": [0.255, 0.76]})[1]["Nigeria"][0] == pytest.approx([0.255 / 1.015, 0.76 / 1.015])


@pytest.mark.parametrize(
    "changes",
    [
        {"distribution": [-0.1, 1.1]}, {"distribution": [math.nan, 1.0]}, {"distribution": [0.5, 0.47]},
        {"distribution": [0.5, 0.3, 0.2]}, {"options": ["yes"], "distribution": [1.0]}, {"options": ["yes", "yes"]},
    ],
)  # fmt: skip
def test_shares_that_do_not_fit_the_options_are_refused_with_their_place(changes):
    with pytest.raises(ValueError, match="a.jsonl:2: .*drop the row"):
        read(ROW | {"group": "Egypt"}, ROW | changes)


def test_a_second_answer_to_a_question_is_refused():
    with pytest.raises(ValueError, match="a.jsonl:2: .*Nigeria answers this question a second time"):
        read(ROW, ROW)


def test_the_questions_of_some_groups_are_numbered_from_zero():
    rows = [ROW | {"group": group, "question": f"q{i} ?"} for i, group in enumerate("abc")]
    questions, answers = opinions.of_groups(*opinions.read([("", row) for row in rows]), ["c", "a"], 1)
    assert [question.text for question in questions] == ["q0 ?", "q2 ?"]
    assert {group: list(asked) for group, asked in answers.items()} == {"c": [1], "a": [0]}


@pytest.mark.parametrize(("groups", "needed"), [(["France"], 1), (["Nigeria", "Nigeria"], 1), (["Nigeria"], 2)])
def test_groups_that_are_unknown_or_named_twice_or_answered_too_little_are_refused(groups, needed):
    with pytest.raises(ValueError, match=f"groups: .*{groups[0]}"):
        opinions.of_groups(*opinions.read([("", ROW)]), groups, needed)


@pytest.mark.parametrize(
    ("response", "options", "position"),
    [
        *((text, WORDS, 0) for text in ("family", " Family .", "A", "(a)", "“family.”")),
        *((text, WORDS, 1) for text in ("b.", "B) faith", "B: faith", "(B) 'faith'.")),
        *((text, WORDS, None) for text in ("", "D", "peace", "family faith", "B) order")),
        ("1.", ["-2", "-1", "0", "1", "2"], 3), ("> 18.", ["< 18", "> 18"], 1), ('"18+"', ["18", "18+"], 1),
        ("5%.", ["$5", "5%"], 1), ("-", ["+", "-"], 1), ("काम", ["कम", "काम"], 1), ("", [".", "-"], None),
        ("cafe\u0301", ["cafe", "caf\u00e9"], 1), ("Yes", ["yes", "yes."], None), ("yes.", ["yes", "yes."], 1),
        ("(B)", ["F", "C", "B"], None), ("(B)", ["A", "B", "C"], 1),
    ],
)  # fmt: skip
def test_a_response_chooses_one_option_by_its_text_or_its_letter_or_none(response, options, position):
    assert opinions.chosen(response, options) == position
