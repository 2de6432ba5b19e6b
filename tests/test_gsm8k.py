"""GSM8K: awkward answers, the files' own format, the objectives."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from data import load_prompts
from worlds import gsm8k

AWKWARD = [
    ("#### 18", 18), ("####18", 18), ("#### $18", 18), ("#### 18 dollars", 18), ("#### 1,450,000", 1450000),
    ("#### -3", -3), ("#### - 3", -3), ("#### −3", -3), ("#### -$5", -5), ("#### $-5", -5), ("#### 65%", 65),
    ("#### 18.00", 18), ("#### 0.5", "1/2"), ("#### .5", "1/2"), ("#### 3/4", "3/4"), ("#### 1 1/2", "3/2"),
    ("#### 18.", 18), ("#### **18**", 18), ("#### 5km", 5), ("#### 07", 7), ("#### 18\nI checked 3 times.", 18),
    ("#### 3\nwait, no\n#### 4", 4), ("#### none", None), ("####", None), ("", None), ("I do not know.", None),
    ("He pays $2 for each of 9 eggs, so 18", 18), ("2 + 3 = 5", 5), ("10-3=7", 7), ("So 10-3", 3),
    ("The answer is 7, since 3 + 4 = 7 and 4 is even", 7), ("The answer is: 42.", 42), ("Answer: $1,000.50", "2001/2"),
    ("The answer is not 3. The answer is 4 of 5", 4), (r"Thus \boxed{18}", 18), (r"\boxed{\frac{3}{4}} of 2", "3/4"),
    (r"\boxed{\$1,234}", 1234), ("It is the 2nd of 5", 5), ("He came 2nd", None), ("use x2 and y3", None),
    ("1.5 million people", 1500000), ("2 thousand", 2000), ("1½ cups", "3/2"), ("about ¾", "3/4"), ("3/0", None),
    ("€20 (twenty)", 20), ("It costs 12,50", 50), ("between 3-4", 4), ("-7", -7), ("(-7)", -7),
    ("He owes -7.25 dollars", "-29/4"), ("1,2,3", 3), ("70 000", 0),
    ("#### 18 ####", 18), ("#### 18\n####", 18), ("3 eggs\n####", None), ("#### 18th of May 20", 20), ("12th", None),
    ("the 100th of 7", 7), ("#### __18__", 18), (r"-\frac{3}{4}", "-3/4"), ("-¾", "-3/4"), ("the answer is...18", 18),
    ("#### 3 + 4 = 7", 7), ("#### 12 * 5 = 60", 60), (r"\boxed{1{,}234}", 1234), ("**Answer**: 18 (3 per day)", 18),
    ("5%-10%", 10), ("#### USD18", 18), ("Rs.18", 18), ("The answer isn't 5, it is 6", 6), ("9" * 5000, None),
    (r"\boxed{3} and not \boxed{4}", 4), ("2 MILLION", 2000000), (r"1\frac{1}{2}", "3/2"),
    ("answer: none of 5", 5), ("the answer is unknown", None), ("£3.20 each, 4 in all", 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), AWKWARD, ids=[repr(text)[:40] for text, _ in AWKWARD])
def test_the_answer_of_an_awkward_text(text, value):
    assert gsm8k.answer_of(text) == (None if value is None else Fraction(value))


ROWS = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "She owes 1,000 and 200 more.", "answer": "She has -1,200.\n#### -1,200"},
]


class Words:
    """A tokenizer without a chat template: a word, a token."""

    chat_template, eos_token_id = None, 0

    def __call__(self, texts, **settings):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def prompts_of(tmp_path, rows, **settings):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_prompts([str(file)], Words(), **settings)[0]


def test_a_row_becomes_the_question_in_the_template_and_keeps_its_answer(tmp_path):
    prompt = prompts_of(tmp_path, ROWS, template="Q: {question} {now}")[0]
    assert prompt.text == "\n\nHuman: Q: Ann has 3 pens and buys 4. How many? {now}\n\nAssistant:"
    assert prompt.columns == {"answer": ROWS[0]["answer"]} and (prompt.subset, prompt.task) == ("gsm8k", "all")


@pytest.mark.parametrize(
    ("row", "message"),
    [({"question": "How many?", "answer": "7"}, "gsm8k.jsonl:2: no #### and number in 'answer'"),
     ({"question": "How many?", "answer": "Five.\n#### five"}, "gsm8k.jsonl:2: no #### and number in 'answer'"),
     ({"question": "How many?"}, "gsm8k.jsonl:2: no text in 'question' or 'answer'")],
)  # fmt: skip
def test_a_row_without_a_reference_is_refused_by_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(tmp_path, [ROWS[0], row])


def test_accuracy_compares_numbers_and_not_their_spelling():
    answers = [row["answer"] for row in ROWS]
    assert gsm8k.accuracy(["", ""], ["so 7.0", "#### −$1200"], answers) == [1.0, 1.0]
    assert gsm8k.accuracy(["", ""], ["so 8", "1200"], answers) == [0.0, 0.0]


def test_a_response_without_a_number_is_wrong_and_nothing_breaks():
    assert gsm8k.accuracy([""], ["I do not know"], [ROWS[0]["answer"]]) == [0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7", 1),
        ("#### 7", 0),
        ("so 7", 0),
        ("so\n#### 7 pens", 1),
        ("so\n#### 1st", 0),
        ("#### 7\nso", 0),
        ("so\n#### x", 0),
        ("", 0),
    ],
)
def test_format_is_some_reasoning_and_then_the_marked_number(text, value):
    assert gsm8k.format([""], [text]) == [float(value)]


def test_length_falls_with_words_to_zero():
    assert gsm8k.length(["", "", ""], ["", "w " * 75, "w " * 400]) == [1.0, 0.5, 0.0]


def test_a_reference_without_a_number_is_refused_and_not_equal_to_no_answer():
    with pytest.raises(ValueError, match="no number in the reference answer 'x ####'"):
        gsm8k.accuracy(["", ""], ["", ""], ["#### 3", "x ####"])


GSM8K = os.environ.get("GSM8K_TEST")  # the published test file


@pytest.mark.skipif(not GSM8K, reason="GSM8K_TEST names no file")
def test_the_published_solutions_give_their_own_answers():
    rows = [json.loads(line) for line in Path(GSM8K).read_text("utf-8").splitlines()]
    references = [Fraction(row["answer"].split("#### ")[1].replace(",", "")) for row in rows]
    assert len(rows) == 1319 and [gsm8k.answer_of(row["answer"]) for row in rows] == references
