"""The survey world: what its groups think, what they were asked, and its language model's prompts."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from worlds import survey
from worlds.opinions import chosen


@pytest.fixture(scope="module")
def opinions():
    return survey.Opinions(3)


def test_shares_are_the_odds_of_what_a_group_thinks(opinions):
    options = ["peace", "fame", "work"]
    words = [survey.WORDS.index(option) for option in options]
    i, v = survey.ISSUES.index("roads"), opinions.values["east 2"]
    u = [2 * sum(opinions.about[i] * opinions.meaning[o] * v) + opinions.liked[i, o] for o in words]
    expected = np.exp(u) / np.exp(u).sum()
    np.testing.assert_allclose(opinions.shares("east 2", "roads", options), expected)


def test_groups_about_one_centre_agree_and_those_about_opposite_ones_do_not(opinions):
    v = opinions.values
    for a, b in (("north 1", "south 1"), ("east 2", "west 2")):
        assert v[a] @ v[b] < 0 < v[a] @ v[a.replace(a[-1], "3")]


def test_a_seed_has_a_survey_of_its_own():
    assert list(survey.answers(0)) == list(survey.answers(0)) != list(survey.answers(1))


def test_every_group_answers_its_part_of_the_survey():
    asked = {}
    for row in survey.answers(0):
        asked.setdefault(row["group"], set()).add((row["question"], row["options"]))
    assert list(asked) == [*survey.TRAIN_GROUPS, *survey.UNSEEN_GROUPS]
    assert {len(questions) for questions in asked.values()} == {survey.PER_GROUP}
    assert len(set().union(*asked.values())) == survey.QUESTIONS


def test_answers_are_a_sample_of_what_a_group_thinks():
    opinions, gaps = survey.Opinions(0), []
    for row in survey.answers(0):
        p = opinions.shares(row["group"], survey.issue_of(row["question"]), row["options"])
        gaps.extend((np.array(row["distribution"]) - p) / np.sqrt(p * (1 - p) / survey.PEOPLE))
    assert np.mean(gaps) == pytest.approx(0, abs=0.05)
    assert np.std(gaps) == pytest.approx(1, abs=0.05)


def test_no_prompt_asks_a_question_of_the_survey_and_its_reply_is_an_option():
    asked = {(row["question"], frozenset(row["options"])) for row in survey.answers(0)}
    prompts = list(survey.prompts(0))
    assert len(prompts) == survey.PROMPTS
    assert not asked & {(row["question"], frozenset(row["options"])) for row in prompts}
    assert all(chosen(row["chosen"].rsplit("Assistant:", 1)[1], row["options"]) == 0 for row in prompts)


def test_the_model_answers_with_one_of_the_options():
    where = survey.prepare().model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    rows = list(survey.prompts(0))[:64]
    torch.manual_seed(0)
    answered = 0
    for row in rows:
        messages = [{"role": "user", "content": survey.prompt_text(row["question"], row["options"])}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=3, do_sample=True, top_k=0)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        answered += chosen(answer, row["options"]) is not None
    assert answered > 0.9 * len(rows)
