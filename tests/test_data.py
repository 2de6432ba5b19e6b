"""data.py: what becomes a prompt, what does not, and who gets it."""

import numpy as np
import pytest
from conftest import make_tokenizer
from tokenizers import processors

from data import REPLY, Prompt, objectives_of, prompts_from, share_out, split_dialogue, subset_of, to_messages
from settings import DataSettings

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<bos> {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)
ASKED_TWICE = "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w1\n\nAssistant:"
BOS, EOS, UNKNOWN, W1, W2, W9 = 1, 2, 3, 5, 6, 13
USER, ANSWER, SYSTEM = (
    {"role": role, "content": content} for role, content in (("user", "w1"), ("assistant", "w2"), ("system", "w3"))
)


def human(text):
    return f"\n\nHuman: {text}{REPLY}"


def read(*rows, template=None, **limits):
    """The prompts of a file's rows, and the counts; the tokenizer adds <bos> in front and <eos> behind, as some do."""
    tokenizer, special = make_tokenizer(), [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=special)
    tokenizer.chat_template = template
    return prompts_from(
        ((f"helpful/train.jsonl.gz:{i}", row) for i, row in enumerate(rows, start=1)), tokenizer, **limits
    )


@pytest.mark.parametrize(
    ("dialogue", "prompt", "response"),
    [
        (human("a") + " b" + human("c") + " d\n\ne", human("a") + " b" + human("c"), " d\n\ne"),
        (human("a") + " b\n\nAssistant: c", human("a"), " b\n\nAssistant: c"),  # one reply in two turns
        ("Human: a\n\nAssistant: b", human("a"), " b"),
    ],
)
def test_the_prompt_ends_at_the_marker_of_the_last_reply(dialogue, prompt, response):
    assert split_dialogue(dialogue) == (prompt, response)


def test_turns_of_one_speaker_become_one_message_and_empty_turns_stay():
    text = "Hello\n\nHuman: a\n\nHuman: he said Human: no\nAssistant: yes\n\nAssistant:\n\nHuman: \n\nAssistant:"
    asked = "Hello\n\na\n\nhe said Human: no\nAssistant: yes"  # markers count only after a blank line
    assert [tuple(m.values()) for m in to_messages(text)] == [("user", asked), ("assistant", ""), ("user", "")]


def test_a_template_writes_all_special_tokens_and_plain_text_begins_with_bos_but_does_not_end_with_eos():
    (templated,), _ = read({"chosen": ASKED_TWICE + " w2"}, template=TEMPLATE)
    assert templated.token_ids == (BOS, W1, BOS, W2, BOS, W1, W9)
    (plain,), _ = read({"chosen": human("w1 w2") + " w3"})
    assert plain.text == human("w1 w2") and plain.token_ids == (BOS, UNKNOWN, W1, W2, UNKNOWN)


@pytest.mark.parametrize(
    ("row", "text", "messages"),
    [
        ({"prompt": "w1"}, human("w1"), [USER]),
        ({"prompt": ASKED_TWICE.strip()}, ASKED_TWICE, [USER, ANSWER, USER]),
        ({"prompt": f"read:{human('x')} y"}, human(f"read:{human('x')} y"), None),  # it only quotes a dialogue
        ({"prompt": [SYSTEM, USER, ANSWER, USER]}, "w3" + ASKED_TWICE, [SYSTEM, USER, ANSWER, USER]),
        ({"prompt": "", "messages": [USER, ANSWER]}, human("w1"), [USER]),
        ({"prompt": "w1", "chosen": "b", "rejected": "c"}, human("w1"), [USER]),
        ({"chosen": human("w1") + " b", "question": "q"}, human("w1"), [USER]),
    ],
)  # fmt: skip
def test_the_forms_of_hh_rlhf_and_trl(row, text, messages):
    (prompt,), _ = read(row)
    assert prompt.text == text and (messages is None or list(prompt.messages) == messages)


def test_a_question_of_gsm8k_is_asked_with_how_to_answer_and_keeps_its_answer():
    (prompt,), _ = read({"question": " How many {apples}? ", "answer": "2 + 2 = 4\n#### 4"})
    assert prompt.text.startswith("\n\nHuman: How many {apples}?\n\nReason step by step") and "####" in prompt.text
    assert prompt.columns == {"answer": "2 + 2 = 4\n#### 4"} and to_messages(prompt.text) == prompt.messages


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"instruction": "x", "output": "y"}, 'no prompt in the columns instruction, output; .*{"prompt": text or'),
        ({"chosen": "\n\nAssistant: a"}, "answers anybody"),
        ({"prompt": "Human: \n\nAssistant:"}, "a message needs .* a text"),
        ({"prompt": "Human: a\n\nAssistant: begun"}, "must end with a user message, not with the assistant's 'begun'"),
        ({"prompt": [USER, ANSWER]}, "must end with a user message, not with the assistant's 'w2'"),
        ({"messages": [SYSTEM, ANSWER]}, "must end with a user message"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "a message needs a role"),
        ({"prompt": [{"role": "user", "content": [1]}]}, "a message needs .* a text"),
        ({"messages": [USER, ANSWER | {"content": ""}, USER]}, "a message needs .* a text"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "search"}]}]}, "no tool_calls"),
        ({"question": "q", "answer": "four"}, "ends in #### and a number"),
    ],
)
def test_a_row_without_a_prompt_is_named_by_file_and_line(row, complaint):
    with pytest.raises(ValueError, match=rf"^helpful/train\.jsonl\.gz:2: .*{complaint}") as caught:
        read({"prompt": "w1"}, row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [TEMPLATE, "{{ messages[0].content + 1 }}"])
def test_a_dialogue_that_the_template_refuses_is_named_by_file_and_line(template):
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz:1: the chat template refuses"):
        read({"prompt": [SYSTEM, USER]}, template=template)


def test_every_row_is_kept_or_counted_as_dropped():
    rows = [{"chosen": human(text) + f" {i}"} for i, text in enumerate(["w1", "w1", "w1  w2", "w1 w2", "w1 w2 w3"])]
    prompts, counts = read(*rows, max_tokens=5)  # 3 beside the words; "w1  w2" and "w1 w2" differ in a space only
    assert counts == {"rows": 5, "duplicates": 2, "too_long": 1, "kept": 2}
    assert [p.messages[0]["content"] for p in prompts] == ["w1", "w1  w2"] and not prompts[0].columns
    assert read(*rows, context=4)[1]["too_long"] == 2
    with pytest.raises(ValueError, match="0 of 5 rows can be used; the shortest has 4 tokens, and 3 fit"):
        read(*rows, max_tokens=3)


def test_a_prompt_knows_where_it_is_from_and_has_the_columns_of_all_rows():
    prompts, _ = read({"prompt": "w1", "answer": 7, "task": 2.0}, {"prompt": "w2", "subset": 0})
    assert [(p.subset, p.task) for p in prompts] == [("helpful", "2"), ("0", "all")]
    assert {p.owner("files") for p in prompts} == {"helpful/train.jsonl.gz"}
    assert prompts[0].columns == {"answer": 7, "task": 2.0, "subset": None}
    assert [subset_of(file) for file in ("test.csv", "a/own.jsonl", "a/train500.jsonl")] == ["test", "own", "a"]


def prompts_of(**sizes):
    return [Prompt(f"{s}{i}", (), (1,), s, {}) for s, n in sizes.items() for i in range(n)]


def shared(prompts, n_clients=8, seed=0, held_out=10, **settings):
    return share_out(prompts, n_clients, DataSettings(held_out=held_out, **settings), seed)


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
@pytest.mark.parametrize("alpha", [1e-9, 1.0, 1e6])
def test_every_prompt_is_held_out_or_one_clients_and_all_get_their_share(split, alpha):
    prompts = prompts_of(a=60, b=30, c=13)
    for seed in range(5):
        shares, held_out = shared(prompts, split=split, dirichlet_alpha=alpha, seed=seed)
        assert sorted(p.text for share in (*shares, held_out) for p in share) == sorted(p.text for p in prompts)
        assert {len(share) for share in shares} == {11, 12}
        assert [sum(p.subset == s for p in held_out) for s in "abc"] == [6, 3, 1]  # of 5.8, 2.9 and 1.3: in proportion


def test_a_seed_gives_the_prompts_that_it_always_gave():
    shares, held_out = shared(prompts_of(a=7, b=7), 2, held_out=2, seed=3)
    drawn = [" ".join(p.text for p in share) for share in (*shares, held_out)]
    assert drawn == ["a6 b3 b6 b1 b5 b2", "a3 a1 a5 a0 b4 a2", "b0 a4"]


def spread(split, alpha, a=400, b=400, seeds=5):
    """Deviation over 8 clients of the share of subset a, meaned over seeds."""
    prompts = prompts_of(a=a, b=b)
    splits = [shared(prompts, split=split, dirichlet_alpha=alpha, seed=seed)[0] for seed in range(seeds)]
    return np.mean([np.std([np.mean([p.subset == "a" for p in share]) for share in shares]) for shares in splits])


def test_alpha_says_how_much_clients_differ_around_the_subsets_sizes():
    # 0.5 if every client has one subset; sampling 100 of two equal subsets without replacement gives 0.047
    assert spread("dirichlet", 1e-3) > 0.35 > spread("dirichlet", 1.0) > 0.15
    assert spread("dirichlet", 1e6) < 0.08 and spread("iid", 1.0) < 0.08
    assert spread("dirichlet", 1.0, a=720, b=80, seeds=20) > 0.09  # 0.13; 0.06 if mixtures were drawn around 1/2


def owned(*clients, free=0):
    """Ten prompts of each client, and some of nobody."""
    rows = [(c, i) for c in clients for i in range(10)] + [(None, i) for i in range(free)]
    return [Prompt(f"{c} {i}", (), (i,), f"s{c}", {"land": c}, f"{c}.jsonl") for c, i in rows]


@pytest.mark.parametrize("split", ["files", "subset", "land"])
def test_every_file_subset_or_value_of_a_column_may_be_a_client(split):
    shares, held_out = shared(owned("b", "a"), 2, split=split, held_out=4)
    assert [{p.columns["land"] for p in share} for share in shares] == [{"a"}, {"b"}]
    assert [len(share) for share in shares] == [8, 8] and len(held_out) == 4  # each gives in proportion


def test_numbers_are_in_their_order_from_json_pandas_or_csv_and_gaps_are_held_out():
    prompts = owned("x", 10, 2.0, "1", 0) + owned(float("nan"), "", None, free=5)
    shares, held_out = shared(prompts, 5, split="land", held_out=4)
    assert [share[0].columns["land"] for share in shares] == [0, "1", 2.0, 10, "x"]
    assert [len(share) for share in shares] == [10] * 5 and [p.owner("land") for p in held_out] == [None] * 4


@pytest.mark.parametrize(
    ("prompts", "split", "message"),
    [
        (owned("a"), "random", "split: 0 clients by random, not 2; .* subset, land"),
        (owned("a", "b", "c"), "land", "split: 3 clients by land, not 2"),
        (owned("a", "b", free=3), "land", "held_out: 4 prompts, but only 3 have no land"),
        (owned("a")[:5], "iid", "held_out: 4 and 2 clients need more than 5 different"),
    ],
)
def test_a_split_that_cannot_be_is_refused(prompts, split, message):
    with pytest.raises(ValueError, match=message):
        shared(prompts, 2, held_out=4, split=split)


def test_a_client_holds_what_is_named_by_its_number_else_by_its_task_else_all():
    names, tasks = ["a", "b", "c"], ["maths", "code", "code", "2"]
    assert objectives_of(["code=c,a", "1=b"], names, tasks) == [[0, 1, 2], [1], [2, 0], [0, 1, 2]]
    for *before, spec in (["2=a"], ["4=a"], ["poetry=a"], ["3:a"], ["0=d"], ["0=a,a"], ["0=b", "0=a"]):
        with pytest.raises(ValueError, match=f"client_objectives: '{spec}'; write"):  # 2 is a client and a task
            objectives_of([*before, spec], names, tasks)
    with pytest.raises(ValueError, match="client_objectives: no client holds b"):
        objectives_of(["code=a", "maths=a,c", "3=a"], names, tasks)
