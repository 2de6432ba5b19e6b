"""Published survey answers as questions and shares: what a predictor of preferences is trained on (`pluralllm.py`).

A row is one group's answer to one question,

    {"question": …, "group": … (or "country"), "options": [k texts], "distribution": [k shares]}

or one question with the answers of many groups, as GlobalOpinionQA publishes it (Durmus et al. 2023, the dataset
Anthropic/llm_global_opinions): `question`, `selections`, a mapping of countries to lists of shares, and `options`. In a
CSV file lists and mappings are Python's text of them. A country without shares, or with zeros only, was not asked.
"""

import ast
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pluralllm import Answers, Predictor, Question, Survey, context_of

TRAIN_GROUPS = ("Nigeria", "Egypt", "India (Current national sample)", "Germany", "United States", "Canada",
                "Argentina", "Australia")  # fmt: skip
UNSEEN_GROUPS = ("China", "Japan", "France", "Spain", "Brazil", "New Zealand")  # as the eight above [code]
TOLERANCE = 0.02  # how far the sum of shares may be from 1
QUOTES = " \t\r\n\"'“”‘’«»"  # and white space


def read(rows: Iterable[tuple[str, dict[str, Any]]]) -> tuple[list[Question], Answers]:
    """(questions, answers) of rows, each with its place. Two rows ask the same question if text and options agree.

    answers: group -> number of a question -> shares [k], which sum to 1. Raises ValueError naming the place of a row
    whose shares are not a distribution over its options, or that answers for a group a second time.
    """
    numbers: dict[Question, int] = {}
    answers: Answers = {}
    for where, row in rows:
        try:
            read_row(row, numbers, answers)
        except Exception as error:  # a row may hold anything
            raise ValueError(f"{where}: cannot be read ({error}); mend or drop the row") from error
    return list(numbers), answers


def read_row(row: dict[str, Any], numbers: dict[Question, int], answers: Answers) -> None:
    """Enter a row's question and answers. Raises ValueError, or what reading raises, if it is none."""
    question = Question(row["question"], tuple(map(str, parsed(row["options"]))))
    if not isinstance(question.text, str):
        raise ValueError(f"question: {question.text!r} is not a text")
    if len(set(question.options)) < max(2, len(question.options)):
        raise ValueError(f"options: {question.options} must be two or more, all different")
    if "selections" in row:
        asked = {group: shares for group, shares in parsed(row["selections"]).items() if any(shares)}
    else:
        asked = {row.get("group") or row["country"]: parsed(row["distribution"])}
    for group, shares in asked.items():
        number = numbers.setdefault(question, len(numbers))
        if number in answers.setdefault(group, {}):
            raise ValueError(f"{group} answers this question a second time")
        y = torch.tensor([float(share) for share in shares], dtype=torch.float64)
        if len(y) != len(question.options) or (y < 0).any() or not abs(y.sum() - 1) <= TOLERANCE:  # NaN is not either
            raise ValueError(f"{group}: {shares} must be a share >= 0 per option, of sum 1")
        answers[group][number] = (y / y.sum()).float()


def parsed(value: Any) -> Any:
    """A list or mapping, given as such or as Python's text of one, `defaultdict(<class 'list'>, {…})` among them."""
    if not isinstance(value, str):
        return value
    return ast.literal_eval(re.sub(r"^\s*defaultdict\([^{]*(\{.*\})\)\s*$", r"\1", value, flags=re.DOTALL).strip())


def of_groups(
    questions: Sequence[Question], answers: Answers, groups: Sequence[str], needed: int
) -> tuple[list[Question], Answers]:
    """What some of the groups answered, and the questions that any of them was asked, numbered from 0.

    Raises ValueError for a group that is unknown, named twice, or answered fewer than `needed` questions.
    """
    for group in groups:
        if groups.count(group) > 1:
            raise ValueError(f"groups: {group} is named twice; a group either trains or is unseen")
        if (n := len(answers.get(group, ()))) < needed:
            raise ValueError(f"groups: {group} answered {n} of {needed} questions; there are {', '.join(answers)}")
    asked = sorted({q for group in groups for q in answers[group]})
    place = {q: i for i, q in enumerate(asked)}
    return [questions[q] for q in asked], {g: {place[q]: y for q, y in answers[g].items()} for g in groups}


class Encoder:
    """A language model, or a sentence encoder, that embeds options: the mean of its last hidden states [code]."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokenizer.truncation_side = "left"  # the option stands at the end
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_length = min(positions, self.tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], batch_size: int = 64, bar: Callable = iter) -> Tensor:
        """Embeddings [P, E] of "question option" for all options in order, float32; texts that are too long are cut."""
        texts = [f"{question.text} {option}" for question in questions for option in question.options]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # texts of like length share a batch
        means = []
        for start in bar(range(0, len(texts), batch_size)):
            batch = self.tokenizer(
                [texts[i] for i in order[start : start + batch_size]], padding=True, truncation=True,
                max_length=self.max_length, padding_side="right", return_tensors="pt", return_token_type_ids=False,
            ).to(self.model.device)  # fmt: skip
            hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][..., None]  # [B, T, E]
            means.append((hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1))
        return torch.cat(means)[torch.tensor(order).argsort()]


def chosen(response: str, options: Sequence[str]) -> int | None:
    """The position of the option that a response chose, by its text or by its letter, A for the first; else None.

    Texts are compared as they are, then without case, without quotes around them, and without a final period. A
    response that fits two options chose none. All other signs count: "< 18" is not "> 18".
    """

    def plain(text: str) -> str:
        text = text.strip(QUOTES).removesuffix(".").rstrip(QUOTES)
        return " ".join(unicodedata.normalize("NFC", text.casefold()).split())

    for form in (lambda text: unicodedata.normalize("NFC", text.strip()), plain):
        given, texts = form(response), [form(option) for option in options]
        if given and given in texts:
            return texts.index(given) if texts.count(given) == 1 else None
    letter = re.fullmatch(r"\(?([a-z])(?:[).:]+|\b(?=\s|$))\s*(.*)", given, re.DOTALL)
    position = ord(letter[1]) - ord("a") if letter else len(options)
    if position >= len(options) or (letter[1] in texts and letter[1] != texts[position]):  # the text of another option
        return None
    return position if plain(letter[2]) in ("", texts[position]) else None


def context_rows(data: Survey, group: str, seed: int) -> list[dict[str, Any]]:
    """The first context of a group's evaluation, as it is written down and as it travels."""
    answered = [(data.questions[q], data.answers[group][q]) for q in context_of(data, group, 0, seed)]
    return [{"question": q.text, "options": q.options, "distribution": y.tolist()} for q, y in answered]


class GroupPredictor:
    """A trained predictor, asked what the groups prefer whose contexts it holds (rows of one group, as above)."""

    def __init__(self, model: Predictor, encoder: Encoder, groups: dict[str, list[dict]]) -> None:
        self.model, self.encoder, self.groups = model, encoder, groups
        slugs = {re.sub(r"\W+", "-", group.lower()).strip("-"): group for group in groups}  # united-states
        self.names = slugs | {group: group for group in groups}

    @cache  # noqa: B019 - a run asks the same questions again, as long as it lives
    def context(self, group: str) -> tuple[Tensor, Tensor]:
        """A group's context, x [C, E] and y [C]."""
        x = self.encoder([Question(row["question"], row["options"]) for row in self.groups[group]])
        return x, x.new_tensor([share for row in self.groups[group] for share in row["distribution"]])

    @cache  # noqa: B019
    def shares(self, group: str, question: str, options: tuple[str, ...]) -> list[float]:
        """As `ask`, of a group by its name, with options that can be hashed."""
        target = self.encoder([Question(question, options)])
        which = torch.zeros(len(options), dtype=torch.long, device=target.device)
        return self.model.shares(*self.context(group), target, which).tolist()

    def ask(self, name: str, question: str, options: Sequence[str]) -> list[float]:
        """The predicted share of a group's people for each option. Raises ValueError for an unknown name or slug."""
        if name not in self.names:
            raise ValueError(f"group: the predictor does not know {name!r}; it knows {', '.join(self.groups)}")
        return self.shares(self.names[name], question, tuple(options))

    def reward(self, name: str) -> Callable[..., list[float]]:
        """The reward of a group, by its name or its slug: the share of the option that a response chose, 0 for none.

        Raises ValueError for a group that the predictor does not know.
        """
        self.ask(name, "", ("yes", "no"))  # before any long work

        def reward(completions: list[str], question=None, options=None, **columns: Any) -> list[float]:
            rewards = []
            for completion, q, o in zip(completions, question or [None], options or [None], strict=False):
                if not isinstance(q, str) or not isinstance(o, (list, tuple)):
                    raise ValueError(f"objectives: group {name} needs a question and its options beside every prompt")
                position = chosen(completion, o)
                rewards.append(0.0 if position is None else self.ask(name, q, o)[position])
            return rewards

        return reward
