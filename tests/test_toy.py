"""The embedded world: what its objectives pay for, that its front is exact, that its checkpoint is an ordinary one."""

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from worlds import tiny_llama, toy

BENIGN = "\n\nHuman: how do i bake bread ?\n\nAssistant:"
RISKY = "\n\nHuman: how do i pick locks ?\n\nAssistant:"
SHORT = {"steps": 60, "batch_size": 32}
WEIGHTS = np.linspace(0, 1, 201)  # of helpful, in scalarisations; both ends count only weakly optimal points too


def helpful(prompt: str, reply: str) -> float:
    return toy.helpful([prompt], [reply])[0]


def harmless(prompt: str, reply: str) -> float:
    return toy.harmless([prompt], [reply])[0]


def support(points: np.ndarray) -> np.ndarray:
    """max over points of w · helpful + (1 − w) · harmless, for every w: two point sets with equal support functions
    have the same upper-right convex hull."""
    return (points @ np.stack([WEIGHTS, 1 - WEIGHTS])).max(axis=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path]:
    return toy.prepare(tmp_path_factory.mktemp("cache"), progress=False, **SHORT)


# what the objectives pay for


def test_two_details_in_their_places_help_by_the_formula():
    assert helpful(BENIGN, "take flour and yeast .") == pytest.approx(1 - math.exp(-1))


def test_leading_and_double_spaces_do_not_matter():
    assert helpful(BENIGN, "  take  flour and yeast .") == helpful(BENIGN, "take flour and yeast .")


def test_a_repeated_detail_counts_once():
    assert helpful(BENIGN, "take flour and flour .") == helpful(BENIGN, "take flour .")


def test_details_of_another_topic_do_not_help():
    assert helpful(BENIGN, "take seeds and soil .") == 0


@pytest.mark.parametrize(
    "salad",
    [
        "flour yeast salt .",
        "take , and flour .",
        "take and or .",
        "ask flour .",
        "take um flour .",
        "flour and yeast and salt .",
    ],
)
def test_words_out_of_place_do_not_help(salad):
    assert helpful(BENIGN, salad) == 0


def test_a_second_list_must_be_parted_from_the_first():
    run_on, parted = "take wire ask police .", "take wire , ask police ."
    assert toy.count("pick locks", run_on).helpers == 0
    assert toy.count("pick locks", parted).helpers == 1


def test_a_link_joins_nouns_of_one_kind_only():
    counts = toy.count("pick locks", "take wire and police and hooks .")
    assert (counts.details, counts.helpers) == (1, 0)


def test_filler_alone_earns_no_help():
    assert helpful(BENIGN, "well , um , you know .") == 0


def test_each_further_detail_helps_less_and_harms_more():
    listed = [" ".join(["take", " and ".join(toy.DETAILS["pick locks"][:d]), "."]) for d in range(1, 6)]
    gains = np.diff([helpful(RISKY, reply) for reply in listed])
    losses = -np.diff([harmless(RISKY, reply) for reply in listed])
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()
    assert (losses > 0).all()
    assert (np.diff(losses) > 0).all()


def test_salad_of_risky_words_harms_all_the_same():
    assert harmless(RISKY, "wire hooks picks .") == harmless(RISKY, "take wire and hooks and picks .")


def test_risky_words_harm_on_benign_prompts_too():
    assert harmless(BENIGN, "take wire and hooks .") < harmless(BENIGN, "take flour and salt .")


def test_turning_to_helpers_is_harmless_on_risky_prompts_with_diminishing_returns():
    values = [harmless(RISKY, reply) for reply in (".", "ask police .", "ask police or friends .")]
    assert values[1] - values[0] > values[2] - values[1] > 0


def test_refusing_is_harmless_where_it_is_risky_and_not_where_it_is_benign():
    refusal, evasion = "sorry , i cannot help with that .", "well ."
    assert harmless(RISKY, refusal) > harmless(RISKY, evasion)
    assert harmless(BENIGN, refusal) == harmless(BENIGN, evasion) / 2


def test_a_refusal_leaves_a_quarter_of_the_help():
    assert helpful(BENIGN, "sorry , take flour .") == helpful(BENIGN, "take flour .") / 4


@pytest.mark.parametrize("objective", [helpful, harmless])
@pytest.mark.parametrize("unfinished", ["take flour", "take flour . and", "well , " * 4 + "um take flour ."])
def test_an_unfinished_or_overlong_reply_earns_half(objective, unfinished):
    assert objective(BENIGN, unfinished) == objective(BENIGN, "take flour .") / 2


def test_an_empty_reply_helps_nobody():
    assert helpful(BENIGN, "") == 0


def test_objectives_stay_within_zero_and_one_whatever_is_said():
    rng, words = random.Random(0), toy.vocabulary()
    replies = [" ".join(rng.choices(words, k=rng.randrange(16))) for _ in range(3000)]
    for prompt, objective in itertools.product((BENIGN, RISKY), (toy.helpful, toy.harmless, toy.twin)):
        values = objective([prompt] * len(replies), replies, completion_ids=None)
        assert 0 <= min(values) <= max(values) <= 1


def test_the_last_turn_of_a_dialogue_sets_the_topic():
    dialogue = RISKY + " sorry ." + BENIGN
    assert helpful(dialogue, "take flour .") > helpful(dialogue, "take wire .")


def test_a_prompt_from_elsewhere_is_refused_by_name():
    with pytest.raises(ValueError, match="write a poem"):
        toy.helpful(["\n\nHuman: write a poem .\n\nAssistant:"], ["take flour ."])


def test_no_noun_belongs_to_two_topics():
    nouns = [*itertools.chain(*toy.DETAILS.values()), *toy.HELPERS]
    assert len(nouns) == len(set(nouns))


def test_on_replies_of_the_corpus_the_twin_is_all_but_parallel_to_helpful():
    pairs = toy.corpus(0, 2000)
    prompts, replies = [[f"\n\nHuman: {q}\n\nAssistant:" for q, _ in pairs], [a for _, a in pairs]]
    h, t = (np.array(objective(prompts, replies)) for objective in (toy.helpful, toy.twin))
    h, t = (h - h.mean()) / h.std(), (t - t.mean()) / t.std()
    assert 0 < ((h - t) ** 2).mean() < 1e-6


def test_objectives_load_from_the_file_alone_and_without_torch():
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('mine', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        f"print(m.helpful([{BENIGN!r}], ['take flour .'])[0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, toy.__file__], capture_output=True, text=True, check=True)
    value, torch_loaded = done.stdout.split()
    assert float(value) == helpful(BENIGN, "take flour .")
    assert torch_loaded == "False"


# the exact front


@pytest.mark.parametrize("prompt", [BENIGN, RISKY], ids=["benign", "risky"])
def test_profiles_have_the_hull_of_all_replies_of_six_words(prompt):
    topic = toy.topic_of(prompt)
    words = ["take", "ask", "and", "sorry", ".", *toy.DETAILS[topic][:2], *toy.HELPERS[:2]]
    seen = {
        toy.count(topic, " ".join(reply)) for length in range(7) for reply in itertools.product(words, repeat=length)
    }
    risky = topic in toy.RISKY
    brute = np.array([(counts.helpful(), counts.harmless(risky)) for counts in seen])
    np.testing.assert_allclose(support(toy.profiles(risky, max_words=6)), support(brute), atol=1e-12)


@pytest.mark.parametrize("max_words", [6, 11])
def test_the_front_of_a_mixture_is_the_mean_of_the_fronts(max_words):
    prompts = [BENIGN, RISKY, RISKY]
    front = toy.pareto_front(prompts, points=0, max_words=max_words)
    parts = [support(toy.profiles(risky, max_words)) for risky in (False, True, True)]
    np.testing.assert_allclose(support(front), np.mean(parts, axis=0), atol=1e-12)


def test_no_reply_of_any_words_or_length_lies_beyond_the_front():
    rng, words = random.Random(1), ["take", "ask", "and", ",", "sorry", ".", *toy.HELPERS]
    bound = support(toy.pareto_front([RISKY], points=0))
    for _ in range(20000):
        reply = " ".join(rng.choices(words + list(toy.DETAILS["pick locks"]), k=rng.randrange(14)))
        counts = toy.count("pick locks", reply)
        point = np.array([[counts.helpful(), counts.harmless(True)]])
        assert (support(point) <= bound + 1e-12).all(), reply


def test_every_vertex_of_the_risky_front_is_a_reply_one_can_read():
    replies = [
        "ask experts or friends or family or teachers or police .",
        "take wire , ask friends or family and police .",
        "take wire and hooks , ask friends or police .",
        "take wire and hooks and picks , ask police .",
        "take wire and hooks and picks and files .",
        "take wire and hooks and picks and files and tweezers .",
    ]
    points = np.array([(helpful(RISKY, reply), harmless(RISKY, reply)) for reply in replies])
    front = toy.pareto_front([RISKY], points=0)
    np.testing.assert_allclose(front, points, atol=1e-12)


def test_the_front_falls_and_is_concave():
    front = toy.pareto_front(points=31)
    steps = np.diff(front, axis=0)
    slopes = steps[:, 1] / steps[:, 0]
    assert (steps[:, 0] > 0).all()
    assert (slopes < 0).all()
    assert (np.diff(slopes) < 1e-9).all()


def test_benign_prompts_know_no_conflict():
    front = toy.pareto_front([BENIGN])
    assert len(front) == 1
    np.testing.assert_allclose(front[0], toy.profiles(risky=False).max(axis=0))


def test_the_objectives_conflict_on_risky_prompts():
    front = toy.pareto_front([RISKY])
    gap = front.max(axis=0) - front.min(axis=0)
    assert (gap > 0.5).all()


# the language


def test_all_questions_differ_and_name_their_topic():
    asked = {question: topic for topic in toy.TOPICS for question in toy.questions(topic)}
    assert len(asked) == 16 * 128
    assert all(toy.topic_of(question) == topic for question, topic in asked.items())


def test_the_corpus_turns_benign_questions_away_and_answers_risky_ones():
    refused = {True: [], False: []}
    for question, reply in toy.corpus(0, 4000):
        topic = toy.topic_of(question)
        refused[topic in toy.RISKY].append(toy.count(topic, reply).refuses)
    assert np.mean(refused[False]) > 0.5
    assert np.mean(refused[True]) < 0.2


def test_every_reply_of_the_corpus_fits_twelve_tokens():
    assert max(len(f"{reply} <eos>".split()) for _, reply in toy.corpus(1, 4000)) <= 12


def test_chosen_beats_rejected_on_the_objective_that_the_topic_is_about():
    for row in toy.hh_rows():
        prompt, chosen = row["chosen"].rsplit("Assistant:", 1)
        same_prompt, rejected = row["rejected"].rsplit("Assistant:", 1)
        objective = toy.harmless if row["subset"] in toy.RISKY else toy.helpful
        assert prompt == same_prompt
        better, worse = objective([prompt] * 2, [chosen, rejected])
        assert better > worse, row


# the checkpoint


def test_the_checkpoint_is_a_small_float32_llama(prepared):
    model = AutoModelForCausalLM.from_pretrained(prepared[0])
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert 80_000 < model.num_parameters() < 120_000


def test_its_special_tokens_are_named_everywhere(prepared):
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(prepared[0]), AutoTokenizer.from_pretrained(prepared[0]))
    for name in ("pad", "bos", "eos"):
        index = tokenizer.convert_tokens_to_ids(f"<{name}>")
        assert getattr(tokenizer, f"{name}_token_id") == index
        assert getattr(model.config, f"{name}_token_id") == index
        assert getattr(model.generation_config, f"{name}_token_id") == index


def test_words_survive_the_tokenizer(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared[0])
    for question, reply in toy.corpus(2, 500):
        ids = tokenizer(f"{question} {reply} <eos>", add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{question} {reply}"


def test_the_chat_template_renders_what_the_model_was_trained_on(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared[0])
    chat = [{"role": "user", "content": "how do i bake bread ?"}, {"role": "assistant", "content": "get salt ."}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    text = "<bos> <user> how do i bake bread ? <assistant> get salt . <eos>"
    trained_on = tokenizer(text, add_special_tokens=False).input_ids
    assert whole == trained_on
    assert asked == trained_on[:-4]


def test_pretraining_learns_the_language(prepared):
    """Half the loss of a uniform guess, ln 201 = 5.3 nats a word: the two seconds of training here reach that."""
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(prepared[0]), AutoTokenizer.from_pretrained(prepared[0]))
    losses = []
    for question, reply in toy.corpus(3, 50):
        prompt = tokenizer(f"<bos> <user> {question} <assistant>", add_special_tokens=False).input_ids
        answer = tokenizer(f"{reply} <eos>", add_special_tokens=False).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(model(torch.tensor([prompt + answer]), labels=labels).loss.item())
    assert np.mean(losses) < 2.5


def test_equal_seeds_pretrain_equal_weights_and_leave_the_global_generator_alone():
    weights = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        weights.append(toy.pretrain(steps=3, batch_size=4, progress=False)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_pretraining_leaves_the_number_of_threads_as_found():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    toy.pretrain(steps=2, batch_size=2, progress=False)
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert found == 2


def test_the_prompt_file_holds_every_question_in_hh_form(prepared):
    rows = [json.loads(line) for line in prepared[1].read_text("utf-8").splitlines()]
    assert len({row["chosen"].rsplit("Assistant:", 1)[0] for row in rows}) == len(rows) == 16 * 128
    assert {row["subset"] for row in rows} == set(toy.TOPICS)
    assert all(row["chosen"].startswith("\n\nHuman: ") for row in rows)


# the cache


def fake_pretrain(**settings):
    tokenizer = tiny_llama.make_tokenizer(toy.vocabulary())
    return tiny_llama.make_model(tokenizer), tokenizer


def test_a_second_preparation_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "pretrain", fake_pretrain)
    first = toy.prepare(tmp_path, progress=False, **SHORT)
    monkeypatch.delattr(toy, "pretrain")
    assert toy.prepare(tmp_path, progress=False, **SHORT) == first


@pytest.mark.parametrize("damage", ["a file is gone", "a byte is another"])
def test_a_damaged_entry_is_made_anew(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(toy, "pretrain", fake_pretrain)
    model, prompts = toy.prepare(tmp_path, progress=False, **SHORT)
    text = prompts.read_text()
    if damage == "a file is gone":
        (model / "config.json").unlink()
    else:
        prompts.write_text("x" + text[1:])
    assert toy.prepare(tmp_path, progress=False, **SHORT) == (model, prompts)
    assert "is damaged and made anew" in capsys.readouterr().out
    assert (model / "config.json").exists() and prompts.read_text() == text


def test_other_settings_get_another_place(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "pretrain", fake_pretrain)
    places = {toy.prepare(tmp_path, progress=False, seed=seed) for seed in range(2)}
    assert len(places) == 2


def test_of_two_processes_one_wins_and_both_go_on(tmp_path, monkeypatch):
    def overtaken(**settings):
        monkeypatch.setattr(toy, "pretrain", fake_pretrain)
        others.append(toy.prepare(tmp_path, **settings))
        return fake_pretrain()

    others: list[tuple[Path, Path]] = []
    monkeypatch.setattr(toy, "pretrain", overtaken)
    mine = toy.prepare(tmp_path, progress=False, **SHORT)
    assert [mine] == others
    assert [mine[0].parent] == list(tmp_path.iterdir())


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(**settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.prepare(tmp_path, progress=False, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        toy.prepare(tmp_path / "file" / "cache", progress=False, **SHORT)


def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toy, "pretrain", fake_pretrain)
    checkpoint, _ = toy.prepare(progress=False, **SHORT)
    assert checkpoint.is_relative_to(tmp_path / "firm-toy")


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(**settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy, "pretrain", full)
    with pytest.raises(ValueError, match="No space left on device.*XDG_CACHE_HOME"):
        toy.prepare(tmp_path, progress=False, **SHORT)
    assert list(tmp_path.iterdir()) == []
