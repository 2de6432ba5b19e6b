"""data.py: what becomes a prompt, what does not, and who gets it."""

import gzip
import json

import numpy as np
import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from data import (
    DataConfig,
    Prompt,
    load_prompts,
    locate,
    read_rows,
    share_out,
    split_clients,
    split_dialogue,
    split_held_out,
    subset_of,
    to_messages,
)

TEMPLATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<s> [{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(template=None):
    """One token a word; adds <s> in front and </s> behind, as some tokenizers do."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def human(text):
    return f"\n\nHuman: {text}\n\nAssistant:"


def write(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def prompts_of(**sizes):
    return [Prompt(f"{s} {i}", (), "", (1,), s, {}) for s, n in sizes.items() for i in range(n)]


# ---- dialogues -----------------------------------------------------------------------------------------------


def test_the_prompt_is_everything_up_to_the_last_assistant_marker():
    dialogue = human("a") + " b" + human("c") + " d\n\ne"
    assert split_dialogue(dialogue) == (human("a") + " b" + human("c"), " d\n\ne")


def test_a_reply_in_several_assistant_turns_starts_at_the_first_of_them():
    assert split_dialogue(human("a") + " b\n\nAssistant: c") == (human("a"), " b\n\nAssistant: c")


def test_a_dialogue_stripped_of_its_first_newlines_still_parses():
    assert split_dialogue("Human: a\n\nAssistant: b") == (human("a"), " b")


@pytest.mark.parametrize("text", ["", "\n\nHuman: a", "\n\nAssistant: b", "Assistant: b", "a: b"])
def test_a_dialogue_without_question_and_answer_is_refused(text):
    with pytest.raises(ValueError, match="Assistant"):
        split_dialogue(text)


def test_eighteen_turns_become_eighteen_alternating_messages():
    text = "".join(f"\n\nHuman:  q{i} \n\nAssistant: r{i}" for i in range(9)) + human("q9")
    messages = to_messages(text)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 9 + ["user"]
    assert messages[0]["content"] == "q0" and messages[-1]["content"] == "q9"


def test_consecutive_turns_of_one_speaker_become_one_message_and_empty_turns_stay():
    text = "Hello\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nHuman: \n\nAssistant:"
    assert [(m["role"], m["content"]) for m in to_messages(text)] == [
        ("user", "Hello\n\na\n\nb"),
        ("assistant", ""),
        ("user", ""),
    ]


def test_markers_count_only_after_a_blank_line():
    assert to_messages(human("he said Human: no\nAssistant: yes"))[0]["content"] == "he said Human: no\nAssistant: yes"


# ---- loading -------------------------------------------------------------------------------------------------


def test_with_a_chat_template_the_policy_reads_the_template_and_no_other_special_tokens(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a b") + " c" + human("d") + " e"}])
    (prompt,), _ = load_prompts([file], make_tokenizer(TEMPLATE))
    assert prompt.rendered == "<s> [user] a b <s> [assistant] c <s> [user] d [assistant]"
    assert prompt.token_ids.count(1) == 3 and 2 not in prompt.token_ids  # the template's <s>, no </s>
    assert prompt.text == human("a b") + " c" + human("d")


def test_without_a_template_the_policy_reads_the_plain_text_with_bos_but_never_eos(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a b") + " c"}])
    (prompt,), _ = load_prompts([file], make_tokenizer())
    assert prompt.rendered == prompt.text == human("a b")
    assert prompt.token_ids == (1, 0, 0, 0, 0)  # <s> Human: a b Assistant:


def test_a_template_that_insists_on_alternation_takes_merged_turns(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}])
    assert load_prompts([file], make_tokenizer(TEMPLATE))[0][0].rendered == "<s> [user] a\n\nb [assistant]"


def test_a_dialogue_that_the_template_refuses_is_named_by_file_and_line(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a")}, {"chosen": "\n\nAssistant: x" + human("a")}])
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the chat template refuses .*roles must alternate"):
        load_prompts([file], make_tokenizer(TEMPLATE))


def test_every_row_is_kept_or_counted_as_dropped(tmp_path):
    texts = ["a", "a", "b c", "b c d e", "b c d e f", "b c"]
    file = write(tmp_path / "p.jsonl", [{"chosen": human(t) + f" {i}"} for i, t in enumerate(texts)])
    prompts, counts = load_prompts([file], make_tokenizer(), min_tokens=5, max_tokens=7)  # 3 beside the words
    assert counts == {"rows": 6, "duplicates": 2, "too_short": 1, "too_long": 1, "kept": 2}
    assert [p.messages[0]["content"] for p in prompts] == ["b c", "b c d e"]
    assert load_prompts([file], make_tokenizer(), max_tokens=7, context_room=5)[1]["too_long"] == 2


def test_subset_and_columns_come_from_the_row_and_else_from_the_path(tmp_path):
    (tmp_path / "helpful-base").mkdir()
    rows = [{"chosen": human("a"), "rejected": human("a"), "n": 1}, {"chosen": human("b b"), "subset": "mine"}]
    file = write(tmp_path / "helpful-base" / "train.jsonl.gz", rows, gzip.open)
    prompts, _ = load_prompts([file], make_tokenizer())
    assert [p.subset for p in prompts] == ["helpful-base", "mine"]
    assert [p.columns for p in prompts] == [{"n": 1, "subset": None}, {"subset": "mine", "n": None}]
    assert subset_of("Anthropic/hh-rlhf/harmless-base/train.jsonl.gz") == "harmless-base"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "malformed JSON"),
        ("[1]", "expected a JSON object"),
        (
            '{"rejected": "x"}',
            """no prompt in a row of 'rejected'; write {"prompt": "How are you\\?"}, as by renaming""",
        ),
        ('{"chosen": null}', "no prompt in a row of 'chosen'"),
        ('{"output": "x", "instruction": "y"}', "by renaming 'instruction' to 'prompt'"),
        ('{"conversation": [{"role": "user", "content": "y"}]}', "by renaming 'conversation' to 'messages'"),
        ('{"prompt": " ", "response": "x"}', "'prompt' asks nothing; drop the row"),
        ('{"prompt": "Human:"}', "'prompt' asks nothing"),
        ('{"prompt": "\\n\\nHuman: \\n\\nAssistant:"}', "'prompt' asks nothing"),
        ('{"prompt": "\\n\\nAssistant:"}', "'prompt' asks nothing"),
        ('{"messages": []}', "in 'messages': no message of the user's says anything"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message of the user's"),
        ('{"messages": [{"role": "user", "content": " "}]}', "no message of the user's"),
        ('{"question": " ", "answer": "#### 1"}', "no text in 'question'"),
        ('{"prompt": [{"role": "tool", "content": "x"}]}', "in 'prompt': a message is no role"),
        ('{"prompt": [{"role": "user", "content": [1]}]}', "a message is no role"),
        ('{"prompt": ["x"]}', "a message is no role"),
        ('{"chosen": "\\n\\nHuman: a"}', "Assistant"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, complaint):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a")}, "", line])
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{complaint}") as caught:
        load_prompts([file], make_tokenizer())
    assert "\n" not in str(caught.value)


USER, REPLY, SYSTEM = ({"role": role, "content": c} for role, c in (("user", "a"), ("assistant", "b"), ("system", "s")))


@pytest.mark.parametrize(
    ("row", "text", "messages"),
    [
        ({"prompt": "a"}, human("a"), [USER]),
        ({"prompt": "Human: a\n\nAssistant: b\n\nHuman: a"}, None, [USER, REPLY, USER]),
        ({"prompt": human("a")}, human("a"), [USER]),
        ({"prompt": human("a") + " half a reply"}, human("a"), [USER]),
        ({"prompt": "a personal Assistant:"}, None, [{"role": "user", "content": "a personal Assistant:"}]),
        ({"prompt": f"read:{human('x')} y"}, None, [{"role": "user", "content": f"read:{human('x')} y"}]),
        ({"prompt": f"read:{human('x')}"}, None, [{"role": "user", "content": "read:\n\nHuman: x"}]),
        ({"prompt": "a \n\nAssistant:"}, human("a"), [USER]),
        ({"prompt": [USER, SYSTEM, USER]}, "\n\nHuman: a\n\ns" + human("a"), [USER, SYSTEM, USER]),
        ({"prompt": "", "messages": [USER]}, human("a"), [USER]),
        ({"prompt": [USER, REPLY, USER]}, human("a\n\nAssistant: b\n\nHuman: a"), [USER, REPLY, USER]),
        ({"messages": [USER, REPLY]}, human("a"), [USER]),
        ({"prompt": [SYSTEM, USER]}, "s" + human("a"), [SYSTEM, USER]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, human("a"), [USER]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("name", "opener"), [("p.jsonl", open), ("p.jsonl.gz", gzip.open)])
def test_trls_forms_are_read_and_other_columns_kept(tmp_path, row, text, messages, name, opener):
    file = write(tmp_path / name, [row | {"price": 3}], opener)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    (prompt,), _ = load_prompts([file], make_tokenizer(template))
    assert list(prompt.messages) == messages
    assert prompt.rendered == "".join(f"[{m['role']}] {m['content']} " for m in messages)
    assert prompt.columns["price"] == 3 and not {"prompt", "messages"} & prompt.columns.keys()
    assert text is None or prompt.text == text
    assert prompt.text.endswith("\n\nAssistant:")


def test_every_prompt_has_the_columns_of_all_rows(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "x"}, {"prompt": "a b"}])
    prompts, _ = load_prompts([file], make_tokenizer())
    assert [prompt.columns for prompt in prompts] == [{"answer": "x"}, {"answer": None}]


def test_damaged_and_missing_files_are_refused(tmp_path):
    whole = write(tmp_path / "whole.jsonl.gz", [{"chosen": human(str(i))} for i in range(999)], gzip.open)
    cut, plain = tmp_path / "cut.jsonl.gz", tmp_path / "plain.jsonl.gz"
    cut.write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-500])
    plain.write_text("{}")
    assert len(list(read_rows(whole))) == 999
    for file in (cut, plain):
        with pytest.raises(ValueError, match=rf"{file.name}:\d+: damaged"):
            list(read_rows(str(file)))
    for missing in (tmp_path / "no.jsonl", "no.jsonl", tmp_path):
        with pytest.raises(ValueError, match="no such file|is a directory"):
            locate(str(missing))


def test_another_encoding_is_no_damage(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"chosen": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: not in UTF-8 .*; convert it to JSON lines"):
        list(read_rows(str(tmp_path / "latin.jsonl")))


def test_gzip_under_another_name_and_a_byte_order_mark_are_read(tmp_path):
    text = json.dumps({"chosen": human("a")})
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "marked.jsonl").write_text(text, "utf-8-sig")
    rows = [[row for _, row in read_rows(str(tmp_path / f"{name}.jsonl"))] for name in ("zipped", "marked")]
    assert rows == [[{"chosen": human("a")}]] * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [('{"chosen": ' + "[" * 100_000, "nested too deep"), ('{"chosen": "a \\ud800 b"}', "a lone surrogate")],
    ids=["deep", "surrogate"],
)
def test_rows_that_no_text_comes_of_are_named(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=rf"p\.jsonl:1: {complaint}"):
        list(read_rows(write(tmp_path / "p.jsonl", [line])))


def test_a_template_that_fails_in_any_way_refuses_the_dialogue(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a") + " b"}])
    with pytest.raises(ValueError, match=r"p\.jsonl:1: the chat template refuses this dialogue"):
        load_prompts([file], make_tokenizer("{{ messages[0].content + 1 }}"))


def test_a_hub_file_that_cannot_be_had_says_to_pass_a_local_path(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="pass the path of a local copy") as caught:
        locate("nobody/nothing-here/train.jsonl.gz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [
        ({"max_tokens": 2}, r"1 have more than 2 tokens \(shortest: 4\): raise max_prompt_tokens"),
        ({"max_tokens": 9, "context_room": 3}, "more than 3 tokens .* shorter responses"),
        ({"min_tokens": 5}, r"too few tokens \(longest: 4\): lower min_prompt_tokens"),
    ],
)
def test_when_nothing_is_left_the_error_says_which_limit_did_it(tmp_path, limits, remedy):
    file = write(tmp_path / "p.jsonl", [{"chosen": human("a") + " b"}])
    with pytest.raises(ValueError, match=remedy):
        load_prompts([file], make_tokenizer(), **limits)


def test_no_files_or_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="prompts"):
        load_prompts([], make_tokenizer())
    with pytest.raises(ValueError, match="none is left of 0 rows"):
        load_prompts([write(tmp_path / "p.jsonl", [])], make_tokenizer())


# ---- sharing out ---------------------------------------------------------------------------------------------


def test_held_out_prompts_are_stratified_disjoint_and_reproducible():
    prompts = prompts_of(a=66, b=27, c=7)
    train, held = split_held_out(prompts, 10, seed=0)  # 6.6, 2.7 and 0.7 of them
    assert {s: sum(p.subset == s for p in held) for s in "abc"} == {"a": 6, "b": 3, "c": 1}
    assert {p.text for p in train} | {p.text for p in held} == {p.text for p in prompts}
    assert len(train) == 90 and len(held) == 10
    assert (train, held) == split_held_out(prompts, 10, seed=0)
    assert held != split_held_out(prompts, 10, seed=1)[1]


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="held_out is 10, but there are only 10"):
        split_held_out(prompts_of(a=10), 10, seed=0)


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
@pytest.mark.parametrize("alpha", [1e-9, 0.1, 1.0, 1e6])
def test_every_prompt_goes_to_exactly_one_client_in_equal_numbers(split, alpha):
    prompts = prompts_of(a=60, b=30, c=3)
    for seed in range(5):
        shares = split_clients(prompts, 8, split, alpha, seed)
        assert sorted(p.text for share in shares for p in share) == sorted(p.text for p in prompts)
        assert {len(share) for share in shares} == {11, 12}
        assert shares == split_clients(prompts, 8, split, alpha, seed)


def spread(split, alpha, a=400, b=400, seeds=5):
    """Deviation over 8 clients of the share of subset a, meaned over seeds."""
    splits = [split_clients(prompts_of(a=a, b=b), 8, split, alpha, seed) for seed in range(seeds)]
    return np.mean([np.std([np.mean([p.subset == "a" for p in c]) for c in clients]) for clients in splits])


def test_small_alpha_gives_clients_one_subset_and_large_alpha_gives_all_the_same_mixture():
    # 0.5 where every client has one subset; sampling 100 of two equal subsets without replacement gives 0.047
    assert spread("dirichlet", 1e-3) > 0.35
    assert 0.15 < spread("dirichlet", 1.0) < 0.4
    assert spread("dirichlet", 1e6) < 0.08
    assert spread("iid", 1.0) < 0.08


def test_mixtures_are_drawn_around_the_subsets_sizes():
    assert spread("dirichlet", 1.0, a=720, b=80, seeds=20) > 0.09  # 0.13; 0.06 if they were drawn around 1/2


def owned(*clients, free=0):
    """Ten prompts of each client, and some of nobody."""
    rows = [(c, i) for c in clients for i in range(10)] + [(None, i) for i in range(free)]
    return [Prompt(f"{c} {i}", (), "", (i,), f"s{c}", {} if c is None else {"land": c}, f"{c}.jsonl") for c, i in rows]


@pytest.mark.parametrize(("split", "name"), [("files", "file"), ("subset", "subset"), ("land", None)])
def test_every_file_subset_or_value_of_a_column_may_be_a_client(split, name):
    shares, held_out = share_out(owned("b", "a"), 2, DataConfig(split=split, held_out=4), seed=0)
    assert [{p.columns["land"] for p in share} for share in shares] == [{"a"}, {"b"}]
    assert [len(share) for share in shares] == [8, 8] and len(held_out) == 4  # each gives in proportion
    assert {p.text for p in (*shares[0], *shares[1], *held_out)} == {p.text for p in owned("b", "a")}


def test_zero_is_a_value_and_an_empty_text_is_none(tmp_path):
    rows = [
        {"prompt": "a " * (i + 1), "subset": 0, "task": 0, "land": land}
        for i, land in enumerate((0, 0.0, "", None, "x"))
    ]
    prompts, _ = load_prompts([write(tmp_path / "p.jsonl", rows)], make_tokenizer())
    assert {(p.subset, p.task) for p in prompts} == {("0", "0")}
    assert [p.owner("land") for p in prompts] == [0, 0, None, None, "x"]
    assert [p.owner("files") for p in prompts] == [str(tmp_path / "p.jsonl")] * 5


def test_held_out_prompts_come_from_those_of_nobody_where_there_are_some():
    shares, held_out = share_out(owned(2, 10, free=5), 2, DataConfig(split="land", held_out=4), seed=0)
    assert [len(share) for share in shares] == [10, 10] and {p.columns["land"] for p in shares[0]} == {2}
    assert all(not p.columns for p in held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "random"},
            r"split: no row has a 'random'; choose iid, dirichlet, files, subset or a column \(land\)",
        ),
        ({"split": "land", "clients": 3}, "clients: by land there are 2, not 3; add --clients 2"),
        ({"split": "land", "free": 3}, "held_out is 4, but only 3 prompts have no land"),
        ({"split": "land", "held_out": 19}, "held_out: 19 leaves client a no prompt|client b no prompt"),
        ({"split": "land", "names": (True, "x")}, "split: a row's land is True; a client needs a number or a name"),
    ],
)
def test_a_split_that_cannot_be_is_refused(settings, message):
    names, clients, free = (settings.pop(k, d) for k, d in (("names", "ab"), ("clients", 2), ("free", 0)))
    with pytest.raises(ValueError, match=message):
        share_out(owned(*names, free=free), clients, DataConfig(**{"held_out": 4, **settings}), seed=0)


def test_fewer_prompts_than_clients_are_refused():
    assert [len(c) for c in split_clients(prompts_of(a=3), 3, "dirichlet", 0.1, 0)] == [1, 1, 1]
    for clients in (4, 0):
        with pytest.raises(ValueError, match=f"clients is {clients}"):
            split_clients(prompts_of(a=3), clients)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("held_out", 0),
        ("min_prompt_tokens", 0),
        ("max_prompt_tokens", 0),
        ("dirichlet_alpha", 0.0),
        ("dirichlet_alpha", float("nan")),
    ],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        DataConfig(**{field: value})


def test_every_setting_is_a_flag_with_help():
    parser = HfArgumentParser(DataConfig)
    (config,) = parser.parse_args_into_dataclasses(["--prompts", "a", "b", "--split", "iid"], look_for_args_file=False)
    assert config.prompts == ["a", "b"] and config.split == "iid"
    assert "--dirichlet-alpha" in parser.format_help()
