"""The third embedded world: survey questions, groups that answer by their values, and a language model to align. [ours]

    what matters most for schools ?        family · work · faith · order        north 1: 0.41  0.07  0.38  0.14

Groups have values v in the plane. They lie about four centres: north opposite south, east opposite west. Of an option
o on issue i the people of a group think u = 2 (s_i ⊙ ℓ_o) · v + a_o + b_io, and they choose it with the odds exp(u):
ℓ_o is what a word stands for, s_i how strongly the issue weighs each of the two values, a_o and b_io what everybody
likes. A group is asked some of the questions, and PEOPLE of its people answer: a sample of what it thinks.

Eight groups take part, two about every centre; six are asked only afterwards. A predictor has to learn that a group's
answers to some questions show its values, and so its answers to others.

The language model is pre-trained to answer with any one of the listed options. What a group thinks is known for every
question (`Opinions.shares`), so a policy is judged by the truth and not by the predictor that rewarded it. The two
models are the same for all seeds.
"""

import random
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from worlds import tiny_llama

ISSUES = ("schools", "towns", "farms", "courts", "taxes", "roads", "homes", "trade")
WORDS = ("family", "work", "faith", "freedom", "order", "wealth", "health", "learning", "nature", "honour", "peace",
         "fame")  # fmt: skip
CENTRES = {"north": (0.0, 1.0), "south": (0.0, -1.0), "east": (1.0, 0.0), "west": (-1.0, 0.0)}
TRAIN_GROUPS = tuple(f"{centre} {i}" for i in (1, 2) for centre in CENTRES)
UNSEEN_GROUPS = (*(f"{centre} 3" for centre in CENTRES), "north 4", "south 4")
SPREAD = 0.2  # of the groups about their centre, in every direction
QUESTIONS, PER_GROUP, PEOPLE = 80, 48, 200  # in the survey; asked of each group; who answer in each group
OPTIONS, PROMPTS = (3, 4, 5), 320  # how many options a question has; other questions, for the language model
Files = namedtuple("Files", "model encoder opinions prompts")  # checkpoint directories, and files of rows
VOCABULARY = ["what", "matters", "most", "for", ":", ",", "or", "?", ".", *ISSUES, *WORDS]


class Opinions:
    """What words and issues are about, and what groups think, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        rng, groups = np.random.default_rng(seed), (*TRAIN_GROUPS, *UNSEEN_GROUPS)
        self.meaning = rng.normal(size=(len(WORDS), 2))  # ℓ
        self.about = 1 + 0.3 * rng.normal(size=(len(ISSUES), 2))  # s
        self.liked = 0.7 * rng.normal(size=len(WORDS)) + 0.3 * rng.normal(size=(len(ISSUES), len(WORDS)))  # a + b
        self.values = {group: CENTRES[group.split()[0]] + SPREAD * rng.normal(size=2) for group in groups}  # v [2]

    def shares(self, group: str, issue: str, options: Sequence[str]) -> np.ndarray:
        """The share of a group's people that would choose each option [k] if all of them were asked."""
        i, chosen = ISSUES.index(issue), [WORDS.index(option) for option in options]
        u = 2 * (self.about[i] * self.meaning[chosen]) @ self.values[group] + self.liked[i, chosen]  # [k]
        odds = np.exp(u - u.max())
        return odds / odds.sum()


def draw(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Any question with options."""
    return f"what matters most for {rng.choice(ISSUES)} ?", tuple(rng.sample(WORDS, rng.choice(OPTIONS)))


def issue_of(question: str) -> str:
    """The issue of a question of this world."""
    return question.removeprefix("what matters most for ").removesuffix(" ?")


def questions(seed: int, number: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(question, options), no two with the same question and options, in whatever order these are."""
    rng, seen = random.Random(seed), set()
    while len(seen) < number:
        question, options = draw(rng)
        if (question, frozenset(options)) not in seen:
            seen.add((question, frozenset(options)))
            yield question, options


def prompt_text(question: str, options: Sequence[str]) -> str:
    """A question and its options, as the language model reads them."""
    return f"{question.removesuffix(' ?')} : {' , '.join(options[:-1])} or {options[-1]} ?"


def answers(seed: int) -> Iterator[dict]:
    """What every group answered, as rows of an opinions file."""
    opinions, rng = Opinions(seed), np.random.default_rng([seed, 1])
    survey = list(questions(seed, QUESTIONS))
    for group in opinions.values:
        for q in sorted(rng.choice(QUESTIONS, PER_GROUP, replace=False)):
            question, options = survey[q]
            chose = rng.multinomial(PEOPLE, opinions.shares(group, issue_of(question), options))
            yield {"question": question, "group": group, "options": options, "distribution": (chose / PEOPLE).tolist()}


def prompts(seed: int) -> Iterator[dict]:
    """Questions outside the survey as prompts in HH-RLHF's form, with `question` and `options` as columns."""
    for question, options in list(questions(seed, QUESTIONS + PROMPTS))[QUESTIONS:]:
        dialogue = f"\n\nHuman: {prompt_text(question, options)}\n\nAssistant: {options[0]} ."
        yield {"chosen": dialogue, "question": question, "options": options}


def pretrain(steps: int = 800, batch_size: int = 64, lr: float = 5e-3, seed: int = 0, progress: Callable = iter):
    """A fresh model that answers with one of the options, see `tiny_llama.pretrain`."""
    rng, pairs = random.Random(seed), []
    for _ in range(steps * batch_size):
        question, options = draw(rng)
        pairs.append((prompt_text(question, options), f"{rng.choice(options)} ."))
    return tiny_llama.pretrain(VOCABULARY, pairs, batch_size, lr, seed, progress)


def make_encoder(width: int = 64, seed: int = 0):
    """What embeds the questions: a Llama without layers, for which a text is the mean of its words' random vectors."""
    tokenizer = tiny_llama.make_tokenizer(VOCABULARY)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=0,
        num_attention_heads=1, max_position_embeddings=tiny_llama.MAX_LENGTH, initializer_range=1.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaModel(config).eval(), tokenizer


def prepare(seed: int = 0, cache_dir: Path | None = None, progress: Callable = iter, **settings) -> Files:
    """The world's files, from the cache or new (about 15 s on one core). settings: those of `pretrain`."""
    taught = {"model": lambda: pretrain(**settings, progress=progress), "encoder": make_encoder}
    rows = {"opinions": lambda: answers(seed), "prompts": lambda: prompts(seed)}
    models = tiny_llama.saved(taught, __file__, settings, cache_dir)
    files = tiny_llama.saved(rows, __file__, {"seed": seed}, cache_dir)
    return Files(models / "model", models / "encoder", files / "opinions.jsonl", files / "prompts.jsonl")
