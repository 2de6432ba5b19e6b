"""What is good: an objective is a function (prompts, completions, **columns) -> list[float].

That is TRL's convention, so that people's reward functions work unchanged: everything is passed by keyword, plain
strings in, one finite number a completion out. `columns` are the data's own columns (None where a row has none), and
completion_ids, messages and subset. An objective is written `[NAME=]SPEC`, where SPEC is one of

    rule:NAME               one of RULES, below
    hf:DIR_OR_HUB           a reward model, see reward_model.py
    py:FILE.py:FUNCTION     your own function; FILE as seen from the current folder, the project's, or its worlds/

**Calibration** [ours]. Objectives come in unlike units, so each is shifted and scaled to mean 0 and deviation 1 on
samples of the base policy, once. Each client sends (n, S1 = sum r, S2 = sum r^2), and then all use the same

    mean = S1 / n      scale = sqrt(S2 / n - mean^2)      z = (r - mean) / scale

with sums over all clients. An objective that does not vary at all gets scale 1, and the run says so.

`python rewards.py --backbone DIR --pairs FILE... --out DIR` trains a reward model (reward_model.py; --help).
Left out on purpose: asynchronous functions, and TRL's None for "does not apply": a missing reward is an error here.
"""

import importlib.util
import inspect
import math
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app import reward_model
from data import Prompt, to_messages

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


# ---- objectives ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """A reward function under a name; `spec` is what the user wrote."""

    name: str
    spec: str
    function: Callable[..., list[float]]


class ObjectiveFailed(RuntimeError):
    """A user's function raised; the message names the objective, the error and the line, the cause has it all."""


@contextmanager
def blaming(name: str, spec: str) -> Iterator[None]:
    """Foreign code may raise anything: it goes on up, as the cause of an ObjectiveFailed."""
    try:
        yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ObjectiveFailed(
            f"objective {name!r} ({spec}) failed: {reason} (at {frame.filename}:{frame.lineno})"
        ) from error


@contextmanager
def registered(module) -> Iterator[None]:
    """A module being executed must be in sys.modules (dataclasses look there); one that failed must not."""
    sys.modules[module.__name__] = module
    try:
        yield
    except Exception:
        del sys.modules[module.__name__]
        raise


def parse_spec(text: str) -> tuple[str, str, str]:
    """(name, kind, rest) of `[NAME=]KIND:REST`. Raises ValueError saying what is wrong with it."""
    match = re.fullmatch(r"(?:([^=:]*)=)?([^:=]*):(.+)", text)
    if not match or match[2] not in ("rule", "hf", "py"):
        raise ValueError(f"objective {text!r}: write [NAME=]rule:NAME, hf:DIR_OR_HUB or py:FILE.py:FUNCTION")
    name, kind, rest = match.groups()
    if kind == "py" and not re.fullmatch(r".+:\w+", rest):
        raise ValueError(f"objective {text!r}: name the function too, as in py:FILE.py:FUNCTION")
    if name is None:
        name = Path(rest).resolve().name if kind == "hf" else rest.rpartition(":")[2]
    if name == "disagreement":
        raise ValueError(f"objective {text!r}: the metrics use that name; put another NAME= in front")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"objective {text!r}: the name {name!r} may have only A-Z a-z 0-9 _ -; put NAME= in front")
    return name, kind, rest


def load_function(name: str, file: str, attribute: str) -> Callable[..., list[float]]:
    """A user's function; its file is imported once, and may import its neighbours.

    Raises ValueError without such a file or function, or if it does not take what objectives are given.
    """
    root = Path(__file__).parent
    path = next((p.resolve() for p in (Path(file), root / file, root / "worlds" / file) if p.is_file()), None)
    if path is None or path.suffix != ".py":
        raise ValueError(f"objective {name!r}: there is no Python file {file}; write py:FILE.py:FUNCTION")
    module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path)), None)
    if module is None:
        spec = importlib.util.spec_from_file_location(f"objective_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        with blaming(name, f"py:{file}:{attribute}"), registered(module):
            spec.loader.exec_module(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"objective {name!r}: {file} has no function {attribute!r}")
    try:
        given = dict.fromkeys(("prompts", "completions", "completion_ids", "messages", "subset"))
        inspect.signature(function).bind_partial(**given)  # partial: it may ask for columns of the data
    except TypeError as error:
        raise ValueError(
            f"objective {name!r}: {attribute} must take (prompts, completions, **columns) by keyword: {error}"
        ) from error
    return function


def load_objectives(specs: list[str], device="cpu", dtype="float32", batch_size: int = 32) -> list[Objective]:
    """The objectives that `[NAME=]SPEC` strings name, in order; the other arguments concern reward models.

    Raises ValueError for a bad spec or two objectives of one name, before any reward model is loaded.
    """
    if not specs:
        raise ValueError("objectives names none: pass at least one [NAME=]SPEC")
    parsed = [parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"objectives: two are called {name!r}; tell them apart by NAME=SPEC")
    functions = {}
    for name, kind, rest in parsed:
        if kind == "rule":
            if rest not in RULES:
                raise ValueError(f"objective {name!r}: there is no rule {rest!r}; choose from {', '.join(RULES)}")
            functions[name] = RULES[rest]
        elif kind == "py":
            file, _, attribute = rest.rpartition(":")
            functions[name] = load_function(name, file, attribute)
    for name, kind, rest in parsed:
        if kind == "hf":
            try:
                functions[name] = reward_model.load_reward_model(rest, device, dtype, batch_size=batch_size)
            except ValueError as error:
                raise ValueError(f"objective {name!r}: {error}") from error
    return [Objective(name, spec, functions[name]) for name, spec in zip(names, specs, strict=True)]


def score(
    objectives: list[Objective], prompts: list[Prompt], completions: list[str], completion_ids: list[list[int]]
) -> Tensor:
    """Raw rewards [N, M] in float64 of N completions, each with its prompt.

    Raises ValueError naming the objective, and the prompt, for anything but N finite numbers; ObjectiveFailed
    where its function raises.
    """
    names = {name for prompt in prompts for name in prompt.columns} - {"prompts", "completions"}
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
    columns["completion_ids"] = completion_ids
    columns["messages"] = [list(prompt.messages) for prompt in prompts]
    columns["subset"] = [prompt.subset for prompt in prompts]
    texts = [prompt.text for prompt in prompts]
    scores = torch.empty(len(prompts), len(objectives), dtype=torch.float64)
    for j, objective in enumerate(objectives):
        with blaming(objective.name, objective.spec):
            rewards = objective.function(prompts=list(texts), completions=list(completions), **columns)
        rewards = [] if rewards is None else list(rewards)
        if len(rewards) != len(prompts):
            raise ValueError(
                f"objective {objective.name!r} returned {len(rewards)} rewards for {len(prompts)} completions; "
                "return one for each"
            )
        for i, reward in enumerate(rewards):
            number = _number(reward)
            if not math.isfinite(number):
                prompt = textwrap.shorten(texts[i], 80, placeholder=" ...")
                raise ValueError(
                    f"objective {objective.name!r} returned {reward!r} for the prompt {prompt!r}; "
                    "a reward must be a finite number"
                )
            scores[i, j] = number
    return scores


def _number(reward) -> float:
    try:
        return float(reward)
    except (TypeError, ValueError):  # None, a list, a word
        return math.nan


# ---- calibration ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """z = (r - mean) / scale for each of M objectives; `constant` marks those that did not vary (scale 1)."""

    mean: Tensor  # [M] float64
    scale: Tensor  # [M] float64
    constant: Tensor  # [M] bool

    def apply(self, scores: Tensor) -> Tensor:
        """Calibrated rewards [..., M] of raw ones."""
        return (scores - self.mean.to(scores)) / self.scale.to(scores)

    def to_dict(self) -> dict[str, list]:
        return {name: getattr(self, name).tolist() for name in ("mean", "scale", "constant")}

    @classmethod
    def from_dict(cls, saved: dict[str, list]) -> "Calibration":
        mean, scale = (torch.tensor(saved[name], dtype=torch.float64) for name in ("mean", "scale"))
        return cls(mean, scale, torch.tensor(saved["constant"], dtype=torch.bool))


def calibration_sums(scores: Tensor) -> tuple[int, Tensor, Tensor]:
    """What one client sends of its raw rewards [n, M]: n, their sum [M] and the sum of their squares [M]."""
    scores = scores.double()
    return len(scores), scores.sum(0), (scores * scores).sum(0)


def combine(sums: list[tuple[int, Tensor, Tensor]]) -> Calibration:
    """The one Calibration of all clients' sums. Raises ValueError if they hold no sample."""
    n = sum(client[0] for client in sums)
    if n == 0:
        raise ValueError("calibration needs at least one scored sample")
    mean = torch.stack([client[1] for client in sums]).sum(0) / n
    square = torch.stack([client[2] for client in sums]).sum(0) / n
    variance = square - mean * mean
    constant = variance <= 1e-13 * square  # rounding, in float64
    return Calibration(mean, torch.where(constant, torch.ones_like(mean), variance.clamp(min=0).sqrt()), constant)


if __name__ == "__main__":
    reward_model.main()
