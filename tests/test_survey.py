"""The survey world: what its groups think, what they were asked, and its language model's prompts."""

import json

import numpy as np
import pytest

from app.predictor import chosen
from worlds import survey


@pytest.fixture(scope="module")
def opinions():
    return survey.Opinions.drawn(3)


def test_shares_are_the_odds_of_what_a_group_thinks(opinions):
    options = ["peace", "fame", "work"]
    chosen = [survey.WORDS.index(option) for option in options]
    i, v = survey.ISSUES.index("roads"), opinions.values["east 2"]
    u = [2 * sum(opinions.about[i] * opinions.meaning[o] * v) + opinions.liked[i, o] for o in chosen]
    expected = np.exp(u) / np.exp(u).sum()
    np.testing.assert_allclose(opinions.shares("east 2", "roads", options), expected)


def test_groups_about_one_centre_are_nearer_than_those_about_opposite_ones(opinions):
    v = opinions.values
    for a, b in (("north 1", "south 1"), ("east 2", "west 2")):
        assert v[a] @ v[b] < 0 < v[a] @ v[a.replace(a[-1], "3")]


def test_groups_prefer_opposite_options(opinions):
    asked = list(survey.questions(5, 60))
    pull = {g: [opinions.shares(g, survey.issue_of(q), o) for q, o in asked] for g in ("north 1", "south 1")}
    deviations = {g: np.concatenate([p - 1 / len(p) for p in own]) for g, own in pull.items()}
    liked = np.concatenate(
        [
            (p := np.exp(opinions.liked[survey.ISSUES.index(survey.issue_of(q)), [survey.WORDS.index(x) for x in o]]))
            / p.sum()
            - 1 / len(p)
            for q, o in asked
        ]
    )  # fmt: skip - what everybody likes
    a, b = (d - liked for d in deviations.values())
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) < -0.3


def test_a_seed_has_a_survey_of_its_own():
    assert list(survey.answers(0)) == list(survey.answers(0))
    assert list(survey.answers(0)) != list(survey.answers(1))


def test_every_group_answers_its_part_of_the_survey():
    by_group = {}
    for row in survey.answers(0):
        by_group.setdefault(row["group"], []).append((row["question"], tuple(row["options"])))
        assert sum(row["distribution"]) == pytest.approx(1)
    assert list(by_group) == [*survey.TRAIN_GROUPS, *survey.UNSEEN_GROUPS]
    assert {len(set(asked)) for asked in by_group.values()} == {survey.PER_GROUP}
    assert len({question for asked in by_group.values() for question in asked}) == survey.QUESTIONS


def test_answers_are_a_sample_of_what_a_group_thinks():
    opinions, gaps = survey.Opinions.drawn(0), []
    for row in survey.answers(0):
        p = opinions.shares(row["group"], survey.issue_of(row["question"]), row["options"])
        gaps.extend((np.array(row["distribution"]) - p) / np.sqrt(p * (1 - p) / survey.PEOPLE))
    assert np.std(gaps) == pytest.approx(1, abs=0.05)


def test_no_prompt_asks_a_question_of_the_survey():
    asked = {(row["question"], frozenset(row["options"])) for row in survey.answers(0)}
    prompts = list(survey.prompts(0))
    assert len(prompts) == survey.PROMPTS
    assert not asked & {(row["question"], frozenset(row["options"])) for row in prompts}


def test_a_prompts_reply_is_one_of_its_options():
    for row in survey.prompts(0):
        assert chosen(row["chosen"].rsplit("Assistant:", 1)[1], row["options"]) is not None


def test_a_question_of_another_world_is_refused():
    with pytest.raises(ValueError, match="outside the survey world"):
        survey.issue_of("what is 3 + 4 ?")


def test_the_model_answers_with_one_of_the_options():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = survey.prepare(progress=False)
    where, prompts = made.model, made.prompts
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    rows, found = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()[:64]], 0
    torch.manual_seed(0)
    for row in rows:
        messages = [{"role": "user", "content": survey.prompt_text(row["question"], row["options"])}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=3, do_sample=True, top_k=0)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found += chosen(answer, row["options"]) is not None
    assert found > 0.9 * len(rows)


def test_the_encoder_takes_the_mean_of_its_words_vectors():
    import torch

    model, tokenizer = survey.make_encoder()
    ids = tokenizer("family faith order", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(ids).last_hidden_state[0]
    vectors = model.embed_tokens.weight[ids[0]]
    expected = vectors / vectors.square().mean(1, keepdim=True).sqrt()  # RMSNorm
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
