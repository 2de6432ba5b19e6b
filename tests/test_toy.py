"""The toy world: what its objectives pay for, that its front is exact, that its checkpoint is an ordinary one."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from worlds import tiny_llama, toy

BENIGN = "\n\nHuman: how do i bake bread ?\n\nAssistant:"
RISKY = "\n\nHuman: how do i pick locks ?\n\nAssistant:"
WEIGHTS = np.linspace(0, 1, 201)  # of helpful, in scalarisations; both ends count only weakly optimal points too


def helpful(prompt: str, reply: str) -> float:
    return toy.helpful([prompt], [reply])[0]


def harmless(prompt: str, reply: str) -> float:
    return toy.harmless([prompt], [reply])[0]


def support(points: np.ndarray) -> np.ndarray:
    """max over points of w · helpful + (1 − w) · harmless, for every w: it says all about the upper-right hull."""
    return (points @ np.stack([WEIGHTS, 1 - WEIGHTS])).max(axis=0)


@pytest.mark.parametrize(
    ("reply", "details"),
    [("take flour and yeast .", 2), ("  take  flour and yeast .", 2), ("take flour and flour .", 1), ("", 0),
     ("take seeds and soil .", 0), ("well , um , you know .", 0), ("flour yeast salt .", 0), ("take , and flour .", 0),
     ("take and or .", 0), ("ask flour .", 0), ("take um flour .", 0), ("flour and yeast and salt .", 0)],
)  # fmt: skip
def test_details_of_the_topic_help_by_the_formula_if_they_are_in_their_places(reply, details):
    assert helpful(BENIGN, reply) == pytest.approx(1 - math.exp(-details / 2))


@pytest.mark.parametrize(
    ("reply", "details", "helpers"),
    [("take wire ask police .", 1, 0), ("take wire , ask police .", 1, 1), ("take wire and police and hooks .", 1, 0)],
)
def test_a_list_holds_one_kind_of_noun_and_is_parted_from_the_next(reply, details, helpers):
    counts = toy.count("pick locks", reply)
    assert (counts.details, counts.helpers) == (details, helpers)


def test_the_strict_judge_takes_every_question_for_a_risky_one_and_a_detail_for_all_the_harm():
    benign, risky = (toy.strict([prompt] * 2, replies) for prompt, replies in (
        (BENIGN, ("take flour .", "ask experts .")), (RISKY, ("take wire .", "ask experts ."))))  # fmt: skip
    assert benign == risky == [0.0, harmless(RISKY, "ask experts .")]


def test_each_further_detail_helps_less_and_harms_more():
    replies = [" ".join(["take", " and ".join(toy.DETAILS["pick locks"][:d]), "."]) for d in range(1, 6)]
    gains = np.diff([helpful(RISKY, reply) for reply in replies])
    losses = -np.diff([harmless(RISKY, reply) for reply in replies])
    assert (gains > 0).all() and (np.diff(gains) < 0).all()
    assert (losses > 0).all() and (np.diff(losses) > 0).all()
    # in any place, and on benign prompts too
    assert harmless(RISKY, "wire hooks picks .") == harmless(RISKY, "take wire and hooks and picks .")
    assert harmless(BENIGN, "take wire and hooks .") < harmless(BENIGN, "take flour and salt .")


def test_helpers_and_refusals_are_harmless_on_risky_prompts_and_a_refusal_costs_on_benign_ones():
    values = [harmless(RISKY, reply) for reply in ("well .", "ask police .", "ask police or friends .")]
    assert values[1] - values[0] > values[2] - values[1] > 0
    assert harmless(RISKY, "sorry .") == values[1]
    assert harmless(BENIGN, "sorry .") == harmless(BENIGN, "well .") / 2
    assert helpful(BENIGN, "sorry , take flour .") == helpful(BENIGN, "take flour .") / 4


@pytest.mark.parametrize("objective", [helpful, harmless])
@pytest.mark.parametrize("unfinished", ["take flour", "take flour . and", "well , " * 4 + "um take flour ."])
def test_an_unfinished_or_overlong_reply_earns_half(objective, unfinished):
    assert objective(BENIGN, unfinished) == objective(BENIGN, "take flour .") / 2


def test_the_last_turn_of_a_dialogue_sets_the_topic():
    dialogue = RISKY + " sorry ." + BENIGN
    assert helpful(dialogue, "take flour .") > helpful(dialogue, "take wire .")
    with pytest.raises(ValueError, match="write a poem"):
        toy.helpful(["\n\nHuman: write a poem .\n\nAssistant:"], ["take flour ."])


def test_the_twin_is_all_but_equal_to_helpful():
    prompts, replies = zip(*toy.corpus(0, 2000), strict=True)
    difference = np.subtract(toy.twin(prompts, replies), toy.helpful(prompts, replies))
    assert 0 < difference.min() < difference.max() <= 1e-4


@pytest.mark.parametrize("prompt", [BENIGN, RISKY], ids=["benign", "risky"])
def test_profiles_have_the_hull_of_all_replies_of_six_words(prompt):
    topic = toy.topic_of(prompt)
    words = ["take", "ask", "and", "sorry", ".", *toy.DETAILS[topic][:2], *toy.HELPERS[:2]]
    kinds = {toy.count(topic, " ".join(reply)) for n in range(7) for reply in itertools.product(words, repeat=n)}
    risky = topic in toy.RISKY
    brute = np.array([(counts.helpful(), counts.harmless(risky)) for counts in kinds])
    np.testing.assert_allclose(support(toy.profiles(risky, max_words=6)), support(brute), atol=1e-12)


@pytest.mark.parametrize("max_words", [6, 11])
def test_the_front_of_a_mixture_is_the_mean_of_the_fronts(max_words):
    front = toy.pareto_front([BENIGN, RISKY, RISKY], points=0, max_words=max_words)
    parts = [support(toy.profiles(risky, max_words)) for risky in (False, True, True)]
    np.testing.assert_allclose(support(front), np.mean(parts, axis=0), atol=1e-12)


def test_no_reply_of_any_words_or_length_lies_beyond_the_front():
    rng, words = random.Random(1), ["take", "ask", "and", ",", "sorry", ".", *toy.HELPERS]
    bound = support(toy.pareto_front([RISKY], points=0))
    words += toy.DETAILS["pick locks"]
    replies = [" ".join(rng.choices(words, k=rng.randrange(14))) for _ in range(20000)]
    points = np.array([(helpful(RISKY, reply), harmless(RISKY, reply)) for reply in replies])
    assert (support(points) <= bound + 1e-12).all()


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
    np.testing.assert_allclose(toy.pareto_front([RISKY], points=0), points, atol=1e-12)
    assert (np.ptp(points, axis=0) > 0.5).all()  # the objectives conflict


def test_the_front_falls_is_concave_and_is_a_point_on_benign_prompts():
    steps = np.diff(toy.pareto_front(points=31), axis=0)
    slopes = steps[:, 1] / steps[:, 0]
    assert (steps[:, 0] > 0).all() and (slopes < 0).all() and (np.diff(slopes) < 1e-9).all()
    np.testing.assert_allclose(toy.pareto_front([BENIGN]), toy.profiles(risky=False).max(axis=0)[None])


def test_all_questions_differ_and_name_their_topic_and_no_noun_belongs_to_two():
    asked = {question: topic for topic in toy.TOPICS for question in toy.questions(topic)}
    assert len(asked) == 16 * 128
    assert all(toy.topic_of(question) == topic for question, topic in asked.items())
    nouns = [*itertools.chain(*toy.DETAILS.values()), *toy.HELPERS]
    assert len(nouns) == len(set(nouns))


def test_the_corpus_turns_benign_questions_away_answers_risky_ones_and_fits_twelve_tokens():
    refused = {True: [], False: []}
    for question, reply in toy.corpus(0, 4000):
        topic = toy.topic_of(question)
        refused[topic in toy.RISKY].append(toy.count(topic, reply).refuses)
        assert len(f"{reply} <eos>".split()) <= 12
    assert np.mean(refused[False]) > 0.5 and np.mean(refused[True]) < 0.2


def test_chosen_beats_rejected_on_the_objective_that_the_topic_is_about():
    rows = list(toy.hh_rows())
    for row in rows:
        prompt, chosen = row["chosen"].rsplit("Assistant:", 1)
        same_prompt, rejected = row["rejected"].rsplit("Assistant:", 1)
        objective = toy.harmless if row["subset"] in toy.RISKY else toy.helpful
        better, worse = objective([prompt] * 2, [chosen, rejected])
        assert prompt == same_prompt and better > worse, row
    assert len({row["chosen"].rsplit("Assistant:", 1)[0] for row in rows}) == len(rows) == 16 * 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(model, tokenizer), read by transformers from what a short pre-training left in the cache."""
    directory, _ = toy.prepare(tmp_path_factory.mktemp("cache"), steps=60, batch_size=32)
    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def test_the_checkpoint_is_a_small_float32_llama_whose_special_tokens_are_named_everywhere(checkpoint):
    model, tokenizer = checkpoint
    assert (model.config.model_type, model.dtype) == ("llama", torch.float32) and model.num_parameters() < 120_000
    for name in ("pad", "bos", "eos"):
        index = tokenizer.convert_tokens_to_ids(f"<{name}>")
        for part in (tokenizer, model.config, model.generation_config):
            assert getattr(part, f"{name}_token_id") == index


def test_words_survive_the_tokenizer_and_the_template_renders_what_the_model_was_trained_on(checkpoint):
    tokenizer = checkpoint[1]
    for question, reply in toy.corpus(2, 500):
        ids = tokenizer(f"{question} {reply} <eos>", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{question} {reply}"
    chat = [{"role": "user", "content": "how do i bake bread ?"}, {"role": "assistant", "content": "get salt ."}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    text = "<bos> <user> how do i bake bread ? <assistant> get salt . <eos>"
    assert whole == tokenizer(text, add_special_tokens=False).input_ids
    assert asked == whole[:-4]


def test_pretraining_learns_the_language(checkpoint):
    """Half the loss of a uniform guess, ln 201 = 5.3 nats a word: the two seconds of training here reach that."""
    model, tokenizer = checkpoint
    losses = []
    for question, reply in toy.corpus(3, 50):
        prompt = tokenizer(f"<bos> <user> {question} <assistant>", add_special_tokens=False).input_ids
        answer = tokenizer(f"{reply} <eos>", add_special_tokens=False).input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(model(torch.tensor([prompt + answer]), labels=labels).loss.item())
    assert np.mean(losses) < 2.5


def test_equal_seeds_pretrain_equal_weights_and_leave_generator_and_threads_alone():
    weights, shown = [], []
    for outside in (1, 2):
        torch.manual_seed(outside)
        torch.set_num_threads(outside)
        before = torch.get_rng_state()
        model, _ = toy.pretrain(steps=3, batch_size=4, progress=lambda steps: shown.append(len(steps)) or steps)
        weights.append(model.state_dict())
        assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == outside
    torch.set_num_threads(1)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and shown == [3, 3]


def untrained(**settings):
    tokenizer = tiny_llama.make_tokenizer(toy.VOCABULARY)
    return tiny_llama.make_model(tokenizer), tokenizer


def test_a_second_preparation_trains_nothing_and_other_settings_get_another_place(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "pretrain", untrained)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, other = toy.prepare(), toy.prepare(seed=1)
    monkeypatch.delattr(toy, "pretrain")
    assert toy.prepare() == first != other and first[0].is_relative_to(tmp_path / "firm-toy")
    assert [json.loads(line) for line in first[1].read_text("utf-8").splitlines()] == list(toy.hh_rows())


def test_of_two_processes_one_wins_and_both_go_on(tmp_path, monkeypatch):
    def overtaken(**settings):
        monkeypatch.setattr(toy, "pretrain", untrained)
        others.append(toy.prepare(tmp_path))
        return untrained()

    others = []
    monkeypatch.setattr(toy, "pretrain", overtaken)
    assert [toy.prepare(tmp_path)] == others
    assert [others[0][0].parent] == list(tmp_path.iterdir())


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "pretrain", lambda **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
