"""What is good: an objective is a function (prompts, completions, **columns) -> list[float].

That is TRL's convention, so that people's reward functions work unchanged: everything is passed by keyword, plain
strings in, one finite number a completion out. `columns` are the data's own columns (None where a row has none), and
completion_ids, messages and subset. An objective is written `[NAME=]SPEC`, where SPEC is one of

    rule:NAME               one of RULES, below
    hf:DIR_OR_HUB           a reward model, below
    py:FILE.py:FUNCTION     your own function; FILE as seen from the current folder, the project's, or its worlds/
    group:PREDICTOR:GROUP   how many of a group choose what the response chose, as a saved predictor (app/predictor.py)
                            has it; prompts need the columns question and options

**A reward model** reads prompt and response and gives logits[0]. It reads its own chat template, where its tokenizer
has one, else the pair of texts ("\\n\\nHuman: ... \\n\\nAssistant:", response), with a space before the last marker
[code: RiC, and the model cards of Ray2333/gpt2-large-*-reward_model]. What is too long for the model loses its
beginning: special tokens survive, and the response's end [ours]. A missing pad token becomes EOS, in the config too:
GPT-2's and Llama's heads score the last token that is not config.pad_token_id, so a final EOS is skipped and the
score sits on the token before it, alone or in a batch.

**Clients.** A function sees one client's rows at a time, a reward model those of all. A client may hold only some of
the objectives (`--client_objectives`).

**Calibration** [ours]. Objectives come in unlike units, so each is shifted and scaled to mean 0 and deviation 1 on
samples of the base policy, once. Each client c sends, of each objective, n_c, m_c = mean r and s_c = sum (r - m_c)^2,
and then all use, with sums over all clients that hold it,

    mean = sum n_c m_c / n      scale^2 = sum [s_c + n_c (m_c - mean)^2] / n      z = (r - mean) / scale

An objective that does not vary at all gets scale 1, and the run says so.

`python rewards.py --backbone DIR --pairs FILE... --out DIR` trains a reward model (app/reward_training.py; --help).
Left out on purpose: asynchronous functions, and TRL's None for "does not apply": a missing reward is an error here.
"""

import copy
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from app.loading import check_ids, fingerprint_of, named, pretrained
from app.predictor import group_objective
from app.user_code import load_function, user_errors
from data import REPLY, Prompt, to_messages
from worlds.opinions import slug

# ---- rules ---------------------------------------------------------------------------------------------------

RULES: dict[str, Callable[..., list[float]]] = {}


def rule(score: Callable[[str, str], float]) -> Callable[..., list[float]]:
    """Makes an objective of a function of one prompt and one completion, and puts it into RULES."""

    def objective(prompts: list[str], completions: list[str], **columns) -> list[float]:
        return [float(score(p, c)) for p, c in zip(prompts, completions, strict=True)]

    objective.__doc__ = score.__doc__
    RULES[score.__name__] = objective
    return objective


@rule
def length(prompt: str, completion: str) -> float:
    """Number of words."""
    return len(completion.split())


@rule
def brevity(prompt: str, completion: str) -> float:
    """1 for silence, 1/2 at 20 words, towards 0 beyond: pulls against length."""
    return 1 / (1 + len(completion.split()) / 20)


@rule
def distinct(prompt: str, completion: str) -> float:
    """Share of neighbouring word pairs that were not said before: 1 without repetition."""
    words = completion.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@rule
def sentence(prompt: str, completion: str) -> float:
    """1 if it ends as a sentence does (. ! ? and perhaps a closing quote or bracket), else 0."""
    return bool(re.search(r"[.!?][\"'”’)\]]*\s*$", completion))


@rule
def on_topic(prompt: str, completion: str) -> float:
    """Share of the last question's words of four letters and more that the completion takes up."""
    asked = set(re.findall(r"\w{4,}", to_messages(prompt)[-1]["content"].lower()))
    return len(asked & set(re.findall(r"\w{4,}", completion.lower()))) / max(len(asked), 1)


@rule
def refusal(prompt: str, completion: str) -> float:
    """1 if it declines or apologises, else 0: pulls against on_topic."""
    declines = r"\b(sorry|(ca|wo|could|would|should)n['’]t|(can|will|could|would|should) ?not|unable to|refuse)\b"
    return bool(re.search(declines, completion.lower()))


# ---- reward models -------------------------------------------------------------------------------------------


class RewardModel:
    """A model and its tokenizer, called like any objective: (prompts, completions, **columns) -> list[float]."""

    def __init__(self, model, tokenizer, batch_size: int = 32, max_length: int | None = None):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size  # eval: no dropout
        tokenizer.truncation_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.use_cache = False  # every text is read once: keys and values would only take memory
        model.config.pad_token_id = tokenizer.pad_token_id  # heads look for the last token that is none of these
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa's positions start behind the padding's
            positions -= table.padding_idx + 1
        self.max_length = min(positions, tokenizer.model_max_length, max_length or positions)

    def encode(self, prompts: list[str], completions: list[str], messages: list | None = None) -> list[dict]:
        """What the model reads of each prompt and response: input_ids (at most max_length), perhaps token types."""
        completions = [completion.strip() for completion in completions]
        if not self.tokenizer.chat_template:
            return [self._encode_pair(p, c) for p, c in zip(prompts, completions, strict=True)]
        messages = messages or [to_messages(prompt) for prompt in prompts]
        return [self._encode_chat(m, c) for m, c in zip(messages, completions, strict=True)]

    def _encode_pair(self, prompt: str, completion: str) -> dict:
        first = f"{prompt.removesuffix(REPLY).rstrip()} {REPLY}"
        encoding = self.tokenizer(first, completion, verbose=False)
        if len(encoding["input_ids"]) > self.max_length:  # the prompt pays first
            encoding = self.tokenizer("", completion, truncation="only_second", max_length=self.max_length)
            if len(encoding["input_ids"]) < self.max_length:
                encoding = self.tokenizer(first, completion, truncation="only_first", max_length=self.max_length)
        return dict(encoding)

    def _encode_chat(self, messages: Sequence[dict], completion: str) -> dict:
        chat = [*messages, {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > self.max_length:
            bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = bos + ids[len(ids) - self.max_length + len(bos) :]
        return {"input_ids": ids}

    def batches(self, encodings: list[dict]) -> list[list[int]]:
        """The rows of each batch, longest texts first: what is too much for the memory fails at once."""
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]["input_ids"]))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def forward(self, encodings: list[dict]) -> Tensor:
        """Scores [B], float32, of one right-padded batch."""
        batch = self.tokenizer.pad(encodings, padding_side="right", return_tensors="pt")
        return self.model(**batch.to(self.model.device)).logits[:, 0].float()

    @torch.no_grad()
    def scores(self, encodings: list[dict], progress: str = "") -> Tensor:
        """Scores [N] on the CPU, in the order given; `progress` names a progress bar."""
        scores = torch.empty(len(encodings))
        for batch in tqdm(self.batches(encodings), progress, disable=not progress):
            scores[batch] = self.forward([encodings[i] for i in batch]).cpu()
        return scores

    def __call__(self, /, prompts: list[str], completions: list[str], messages=None, **columns) -> list[float]:
        encodings = self.encode(prompts, completions, messages)
        check_ids((encoding["input_ids"] for encoding in encodings), self.model)
        return self.scores(encodings).tolist()


def load_reward_model(where: str, device="cpu", dtype="float32", new_head: bool = False, **settings) -> RewardModel:
    """The RewardModel of a directory or hub name; with new_head any backbone gets a random head (for training).

    Raises ValueError if it cannot be loaded, or is no reward model: an untrained head, or not one label.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # see rollout.avoid_cudnn_attention
    head = {"num_labels": 1} if new_head else {}
    remedy = f"pass a local checkpoint directory, or train one: python rewards.py --backbone {where}"
    model, tokenizer = pretrained(
        "AutoModelForSequenceClassification", where, "trained reward model", remedy, dtype, new_head=new_head, **head
    )
    labels = model.config.num_labels
    if labels != 1:
        raise ValueError(f"{where} has {labels} labels where a reward model has one; wrap it in a py: function")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: the tokenizer has neither pad nor EOS token; set one in tokenizer_config.json")
    return RewardModel(model.to(device), tokenizer, **settings)


# ---- objectives ----------------------------------------------------------------------------------------------

RESERVED_NAMES = {"disagreement"}  # metrics are called lambda/NAME, and lambda/disagreement is the clients' spread


@dataclass(frozen=True)
class Objective:
    """A reward function under a name; `spec` is what the user wrote."""

    name: str
    spec: str
    function: Callable[..., list[float]]
    cohort: bool = False  # scored in one call for all clients (reward models), else in one for each
    fingerprint: str = ""  # of what it is made of; another one gives other rewards


def parse_spec(text: str) -> tuple[str, str, str]:
    """(name, kind, rest) of `[NAME=]KIND:REST`. Raises ValueError saying what is wrong with it."""
    match = re.fullmatch(r"(?:([^=:]*)=)?([^:=]*):(.+)", text)
    if not match or match[2] not in ("rule", "hf", "py", "group"):
        raise ValueError(
            f"objective {text!r}: write [NAME=]rule:NAME, hf:DIR_OR_HUB, py:FILE.py:FUNCTION or group:PREDICTOR:GROUP"
        )
    name, kind, rest = match.groups()
    if kind == "group" and not re.fullmatch(r".+:.+", rest):
        raise ValueError(f"objective {text!r}: name the group too, as in group:PREDICTOR:GROUP")
    if kind == "py" and not re.fullmatch(r".+:\w+", rest):
        raise ValueError(f"objective {text!r}: name the function too, as in py:FILE.py:FUNCTION")
    if name is None:
        last = rest.rpartition(":")[2]
        name = {"hf": Path(rest).resolve().name, "group": slug(last)}.get(kind, last)
    if name in RESERVED_NAMES:
        raise ValueError(f"objective {text!r}: the metrics use that name; put another NAME= in front")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"objective {text!r}: the name {name!r} may have only A-Z a-z 0-9 _ -; put NAME= in front")
    return name, kind, rest


def load_objectives(specs: list[str], device="cpu", dtype="float32", batch_size: int = 32) -> list[Objective]:
    """The objectives that `[NAME=]SPEC` strings name, in order; the other arguments concern reward models.

    Raises ValueError for a bad spec or two objectives of one name, before any reward model is loaded.
    """
    if not specs:
        raise ValueError("objectives names none: pass at least one [NAME=]SPEC")
    parsed = [(*parse_spec(spec), spec) for spec in specs]
    names = [name for name, *_ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"objectives: two are called {name!r}; tell them apart by NAME=SPEC")
    objectives = {}
    for name, kind, rest, spec in sorted(parsed, key=lambda each: each[1] == "hf"):  # reward models last: they are slow
        with named(f"objective {name!r}"):
            if kind == "hf":
                function = load_reward_model(rest, device, dtype, batch_size=batch_size)
                fingerprint = fingerprint_of(function.model.named_parameters())
            elif kind == "py":
                function, fingerprint = load_function(name, rest)
            elif kind == "group":
                function, fingerprint = group_objective(*rest.rsplit(":", 1))
            elif rest in RULES:
                function, fingerprint = RULES[rest], rest
            else:
                raise ValueError(f"there is no rule {rest!r}; choose from {', '.join(RULES)}")
        objectives[name] = Objective(name, spec, function, kind == "hf", fingerprint)
    return [objectives[name] for name in names]


# ---- scoring -------------------------------------------------------------------------------------------------


def score(
    objectives: list[Objective], prompts: list[Prompt], completions: list[str], completion_ids: list[list[int]],
    holdings: Sequence[tuple[slice, Sequence[int], int]] | None = None,
) -> Tensor:  # fmt: skip
    """Raw rewards [N, M] in float64 of N completions, each with its prompt; NaN where a client lacks the objective.

    holdings: the rows of each client, the indices of the objectives it holds, and its number; None: all is held.
    A function is called once for every client that holds it, a `cohort` objective once for all of them. With several
    processes each calls it for its own clients: one that counts its calls gives other rewards then.

    Raises ValueError naming the objective, the client and the prompt, for anything but one finite number a completion;
    ObjectiveFailed where a function raises.
    """
    if holdings is None:
        holdings = [(slice(None), range(len(objectives)), None)]
    owner = {i: client for rows, _, client in holdings for i in range(len(prompts))[rows]}
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)  # the same for every client
    given = {name: [prompt.columns.get(name) for prompt in prompts] for name in names} | {
        "prompts": [prompt.text for prompt in prompts],
        "completions": completions,
        "completion_ids": completion_ids,
        "messages": [list(prompt.messages) for prompt in prompts],
        "subset": [prompt.subset for prompt in prompts],
    }
    scores = torch.full((len(prompts), len(objectives)), math.nan, dtype=torch.float64)
    for j, objective in enumerate(objectives):
        calls = [range(len(prompts))[rows] for rows, held, _ in holdings if j in held]
        if objective.cohort and calls:
            calls = [[i for rows in calls for i in rows]]
        for rows in calls:
            own = {name: [column[i] for i in rows] for name, column in given.items()}
            scores[rows, j] = _rewards(objective, own, [owner[i] for i in rows])
    return scores


def _rewards(objective: Objective, given: dict[str, list], owners: Sequence[int | None]) -> Tensor:
    """The rewards [n] of one call, float64; the function gets copies, so that it cannot spoil the next one's.

    owners: the client of every row, None where it is nobody's.
    """
    with user_errors(objective.name, objective.spec):
        returned = objective.function(**copy.deepcopy(given))
        single = isinstance(returned, (str, bytes, Mapping)) or getattr(returned, "ndim", 1) == 0
        rewards = list(returned) if isinstance(returned, Iterable) and not single else None
    if rewards is None:
        raise ValueError(
            f"objective {objective.name!r} returned a {type(returned).__name__} for {len(given['prompts'])} "
            "completions; return a list with one number for each"
        )
    if len(rewards) != len(given["prompts"]):
        raise ValueError(
            f"objective {objective.name!r} returned {len(rewards)} rewards for {len(given['prompts'])} completions; "
            "return one for each"
        )
    numbers = torch.full((len(rewards),), math.nan, dtype=torch.float64)
    for i, (reward, prompt, owner) in enumerate(zip(rewards, given["prompts"], owners, strict=True)):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # None, a pair, 10**999 stay NaN
            numbers[i] = math.nan if isinstance(reward, (str, bytes)) else float(reward)
        if not numbers[i].isfinite():
            raise ValueError(
                f"objective {objective.name!r} returned {reward!r} for "
                + ("" if owner is None else f"client {owner} and ")
                + f"the prompt {textwrap.shorten(prompt, 80, placeholder=' ...')!r}; a reward must be a finite number"
            )
    return numbers


# ---- calibration ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """z = (r - mean) / scale for each of M objectives; `constant` marks those that did not vary (scale 1)."""

    mean: Tensor  # [M] float64
    scale: Tensor  # [M] float64
    constant: Tensor  # [M] bool

    def apply(self, scores: Tensor) -> Tensor:
        """Calibrated rewards [..., M] of raw ones; NaN stays NaN."""
        return (scores - self.mean.to(scores)) / self.scale.to(scores)

    def pooled(self) -> "Calibration":
        """One mean and one scale for all objectives, so that their raw order stays: for rewards in one unit. [ours]"""
        variance = torch.where(self.constant, 0.0, self.scale.square()).mean()
        scale = torch.where(variance > 0, variance.sqrt(), 1.0)
        return Calibration(self.mean.mean().expand_as(self.mean), scale.expand_as(self.scale), self.constant)

    def to_dict(self) -> dict[str, list]:
        """As JSON values, which a checkpoint keeps."""
        return {name: tensor.tolist() for name, tensor in vars(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, list]) -> "Calibration":
        """The inverse of `to_dict`."""
        mean, scale = (torch.tensor(saved[name], dtype=torch.float64) for name in ("mean", "scale"))
        return cls(mean, scale, torch.tensor(saved["constant"], dtype=torch.bool))


def calibration_sums(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one client sends of its raw rewards [n, M]: of each objective the number, mean, and sum of squared
    deviations from that mean, [M] each.

    NaN marks what the client does not hold, and counts as nothing.
    """
    held, values = ~scores.isnan(), scores.double()
    n = held.sum(0)
    mean = values.nansum(0) / n.clamp_min(1)
    return n, mean, (values - mean).square().nansum(0)


def combine(sums: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Calibration:
    """The one Calibration of all clients' sums. Raises ValueError for an objective without a sample.

    Squared deviations are added about the joint mean (Chan et al. 1983), so that a small spread about a huge mean is
    not lost to rounding.
    """
    n, means, squares = (torch.stack(each) for each in zip(*sums, strict=True))  # [C, M]
    total = n.sum(0)
    if not total.all():
        which = f"number {int(total.argmin()) + 1} of {len(total)}"
        raise ValueError(f"calibration needs at least one sample of every objective; no client holds {which}")
    mean = (n * means).sum(0) / total
    scale = ((squares + n * (means - mean).square()).sum(0) / total).sqrt()
    constant = scale <= 1e-14 * mean.abs() * total.double().sqrt()  # the rounding of a mean, in float64
    return Calibration(mean, torch.where(constant, 1.0, scale), constant)


if __name__ == "__main__":
    import sys

    from app.reward_training import main

    sys.exit(main())
