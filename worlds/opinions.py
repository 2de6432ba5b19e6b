"""Survey answers as files, and texts as embeddings: what a predictor of preferences is trained on (`pluralllm.py`).

A row is one group's answer to one question,

    {"question": …, "group": … (or "country"), "options": [k texts], "distribution": [k shares]}

or one question with the answers of many groups, as GlobalOpinionQA publishes it (Durmus et al. 2023, the dataset
Anthropic/llm_global_opinions; JSONL, gzipped or not, or CSV): `question`, `selections`, a mapping of countries to lists
of shares, and `options`, both perhaps as Python's text of them. Answers that are empty or all zero there mean that a
country was not asked.

An option's embedding is the mean of a model's last hidden states over "question option" [code]. It is computed once,
and kept in the cache.
"""

import ast
import csv
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from app.loading import named, pretrained
from data import locate, read_rows
from pluralllm import Question, Survey
from worlds import tiny_llama

TRAIN_GROUPS = (
    "Nigeria",
    "Egypt",
    "India (Current national sample)",
    "Germany",
    "United States",
    "Canada",
    "Argentina",
    "Australia",
)  # fmt: skip - [code]
UNSEEN_GROUPS = ("China", "Japan", "France", "Spain", "Brazil", "New Zealand")  # [code]
TOLERANCE = 0.02  # how far a distribution's sum may be from 1


def read(file: str) -> tuple[list[Question], dict[str, dict[int, Tensor]]]:
    """(questions, answers) of an opinions file; answers: group -> question's number -> shares [k], normalised.

    Questions are told apart by their text and options. Raises ValueError naming file and line for a row that is wrong.
    """
    numbers: dict[Question, int] = {}
    answers: dict[str, dict[int, Tensor]] = {}
    for where, row in _rows(file):
        for group, question, shares in _answers(where, row):
            number = numbers.setdefault(question, len(numbers))
            if number in answers.setdefault(group, {}):
                raise ValueError(f"{where}: {group} answers this question a second time; keep one answer")
            answers[group][number] = shares
    if not numbers:
        raise ValueError(f"opinions: {file} holds no answer; pass a file of GlobalOpinionQA's form")
    return list(numbers), answers


def _rows(file: str) -> Iterator[tuple[str, dict]]:
    if not file.endswith(".csv"):
        yield from read_rows(file)
        return
    csv.field_size_limit(sys.maxsize)
    with open(locate(file), encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield f"{file}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{file}:{reader.line_num + 1}: cannot be read ({error}); save it as CSV in UTF-8"
            ) from error


def _answers(where: str, row: dict) -> Iterator[tuple[str, Question, Tensor]]:
    """Each group's answer in a row."""
    question, options = row.get("question"), _parsed(where, row, "options")
    if not question or not isinstance(question, str):
        raise ValueError(f"{where}: no text in 'question'; a row holds one question")
    if not isinstance(options, (list, tuple)) or len(options) < 2:
        raise ValueError(f"{where}: 'options' must list two options at least, and they are {options!r}; drop the row")
    asked = Question(question, tuple(str(option) for option in options))
    if len(set(asked.options)) < len(options):
        raise ValueError(f"{where}: 'options' lists one twice; tell them apart, or drop the row")
    if "selections" in row:
        answers = _parsed(where, row, "selections")
        if not isinstance(answers, dict) or not all(isinstance(each, (list, tuple)) for each in answers.values()):
            raise ValueError(f"{where}: 'selections' must map each group to a list of shares; drop the row")
        answers = {group: shares for group, shares in answers.items() if shares and any(shares)}
    else:
        group = row.get("group") or row.get("country")
        if not isinstance(group, str):
            raise ValueError(f"{where}: no text in 'group' or 'country'; say whose answer it is")
        answers = {group: _parsed(where, row, "distribution")}
    for group, shares in answers.items():
        yield group, asked, _normalised(f"{where}: {group}", shares, len(options))


def _parsed(where: str, row: dict, name: str):
    """A list or mapping, given as such or as Python's text of one, `defaultdict(<class 'list'>, {…})` among them."""
    value = row.get(name)
    if isinstance(value, str):
        text = (
            re.sub(r"^\s*defaultdict\([^{]*|\)\s*$", "", value) if value.lstrip().startswith("defaultdict(") else value
        )
        with suppress(json.JSONDecodeError):
            return json.loads(text)
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"{where}: {name!r} is no list or mapping; expected one as JSON or Python writes it"
            ) from error
    return value


def _normalised(whose: str, shares: Sequence[float], options: int) -> Tensor:
    if not isinstance(shares, (list, tuple)) or len(shares) != options:
        raise ValueError(f"{whose}'s distribution must have one share for each of the {options} options; drop the row")
    try:
        found = torch.tensor([float(share) for share in shares], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{whose}'s distribution holds something that is no number; drop the row") from error
    if not found.isfinite().all() or (found < 0).any():
        raise ValueError(f"{whose}'s distribution has negative or missing shares; drop the row")
    if abs(found.sum() - 1) > TOLERANCE:
        raise ValueError(f"{whose}'s distribution sums to {found.sum():.3g}, not to 1; normalise it, or drop the row")
    return (found / found.sum()).float()


def slug(group: str) -> str:
    """A group's name as an objective's: "United States" -> "united-states"."""
    return re.sub(r"[^a-z0-9_]+", "-", group.lower()).strip("-")


def check_groups(field: str, groups: Sequence[str], known: Sequence[str], file: str) -> None:
    """Raise ValueError, naming the nearest, for a group that is not in the file, or is named twice."""
    for group in groups:
        if group not in known:
            near = difflib.get_close_matches(group, known, n=3, cutoff=0.4)
            remedy = f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(sorted(known)[:8])}, …"
            raise ValueError(f"{field}: {file} has no group {group!r}; {remedy}")
        if groups.count(group) > 1:
            raise ValueError(f"{field}: {group} is named twice; name it once")


# ---- embeddings ------------------------------------------------------------------------------------------------


class Encoder:
    """A language model, or a sentence encoder, that turns texts into the mean of its last hidden states."""

    def __init__(self, where: str, device: torch.device | str = "cpu", dtype: str = "float32") -> None:
        """Raises ValueError if it cannot be loaded."""
        with named("encoder"):
            remedy = "pass a local checkpoint directory"
            self.model, self.tokenizer = pretrained(
                "AutoModel", where, "whole encoder", remedy, dtype, device, new_head=True
            )
        self.model.eval()
        self.tokenizer.truncation_side = "left"  # the option stands at the end
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_length = min(positions, self.tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> Tensor:
        """Embeddings [n, E], float32 on the CPU, in the texts' order; texts too long for the model are cut."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # texts of like length share a batch
        starts, found = range(0, len(texts), batch_size), {}
        for start in tqdm(starts, "embeddings, once", unit="batch", disable=not progress, leave=False):
            chosen = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=self.max_length,
                padding_side="right", return_tensors="pt", return_token_type_ids=False,
            ).to(self.model.device)  # fmt: skip
            hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][..., None]  # [B, T, E]
            means = (hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1)
            found.update(zip(chosen, means.cpu(), strict=True))
        return torch.stack([found[i] for i in range(len(texts))])


def texts_of(questions: Sequence[Question]) -> list[str]:
    """What is embedded: every option behind its question."""
    return [f"{question.text} {option}" for question in questions for option in question.options]


def embedded(
    questions: Sequence[Question], encoder: str, device: torch.device | str = "cpu", progress: bool = True,
    cache_dir: Path | None = None,
) -> Tensor:  # fmt: skip
    """The embeddings [P, E] of the questions' options: from the cache, keyed by model and texts, or computed now.

    Raises ValueError where the encoder cannot be loaded or the cache cannot be written.
    """
    texts, where = texts_of(questions), Path(encoder)
    files = sorted(where.iterdir()) if where.is_dir() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = {"encoder": str(where.resolve()) if files else encoder, "files": states}
    about["texts"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def computed(directory: Path) -> None:
        found = Encoder(encoder, device)(texts, progress=progress)
        safetensors.torch.save_file({"embeddings": found}, directory / "embeddings.safetensors")

    entry = tiny_llama.cached(computed, __file__, about, cache_dir)
    return safetensors.torch.load_file(entry / "embeddings.safetensors")["embeddings"]


def survey_of(
    questions: Sequence[Question], answers: dict[str, dict[int, Tensor]], groups: Sequence[str], encoder: str,
    device: torch.device | str = "cpu", progress: bool = True,
) -> Survey:  # fmt: skip
    """The questions that any of the groups answered, with their embeddings. Raises ValueError as `embedded` does."""
    kept = sorted({q for group in groups for q in answers[group]})
    place = {q: i for i, q in enumerate(kept)}
    own = {group: {place[q]: shares for q, shares in answers[group].items()} for group in groups}
    questions = [questions[q] for q in kept]
    return Survey(questions, embedded(questions, encoder, device, progress).to(device), own)
