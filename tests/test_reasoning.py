"""The reasoning world: programs, answers, what is held out, whose references are wrong."""

import json
import random
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from data import DataConfig, Prompt, load_prompts, share_out
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


def test_a_program_agrees_with_python_on_random_problems():
    rng, signs = random.Random(0), {"add": "+", "sub": "-", "mul": "*"}
    for _ in range(300):
        drawn = reasoning.problem(rng, "code", rng.choice((2, 3)), held_out=False)
        text = str(drawn.numbers[0])
        for word, number in zip(drawn.operations, drawn.numbers[1:], strict=True):
            text = f"({text} {signs[word]} {number})"
        reply = drawn.reply(len(drawn.operations))
        assert reasoning.execute(reply.split()[:-1], drawn.numbers) == eval(text) == drawn.values[-1]


def test_the_running_values_of_a_sum_are_pythons():
    rng = random.Random(1)
    for _ in range(300):
        drawn = reasoning.problem(rng, "mathematics", rng.choice((2, 3)), held_out=False)
        assert eval(drawn.question.removeprefix("what is ").removesuffix(" ?")) == drawn.values[-1]


@pytest.mark.parametrize(
    ("prompt", "reply", "accurate", "made"),
    [(MATHS, "7 , 5 so 5 .", 1, 1), (MATHS, "so 5 .", 1, 0), (MATHS, "7 , 6 so 6 .", 0, 1),
     (MATHS, "7 , 6 so 5 .", 1, 0),
     (MATHS, "7 , 5 so 5", 0, 0), (MATHS, "5", 0, 0), (MATHS, "", 0, 0), (MATHS, "7 so 7 .", 0, 1),
     (MATHS, "7 5 so 5 .", 0, 0), (CODE, "3 4 mul 2 add .", 1, 1), (CODE, "3 4 mul 2 add", 0, 0),
     (CODE, "3 4 add .", 0, 1), (CODE, "2 3 4 mul add .", 1, 1), (CODE, "14 .", 0, 0),
     (CODE, "3 .", 0, 0), (CODE, "3", 0, 0),
     (CODE, "3 4 mul 1 add 1 add .", 0, 0), (CODE, "", 0, 0), (CODE, ".", 0, 0)],
)  # fmt: skip
def test_accuracy_and_format_of_a_reply(prompt, reply, accurate, made):
    answer = ["5" if prompt == MATHS else "14"]
    assert reasoning.accuracy([prompt], [reply], answer) == [float(accurate)]
    assert reasoning.format([prompt], [reply]) == [float(made)]


def test_length_falls_from_one_to_zero():
    assert reasoning.length([""] * 3, ["", "so 5 .", "7 " * 30]) == pytest.approx([1.0, 8 / 11, 0.0])


@pytest.mark.parametrize(
    ("reply", "right"),
    [("7 , 5 so 5 .", 2), ("7 , 6 so 6 .", 1), ("6 , 5 so 5 .", 0), ("so 5 .", 0), ("7 , 5 , 5 so 5 .", 2), ("", 0)],
)
def test_right_steps_are_counted_up_to_the_first_mistake(reply, right):
    assert reasoning.right_steps(MATHS, reply) == right
    assert reasoning.one_step([MATHS], [reply]) == [float(right > 0)]
    assert reasoning.six_steps([MATHS], [reply]) == [right / 6]


def test_a_program_has_no_running_values():
    assert reasoning.right_steps(CODE, "3 4 mul 2 add .") == 0


def test_a_prompt_from_elsewhere_is_refused_by_name():
    with pytest.raises(ValueError, match="write a poem"):
        reasoning.format(["\n\nHuman: write a poem .\n\nAssistant:"], ["so 5 ."])


def numbers_of(question: str) -> tuple:
    return tuple(sorted(reasoning.asked(f"Human: {question}\n\nAssistant:")[1]))


def test_a_lone_number_is_no_program_even_where_it_is_the_answer():
    assert reasoning.accuracy([CODE], ["3 ."], ["3"]) == [1.0] and reasoning.format([CODE], ["3 ."]) == [0.0]


def test_no_program_is_asked_for_a_number_that_is_given():
    rows = [row for row in reasoning.rows(0.0) if row["task"] == "code"]
    questions = [row["chosen"].split("Human: make ")[1].split(" .")[0] for row in rows]
    assert not [q for q in questions if q.split(" from ")[0] in q.split(" from ")[1].split()]


@pytest.mark.parametrize("seed", range(3))
def test_no_numbers_that_are_held_out_were_trained_on_by_anybody_in_any_order(seed):
    rows = list(reasoning.rows(0.0, seed))
    questions = [row["chosen"].split("Human: ")[1].split("\n\n")[0] for row in rows]
    held = {numbers_of(q) for q, row in zip(questions, rows, strict=True) if "client" not in row}
    owned = {numbers_of(q) for q, row in zip(questions, rows, strict=True) if "client" in row}
    taught = {numbers_of(question) for question, _ in reasoning.corpus(0, 20000)}
    assert held and not held & (owned | taught)


def test_eight_clients_differ_by_task_difficulty_and_data_and_no_question_is_asked_twice():
    rows = list(reasoning.rows(0.5))
    counts = Counter((row.get("client"), row["task"], row["subset"]) for row in rows)
    expected = {(c, task, f"{task}, {how}"): 192 for c, (task, how, _) in enumerate(reasoning.CLIENTS)}
    expected |= {(None, task, f"{task}, {how}"): 32 for task in reasoning.TASKS for how in reasoning.DIFFICULTIES}
    assert counts == expected
    assert len({row["chosen"].split("\n\nAssistant")[0] for row in rows}) == len(rows)


def wrong(rows) -> Counter:
    """How many of every owner's references are not what the question comes to."""
    found = Counter()
    for row in rows:
        question = row["chosen"].split("Human: ")[1].split("\n\n")[0]
        right = question.split()[1] if row["task"] == "code" else eval(question[8:-2])
        found[row.get("client")] += int(row["answer"]) != int(right)
    return found


def test_only_poor_clients_have_wrong_references_and_as_many_as_the_severity_says():
    assert not +wrong(reasoning.rows(0.0))
    some, all_of_them = wrong(reasoning.rows(0.5)), wrong(reasoning.rows(1.0))
    poor = {c for c, (_, _, data) in enumerate(reasoning.CLIENTS) if data == "poor"}
    assert set(+some) == set(+all_of_them) == poor
    for c in poor:
        assert 70 < some[c] < 122 and all_of_them[c] > 165  # of 192; by chance a wrong one may be right


def test_a_wrong_reference_is_the_value_one_operation_before_the_end():
    rows = [row for row in reasoning.rows(1.0) if row.get("client") == 1]
    for row in rows:
        words = row["chosen"].split("what is ")[1].split(" ?")[0].split()
        assert int(row["answer"]) == eval(" ".join(words[:-2]))
        assert reasoning.accuracy([row["chosen"]], [f"so {row['answer']} ."], [row["answer"]]) == [1.0]


def test_the_questions_do_not_depend_on_the_severity_and_do_on_the_seed():
    one, two = ([row["chosen"].split("Assistant")[0] for row in reasoning.rows(s)] for s in (0.0, 0.7))
    other = [row["chosen"].split("Assistant")[0] for row in reasoning.rows(0.0, seed=1)]
    assert one == two != other


def test_every_reply_of_the_corpus_is_known_to_the_tokenizer_and_fits():
    tokenizer = tiny_llama.make_tokenizer(reasoning.vocabulary())
    for question, reply in reasoning.corpus(1, 2000):
        ids = tokenizer(f"{question} {reply} <eos>", add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and len(f"{reply} <eos>".split()) <= 12


def test_the_corpus_makes_each_slip_as_often_as_stated():
    kinds = Counter()
    for question, reply in reasoning.corpus(2, 8000):
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        task, numbers = reasoning.asked(prompt)
        kinds[task, "skips"] += reply.startswith("so")
        shown = sum(word.isdecimal() for word in reply.split()) - (task == "mathematics")
        kinds[task, "early"] += not reply.startswith("so") and shown < len(numbers) - (task == "mathematics")
        kinds[task] += 1
    assert kinds["mathematics", "skips"] / kinds["mathematics"] == pytest.approx(0.3, abs=0.03)
    assert kinds["mathematics", "early"] / kinds["mathematics"] == pytest.approx(0.7 * 0.2, abs=0.03)
    assert kinds["code", "early"] / kinds["code"] == pytest.approx(0.2, abs=0.03)


def fake_pretrain(**settings):
    tokenizer = tiny_llama.make_tokenizer(reasoning.vocabulary())
    return tiny_llama.make_model(tokenizer), tokenizer


def test_severities_and_seeds_share_one_model_and_have_prompts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoning, "pretrain", fake_pretrain)
    made = [reasoning.prepare(*which, cache_dir=tmp_path, progress=False) for which in ((0.0, 0), (0.7, 0), (0.7, 1))]
    assert len({model for model, _ in made}) == 1 and len({prompts for _, prompts in made}) == 3
    assert json.loads(made[0][1].read_text("utf-8").splitlines()[0])["task"] == "mathematics"


def test_the_prompts_load_and_go_to_the_clients_they_name(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoning, "pretrain", fake_pretrain)
    model, file = reasoning.prepare(cache_dir=tmp_path, progress=False)
    prompts, counts = load_prompts([str(file)], AutoTokenizer.from_pretrained(model))
    shares, held_out = share_out(prompts, 8, DataConfig(held_out=64, split="natural"), seed=0)
    assert counts["kept"] == 8 * 192 + 4 * 32
    assert [{p.columns["client"] for p in share} for share in shares] == [{c} for c in range(8)]
    assert Counter(p.subset for p in held_out) == {f"{t}, {d}": 16 for t in reasoning.TASKS for d in ("easy", "hard")}
    assert {p.task for p in shares[7]} == {"code"}


def prompt_of(client) -> Prompt:
    return Prompt("", (), "", (1,), "own", {} if client is None else {"client": client})


def test_clients_are_numbered_in_ascending_order_of_their_column():
    shares, _ = share_out(
        [prompt_of(c) for c in (2, None, "b", 0, 1, "a", 0)], 5, DataConfig(held_out=1, split="natural"), 0
    )
    assert [share[0].columns["client"] for share in shares] == [0, 1, 2, "a", "b"] and len(shares[0]) == 2


@pytest.mark.parametrize("client", [[1], True, 0.5])
def test_a_client_that_is_no_number_and_no_name_is_refused(client):
    with pytest.raises(ValueError, match="split: a row's client is"):
        share_out([prompt_of(client), prompt_of(None)], 1, DataConfig(held_out=1, split="natural"), 0)


@pytest.mark.parametrize(
    ("clients", "n", "message"), [(7, 8, "by client there are 8, not 7; add --clients 8"), (8, 129, "only 128 prompts")]
)
def test_a_natural_split_that_cannot_be_is_refused(tmp_path, monkeypatch, clients, n, message):
    monkeypatch.setattr(reasoning, "pretrain", fake_pretrain)
    model, file = reasoning.prepare(cache_dir=tmp_path, progress=False)
    prompts, _ = load_prompts([str(file)], AutoTokenizer.from_pretrained(model))
    with pytest.raises(ValueError, match=message):
        share_out(prompts, clients, DataConfig(held_out=n, split="natural"), seed=0)


def test_pretraining_learns_to_answer():
    """After 60 steps of 1000 the loss is well below that of a uniform guess, ln 63 = 4.1 nats a word."""
    model, tokenizer = reasoning.pretrain(steps=60, progress=False)
    losses = []
    for question, reply in reasoning.corpus(9, 50):
        prompt = tokenizer(f"<bos> <user> {question} <assistant>", add_special_tokens=False).input_ids
        answer = tokenizer(f"{reply} <eos>", add_special_tokens=False).input_ids
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(model(torch.tensor([prompt + answer]), labels=labels).loss.item())
    assert sum(losses) / len(losses) < 2.0
