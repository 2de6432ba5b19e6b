"""GSM8K: answers in common and in awkward wordings, the published solutions, the objectives."""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest

from worlds import gsm8k

TEXTS = [
    # behind the mark
    ("#### 18", 18), ("####18", 18), ("#### $18", 18), ("#### 18 dollars", 18), ("#### 1,450,000", 1450000),
    ("#### -3", -3), ("#### - 3", -3), ("#### −3", -3), ("#### -$5", -5), ("#### $-5", -5), ("#### 65%", 65),
    ("#### 18.00", 18), ("#### .5", "1/2"), ("#### 3/4", "3/4"), ("#### 1 1/2", "3/2"), ("#### **18**", 18),
    ("#### 5km", 5), ("#### 07", 7), ("#### 18\nI checked 3 times.", 18), ("#### 3\nwait, no\n#### 4", 4),
    ("#### 18 ####", 18), ("#### 18\n####", 18), ("3 eggs\n####", None), ("#### none", None), ("#### 2nd", 2),
    ("#### 3 + 4 = 7", 7), ("#### 42 = 6 * 7", 42), ("#### 18 eggs = 1.5 dozen", 18), ("#### Step 2: 42", 42),
    ("#### 10 minutes (1 hour = 60 minutes)", 10), ("#### six (6)", 6), ("#### 3:30", None), ("#### 42</s>", 42),
    ("#### 70\u202f000", 70000), ("#### 1\xa0450\xa0000", 1450000), (r"#### 9\,500", 9500), ("#### 1 200", 1200),
    ("#### 1,00,000", 100000), ("#### 3 * (16.50 + 22.50) = 117", 117), ("#### 17/8.5=2", 2),
    # in a box
    (r"\boxed{4}, \boxed{18} and \boxed{}", 18), (r"\boxed{\frac{3}{4}} of 2", "3/4"), (r"\boxed{\$1,234}", 1234),
    (r"\boxed{1{,}234}", 1234), (r"\boxed{1,\!200}", 1200), (r"\boxed{9\,500}", 9500), (r"\boxed{x = 42} for 7", 42),
    (r"The area is \boxed{25 \text{ cm}^2}.", 25),
    # behind "answer is"
    ("The answer is 7, since 3 + 4 = 7 and 4 is even", 7), ("Answer: $1,000.50", "2001/2"), ("The answer:\n42", 42),
    ("The answer is not 3. The answer is 4 of 5", 4), ("The answer isn't 5, it is 6", 6), ("the answer is...18", 18),
    ("The answer is not 41 but 42", 42), ("**Answer**: 18 (3 per day)", 18), ("answer: none of 5", 5),
    ("The answer is 16 * 2 = 32.", 32), ("The answer is 16*2=32.", 32), ("Answer: $5 x 4 = $20", 20),
    ("The answers are 3 and 4", None), ("the answer is unknown", None), ("The answer is twelve (12).", 12),
    # the last number
    ("He pays $2 for each of 9 eggs, so 18", 18), ("2 + 3 = 5", 5), ("10-3=7", 7), ("So 10-3", 3), ("(-7)", -7),
    ("It is the 2nd of 5", 5), ("use x2 and y3", None), ("1.5 million people", 1500000), ("2 MILLION", 2000000),
    ("1½ cups", "3/2"), (r"1\frac{1}{2}", "3/2"), ("-¾", "-3/4"), ("3/0", None), ("12,50", 50), ("1,2,3", 3),
    ("He owes -7.25 dollars", "-29/4"), ("£3.20 each, 4 in all", 4), ("5%-10%", 10), ("She needs 2~3 bags", 3),
    ("25 m^2", 25), ("It falls at 18 m/s^2", 18), ("He arrives at 3:30", None), ("9" * 5000, None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), TEXTS, ids=[repr(text)[:40] for text, _ in TEXTS])
def test_the_answer_of_a_text(text, value):
    assert gsm8k.answer_of(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("unit", [" ", "answer is ", "1,", "1,000,", "\\boxed{", "\\frac{1}", "1 ", "- ", "1=½"])
def test_a_long_text_is_read_at_once(unit):
    start = time.perf_counter()
    gsm8k.answer_of("answer" + unit * (16000 // len(unit)))
    assert time.perf_counter() - start < 2.0


@pytest.mark.skipif("GSM8K_TEST" not in os.environ, reason="GSM8K_TEST does not name the published test file")
def test_the_published_solutions_give_their_own_answers():
    answers = [json.loads(line)["answer"] for line in Path(os.environ["GSM8K_TEST"]).read_text("utf-8").splitlines()]
    references = [Fraction(answer.split("#### ")[1].replace(",", "")) for answer in answers]
    assert len(answers) == 1319 and [gsm8k.answer_of(answer) for answer in answers] == references


def test_accuracy_compares_numbers_and_not_their_spelling():
    answers = ["3 + 4 = <<3+4=7>>7\n#### 7", "She has -1,200.\n#### -1,200", "#### 7", "#### seven"]
    assert gsm8k.accuracy([""] * 4, ["so 7.0", "#### −$1200", "so 8", "seven"], answers) == [1.0, 1.0, 0.0, 0.0]


def test_format_is_some_reasoning_and_then_the_marked_number():
    right, wrong = ["3 + 4 = 7\n#### 7", "so\n#### 7 pens"], ["#### 7", "so 7", "#### 7\nso", "so\n#### x", ""]
    assert gsm8k.format([""] * 7, right + wrong) == [1.0] * 2 + [0.0] * 5


def test_length_falls_with_words_to_zero():
    assert gsm8k.length([""] * 3, ["", "w " * 75, "w " * 400]) == [1.0, 0.5, 0.0]
