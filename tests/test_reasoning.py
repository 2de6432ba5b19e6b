"""The reasoning world: programs, answers, what is held out, whose references are wrong."""

import random
from collections import Counter

import pytest
import torch

from worlds import reasoning, tiny_llama

MATHS, CODE = "\n\nHuman: what is 3 + 4 - 2 ?\n\nAssistant:", "\n\nHuman: make 14 from 3 4 2 .\n\nAssistant:"


@pytest.mark.parametrize(
    ("program", "value"),
    [("3 4 mul 2 add", 14), ("2 3 4 mul add", 14), ("3 4 sub", -1), ("4 3 sub", 1), ("3", 3), ("3 4", None), ("", None),
     ("3 add", None), ("add", None), ("3 3 add", None), ("5 4 add", None), ("3 4 pow", None), ("3 4 add add", None),
     ("-3", None), ("3 __import__", None), ("² 3 add", None)],
)  # fmt: skip
def test_what_a_program_leaves(program, value):
    assert reasoning.execute(program.split(), [3, 4, 2]) == value


def test_values_programs_and_sums_are_pythons_on_random_problems():
    rng, signs = random.Random(0), {"add": "+", "sub": "-", "mul": "*", "+": "+", "-": "-"}
    for _ in range(600):
        task = rng.choice(reasoning.TASKS)
        drawn = reasoning.problem(rng, task, rng.choice((2, 3)), held_out=False)
        text = str(drawn.numbers[0])
        for word, number in zip(drawn.operations, drawn.numbers[1:], strict=True):
            text = f"({text} {signs[word]} {number})"
        assert eval(text) == drawn.values[-1]
        reply = drawn.reply(len(drawn.operations))
        prompt = f"\n\nHuman: {drawn.question}\n\nAssistant:"
        assert reasoning.accuracy([prompt], [reply], [str(eval(text))]) == reasoning.format([prompt], [reply]) == [1.0]


@pytest.mark.parametrize(
    ("prompt", "reply", "accurate", "well_made"),
    [(MATHS, "7 , 5 so 5 .", 1, 1), (MATHS, "so 5 .", 1, 0), (MATHS, "7 , 6 so 6 .", 0, 1),
     (MATHS, "7 , 6 so 5 .", 1, 0), (MATHS, "7 , 5 so 5", 0, 0), (MATHS, "5", 0, 0), (MATHS, "", 0, 0),
     (MATHS, "7 so 7 .", 0, 1), (MATHS, "7 5 so 5 .", 0, 0), (CODE, "3 4 mul 2 add .", 1, 1),
     (CODE, "3 4 mul 2 add", 0, 0), (CODE, "3 4 add .", 0, 1), (CODE, "2 3 4 mul add .", 1, 1), (CODE, "14 .", 0, 0),
     (CODE, "3 .", 0, 0), (CODE, "3", 0, 0), (CODE, "3 4 mul 1 add 1 add .", 0, 0), (CODE, ".", 0, 0)],
)  # fmt: skip
def test_accuracy_and_format_of_a_reply(prompt, reply, accurate, well_made):
    answer = ["5" if prompt == MATHS else "14"]
    assert reasoning.accuracy([prompt], [reply], answer) == [float(accurate)]
    assert reasoning.format([prompt], [reply]) == [float(well_made)]


def test_length_falls_from_one_to_zero():
    assert reasoning.length([""] * 3, ["", "so 5 .", "7 " * 30]) == pytest.approx([1.0, 8 / 11, 0.0])


def test_a_prompt_from_elsewhere_is_refused_by_name():
    with pytest.raises(ValueError, match="write a poem"):
        reasoning.format(["\n\nHuman: write a poem .\n\nAssistant:"], ["so 5 ."])


def question_of(row: dict) -> str:
    return row["chosen"].split("Human: ")[1].split("\n\n")[0]


def numbers_of(question: str) -> tuple:
    return tuple(sorted(reasoning.asked(f"Human: {question}\n\nAssistant:")[1]))


def test_no_program_is_asked_for_a_number_that_is_given():
    questions = [question_of(row).split() for row in reasoning.rows(0.0) if row["task"] == "code"]
    assert all(words[1] not in words[3:] for words in questions)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_trained_on_numbers_that_are_held_out_in_any_order(seed):
    rows = list(reasoning.rows(0.0, seed))
    held_out = {numbers_of(question_of(row)) for row in rows if "client" not in row}
    owned = {numbers_of(question_of(row)) for row in rows if "client" in row}
    trained = {numbers_of(question) for question, _ in reasoning.corpus(0, 20000)}
    assert held_out and not held_out & (owned | trained)


def test_eight_clients_differ_by_task_difficulty_and_data_and_no_question_is_asked_twice():
    rows = list(reasoning.rows(0.5))
    counts = Counter((row.get("client"), row["task"], row["subset"]) for row in rows)
    expected = {(c, task, f"{task}, {how}"): 192 for c, (task, how, _) in enumerate(reasoning.CLIENTS)}
    expected |= {(None, task, f"{task}, {how}"): 32 for task, how in reasoning.SIZES}
    assert counts == expected
    assert len({question_of(row) for row in rows}) == len(rows)


def wrong(severity: float) -> Counter:
    """How many of each client's references are not what the question comes to."""
    counts = Counter()
    for row in reasoning.rows(severity):
        words = question_of(row).split()
        right = int(words[1]) if row["task"] == "code" else eval(" ".join(words[2:-1]))
        counts[row.get("client")] += int(row["answer"]) != right
    return +counts


def test_only_poor_clients_have_wrong_references_and_as_many_as_the_severity_says():
    poor = {c for c, (_, _, data) in enumerate(reasoning.CLIENTS) if data == "poor"}
    half, most = wrong(0.5), wrong(1.0)
    assert not wrong(0.0) and set(half) == set(most) == poor
    assert all(70 < half[c] < 122 and most[c] > 165 for c in poor)  # of 192; by chance a wrong one may be right


def test_a_wrong_reference_is_the_value_one_operation_before_the_end():
    for row in reasoning.rows(1.0):
        if row.get("client") == 1:
            assert int(row["answer"]) == eval(" ".join(question_of(row).split()[2:-3]))


def test_the_questions_do_not_depend_on_the_severity_and_do_on_the_seed():
    one, two, other = ([question_of(row) for row in reasoning.rows(s, seed)] for s, seed in ((0, 0), (0.7, 0), (0, 1)))
    assert one == two != other


def test_the_corpus_is_known_to_the_tokenizer_fits_and_makes_each_slip_as_often_as_stated():
    tokenizer, kinds = tiny_llama.make_tokenizer(reasoning.VOCABULARY), Counter()
    for question, reply in reasoning.corpus(2, 8000):
        ids = tokenizer(f"{question} {reply} <eos>", add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and len(f"{reply} <eos>".split()) <= 12
        task, numbers = reasoning.asked(f"\n\nHuman: {question}\n\nAssistant:")
        kinds[task, "skips"] += reply.startswith("so")
        shown = sum(word.isdecimal() for word in reply.split()) - (task == "mathematics")
        kinds[task, "early"] += not reply.startswith("so") and shown < len(numbers) - (task == "mathematics")
        kinds[task] += 1
    assert kinds["mathematics", "skips"] / kinds["mathematics"] == pytest.approx(0.3, abs=0.03)
    assert kinds["mathematics", "early"] / kinds["mathematics"] == pytest.approx(0.7 * 0.2, abs=0.03)
    assert kinds["code", "early"] / kinds["code"] == pytest.approx(0.2, abs=0.03)


def test_severities_and_seeds_share_one_model_but_no_prompts(tmp_path):
    files = [reasoning.prepare(*which, tmp_path, steps=2) for which in ((0, 0), (0.7, 0), (0.7, 1))]
    assert len({model for model, _ in files}) == 1 and len({prompts for _, prompts in files}) == 3


def test_pretraining_learns_to_answer():
    """After 60 steps of 1000 the loss is well below that of a uniform guess, ln 63 = 4.1 nats a word."""
    model, tokenizer = reasoning.pretrain(steps=60)
    losses = []
    for question, reply in reasoning.corpus(9, 50):
        prompt = tokenizer(f"<bos> <user> {question} <assistant>", add_special_tokens=False).input_ids
        answer = tokenizer(f"{reply} <eos>", add_special_tokens=False).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(model(torch.tensor([prompt + answer]), labels=labels).loss.item())
    assert sum(losses) / len(losses) < 2.0
