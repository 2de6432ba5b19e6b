"""Objectives by their names on the command line: `[NAME=]KIND:REST` becomes a function as `rewards.py` wants it. [ours]

    rule:NAME               one of rewards.RULES
    hf:DIR_OR_HUB           a reward model: a sequence-classification checkpoint with one label
    py:FILE.py:FUNCTION     a user's function; FILE as seen from the current folder, else from the project's
    group:PREDICTOR:GROUP   the share of a group that would choose as the response did (app/predictor.py)

**A user's file** may import its neighbours, modules and packages. Two folders may each have a helper.py, and a
neighbour may be called data.py as the project's is, but Python knows a module by its name alone. So while code of a
folder runs, and only then, the folder comes first on sys.path and its modules stand in sys.modules.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from app.loading import fingerprint, pretrained
from app.predictor import group_objective
from rewards import RULES, Objective, RewardModel, score

ROOT = Path(__file__).resolve().parents[1]
MODULES: dict[Path, dict[str, ModuleType]] = {}  # a user's folder -> the modules imported from it
Loaded = tuple[Callable[..., list[float]], str]  # function, fingerprint


def parse_spec(text: str) -> tuple[str, str, str]:
    """(name, kind, rest) of `[NAME=]KIND:REST`. Raises ValueError if it is none."""
    match = re.fullmatch(r"(?:([A-Za-z0-9_-]+)=)?(\w+):(.+)", text)
    if not match or match[2] not in KINDS:
        raise ValueError(f"objectives: {text!r} is not [NAME=]KIND:REST with a KIND of {', '.join(KINDS)}")
    name, kind, rest = match.groups()
    last = Path(rest).resolve().name if kind == "hf" else rest.rpartition(":")[2]
    name = name or re.sub(r"[^A-Za-z0-9_]+", "-", last).strip("-")
    if name == "disagreement":
        raise ValueError(f"objectives: lambda/{name} is another figure of the log; write NAME={kind}:{rest}")
    return name, kind, rest


def load_objectives(specs: Sequence[str], device: str = "cpu", dtype: str = "float32") -> list[Objective]:
    """The objectives that the specs name, in their order; device and dtype are those of reward models."""
    parsed = [parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in parsed]
    if len(set(names)) < len(names):
        raise ValueError(f"objectives: {', '.join(names)} has a name twice; tell them apart by NAME=KIND:REST")
    loaded = [KINDS[kind](rest, device, dtype) for _, kind, rest in parsed]
    return [Objective(name, spec, *each) for name, spec, each in zip(names, specs, loaded, strict=True)]


def check_prompts(objective: Objective, prompts: Sequence[Any]) -> None:
    """Raise ValueError for a prompt that an objective cannot score: a run would meet it rounds later.

    A reward model only reads it. A user's function, which may take long, is not tried.
    """
    try:
        if isinstance(objective.function, RewardModel):
            for reply in ("yes", ""):
                texts, messages = [prompt.text for prompt in prompts], [prompt.messages for prompt in prompts]
                objective.function.encode(texts, [reply] * len(prompts), messages)
        elif "py:" not in objective.spec or "py:worlds/" in objective.spec:
            score([objective], prompts, ["yes"] * len(prompts), [[0]] * len(prompts))
    except Exception as error:  # templates raise what they like
        if len(prompts) == 1:
            what = f"{objective.name} cannot score {prompts[0].text[:60]!r}"
            raise ValueError(f"prompts: {what} ({error}); drop the row") from error
        for half in (prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]):
            check_prompts(objective, half)


def rule(rest: str, device: str, dtype: str) -> Loaded:
    """`rule:NAME`."""
    if rest not in RULES:
        raise ValueError(f"objectives: there is no rule {rest!r}; choose from {', '.join(RULES)}")
    return RULES[rest], rest


def reward_model(rest: str, device: str, dtype: str) -> Loaded:
    """`hf:DIR_OR_HUB`. Raises ValueError for a checkpoint with several labels."""
    model, tokenizer = pretrained("AutoModelForSequenceClassification", rest, dtype, device)
    if model.config.num_labels != 1:
        raise ValueError(f"objectives: {rest} has {model.config.num_labels} labels, not one; wrap it in a py: function")
    return RewardModel(model, tokenizer), fingerprint(rest)


def users_function(rest: str, device: str, dtype: str) -> Loaded:
    """`py:FILE.py:FUNCTION`. The fingerprint is of all code that the file's folder and worlds/ hold."""
    file, _, name = rest.rpartition(":")
    path = next((p.resolve() for p in (Path(file), ROOT / file) if p.is_file()), None)
    if path is None:
        raise ValueError(f"objectives: there is no file {file!r} here or in the project; write py:FILE.py:FUNCTION")
    folder = ROOT if path.parent in (ROOT, ROOT / "worlds") else path.parent
    module = ".".join(path.relative_to(folder).with_suffix("").parts)  # worlds.toy, or the name of a user's file
    function = run_in(folder, rest, lambda: getattr(importlib.import_module(module), name))
    beside = neighbours(folder) or sorted(path.parent.glob("*.py"))
    code = fingerprint(path, *sorted(ROOT.glob("worlds/*.py")), *beside)
    return lambda **given: run_in(folder, rest, lambda: list(function(**given))), code


@cache
def neighbours(folder: Path) -> list[Path]:
    """The files of a user's modules and packages, as they stand in a folder; none for the project's folder."""
    files = [] if folder == ROOT else folder.rglob("*.py")
    return sorted(file for file in files if file.stem != "__main__" and "site-packages" not in file.parts)


def run_in(folder: Path, rest: str, work: Callable[[], Any]) -> Any:
    """work(), which finds the modules of a user's folder. Raises ValueError from what the user's code raises."""
    others, here = taken_out(folder), os.getcwd()
    sys.modules.update(MODULES.get(folder, {}))
    sys.path.insert(0, str(folder))
    try:
        return work()
    except (Exception, SystemExit) as error:
        own = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename) in neighbours(folder)]
        where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        raise ValueError(f"objective py:{rest} failed{where}: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(here)  # which the run's relative paths need
        sys.path.remove(str(folder))
        MODULES[folder] = taken_out(folder)
        sys.modules.update(others)


def taken_out(folder: Path) -> dict[str, ModuleType]:
    """Modules and packages of the names that a user's folder has, with their parts, taken out of sys.modules."""
    names = {file.relative_to(folder).parts[0].removesuffix(".py") for file in neighbours(folder)}
    whole = {name for name in names if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()}
    # a mere folder yields to a module of its name elsewhere, as numpy
    names = {name for name in names if name in whole or not getattr(sys.modules.get(name), "__file__", None)}
    return {full: sys.modules.pop(full) for full in list(sys.modules) if full.partition(".")[0] in names}


KINDS: dict[str, Callable[[str, str, str], Loaded]] = {
    "rule": rule, "hf": reward_model, "py": users_function, "group": group_objective,
}  # fmt: skip
