"""The command line that fills `settings.Config`. [ours]

Every setting is a flag. A preset (presets.toml) overrides defaults, and a flag overrides the preset. A flag that the
chosen method does not read is refused, since it would look as if it had an effect.
"""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import UnionType
from typing import NoReturn, get_args, get_origin, get_type_hints

from app.files import read_json
from methods import EMBEDDED, METHODS, PARTS, PREDICTOR, method_of, settings_of
from settings import GROUPS, Config, PredictorSettings

FREE = {  # settings that may change within a run: how far it goes, what it shows, and what fits into the memory
    "rounds", "eval_every", "profile", "threads", "device", "diagnostics", "micro_batch_size", "gradient_checkpointing",
}  # fmt: skip
PREDICTOR_READS = {f.name for f in fields(PredictorSettings)} | {
    "preset", "method", "model", "rounds", "clients_per_round", "lr", "max_grad_norm", "seed", "device",
    "eval_every", "out",
}  # fmt: skip
COMMON = {  # in a comparison: what base model and held-out prompts depend on, and what is given in another place
    "preset", "seed", "out", "eval_samples", "model", "dtype", "max_new_tokens", "temperature", "prompts", "objectives",
    "held_out", "max_prompt_tokens", "split", "method", "preference", "resume", "sweep", "compare",
}  # fmt: skip
PRESETS = tomllib.loads((Path(__file__).parents[1] / "presets.toml").read_text("utf-8"))


def idle(config: Config, given: set[str]) -> set[str]:
    """Those of the given settings that a run does not read."""
    if config.method == PREDICTOR:
        return given - PREDICTOR_READS
    some = set().union(*map(settings_of, METHODS.values())) - settings_of(method_of(config))
    some |= {f.name for f in fields(PredictorSettings)}
    some |= set() if config.split == "dirichlet" else {"dirichlet_alpha"}
    return given & some


def refuse_idle(runs: Sequence[Config], given: set[str]) -> None:
    """Raise ValueError for a flag that was given and that none of these runs reads."""
    if unread := set.intersection(*(idle(config, given) for config in runs)):
        name, who = min(unread), " or ".join(dict.fromkeys(config.method for config in runs))
        raise ValueError(f"{name}: {who} does not read it with these settings; leave --{name} out")


def parse(arguments: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Command line -> settings, and `resume`, `sweep`, `compare`. Raises ValueError for what does not go together."""
    given = vars(flag_parser().parse_args(arguments))
    commands = argparse.Namespace(**{name: given.pop(name, None) for name in ("resume", "sweep", "compare")})
    if commands.resume:
        if given.keys() - FREE or commands.sweep or commands.compare:
            raise ValueError(f"resume: a run goes on with its own settings, but for {', '.join(sorted(FREE))}")
        return Config(**read_json(Path(commands.resume, "config.json")) | given), commands
    if commands.compare and "method" in given:
        raise ValueError("compare: it names the methods itself; leave --method out")
    if commands.sweep and "preference" in given:
        raise ValueError("sweep: it names the preferences itself; leave --preference out")
    if (world := given.get("model")) in EMBEDDED and world != "toy" and not {"preset", "objectives"} & given.keys():
        raise ValueError(f"preset: --model {world} goes with a preset, such as {EMBEDDED[world]}, or with --objectives")
    preset = given.get("preset", "tiny" if given.get("model", "toy") in EMBEDDED else "paper")
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is none of {', '.join(PRESETS)}")
    config = Config(**PRESETS[preset] | given | {"preset": preset})
    if config.method == PREDICTOR and (commands.sweep or commands.compare):
        raise ValueError(f"method: {PREDICTOR} trains no policy; leave --sweep and --compare out")
    runs = [variant(config, text) for text in commands.compare] if commands.compare else [config]
    refuse_idle(runs, set(given))
    return config, commands


def variant(config: Config, text: str) -> Config:
    """The settings of a comparand, `METHOD NAME=VALUE …`, lists with commas. Raises ValueError for one out of place."""
    name, *changes = text.split()
    words = [word for change in changes for word in f"--{change}".replace("=", ",", 1).split(",")]
    given = vars(flag_parser().parse_args(words))
    if common := given.keys() & COMMON:
        raise ValueError(f"compare: {text!r} sets {min(common)}, which all runs share; give it as --{min(common)}")
    changed = replace(config, method=name, **given)
    refuse_idle([changed], set(given))
    return changed


def front_is_known(config: Config) -> bool:
    """Whether this is the toy world with its own two objectives, whose exact Pareto front is known."""
    return config.model == "toy" and config.objectives == PRESETS["tiny"]["objectives"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose flags that are not given leave no trace."""

    def __init__(self, prog: str, description: str) -> None:
        usage, nothing = f"python {prog} [--FLAG VALUE ...]", argparse.SUPPRESS
        super().__init__(prog, usage, description, allow_abbrev=False, argument_default=nothing)

    def error(self, message: str) -> NoReturn:
        """End the program, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_settings(self, group: type, explained: dict[str, list[str]]) -> None:
        """A flag for every field of a dataclass of settings; explained: what its choices mean."""
        titled, hints = self.add_argument_group(group.__doc__), get_type_hints(group)
        for f in fields(group):
            text = "; ".join([f.metadata["help"], *explained.get(f.name, [])])
            text += f" (default: {f.default})" if f.default not in (None, False, MISSING) else ""
            hint = get_args(hints[f.name])[0] if get_origin(hints[f.name]) is UnionType else hints[f.name]  # X | None
            form = {"nargs": "+"} if get_origin(hint) is list else {}
            kind = get_args(hint)[0] if form else hint
            form |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
            form = {"action": argparse.BooleanOptionalAction} if kind is bool else form
            titled.add_argument(f"--{f.name}", help=text.replace("%", "%%"), **form)


def flag_parser() -> Parser:
    """The flags of `run.py`: the commands, then a flag for every setting, in groups."""
    parser = Parser("run.py", "Train one adapter for several objectives. The defaults below are preset paper's.")
    commands = parser.add_argument_group("commands")
    commands.add_argument("--resume", metavar="RUN", help="go on with a run directory, with more rounds, say")
    commands.add_argument("--sweep", nargs="+", metavar="P", help="a run per preference: 0.3 is (0.3, 0.7); or a:b:c")
    commands.add_argument("--compare", nargs="+", metavar="METHOD", help="side by side: firm linear 'firm beta=1'")
    explained = {flag: [f"{p.name}: {p.help}" for p in choices.values()] for flag, (_, choices) in PARTS.items()}
    methods = [f"{method.name}: {method.help}" for method in METHODS.values()]
    explained |= {"method": [*methods, f"{PREDICTOR}: a predictor of preferences"], "preset": [", ".join(PRESETS)]}
    for group in GROUPS:
        parser.add_settings(group, explained)
    return parser
