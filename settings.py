"""Settings: every module's dataclass put together, the presets, and the command line that fills them in. [ours]

Each module owns its settings as a small dataclass beside the code that reads them; every field is a flag with its help,
and its name is unique. A preset is a set of plain overrides of the defaults. Bad usage ends the program with one line.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

import baselines
import fedmoa
import firm
import grpo
import pluralllm
from app import ranks
from app.fields import Checked, Count, Index, Share, setting
from clients import ClientConfig
from data import DataConfig
from firm import FIRMConfig, Method, TrainingConfig
from lora import LoRAConfig
from pluralllm import PluralConfig
from ppo import PPO, PPOConfig
from rollout import RolloutConfig

METHODS: dict[str, Method] = {  # the one registry: flags, help, sweeps, pictures, experiments, tests
    method.name: method
    for method in (firm.FIRM, firm.MGDA, firm.LINEAR, baselines.MORLHF, baselines.FSMGDA, baselines.FEDCMOO,
                   baselines.SOUPS, fedmoa.FEDMOA, baselines.MINIMUM, baselines.MAXIMUM, baselines.ADAPTIVE)
}  # fmt: skip
LEARNERS = {"ppo": PPO, "group": grpo.Groups, "grpo": grpo.GRPO}
WEIGHTS = {"min-norm": firm.FIRM, "fixed": firm.LINEAR, "hypergradient": fedmoa.FEDMOA}  # whose λ
AGGREGATIONS = {"fedavg": firm.FIRM, "accuracy": fedmoa.FEDMOA}  # whose average
PRESETS = {
    "tiny": {  # the toy world: a laptop CPU, about a minute
        "objectives": ["py:worlds/toy.py:helpful", "py:worlds/toy.py:harmless"],
        "max_new_tokens": 12,
        "lora_rank": 8,
        "lr": 3e-3,
        "kl_coef": 0.01,
        "kl_target": 0.0,
        "threads": 1,
    },
    "tinyllama": {  # the paper's setup; what the paper leaves open is RiC's choice [code] or ours
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "prompts": ["Anthropic/hh-rlhf/harmless-base/train.jsonl.gz", "Anthropic/hh-rlhf/helpful-base/train.jsonl.gz"],
        "objectives": [
            "helpful=hf:Ray2333/gpt2-large-helpful-reward_model",
            "harmless=hf:Ray2333/gpt2-large-harmless-reward_model",
        ],
        "dtype": "bfloat16",
        "reward_dtype": "bfloat16",
        "min_prompt_tokens": 8,
        "max_grad_norm": 0.5,
        "micro_batch_size": 4,
        "eval_batch_size": 128,  # the cohort's size, so that one decoder serves both
    },
    "fedmoa-tiny": {  # the reasoning world: a laptop CPU, about a minute
        "world": "reasoning",
        "method": "fedmoa",
        "objectives": [f"py:worlds/reasoning.py:{name}" for name in ("accuracy", "format", "length")],
        "client_objectives": ["code=accuracy,format"],
        "split": "natural",
        "batch_size": 64,
        "personal_rounds": 4,
        "personal_lr": 1e-3,
        "max_new_tokens": 12,
        "lora_rank": 8,
        "lr": 5e-3,
        "kl_coef": 0.01,
        "kl_target": 0.0,
        "threads": 1,
    },
    "gsm8k": {  # FedMOA on GSM8K, on one GPU; --prompts names its files, --model another model
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "method": "fedmoa",
        "objectives": [f"py:worlds/gsm8k.py:{name}" for name in ("accuracy", "format", "length")],
        "split": "iid",
        "batch_size": 32,
        "max_new_tokens": 256,
        "max_prompt_tokens": 320,
        "dtype": "bfloat16",
        "max_grad_norm": 0.5,
        "micro_batch_size": 4,
        "eval_samples": 4,
        "eval_batch_size": 256,
    },
    "pluralllm-tiny": {  # the preference predictor on the survey world: a laptop CPU, two to three minutes
        "method": "pluralllm",
        "world": "survey",
        "rounds": 100,
        "lr": 1e-3,
        "eval_every": 5,
        "max_grad_norm": 1.0,  # without it the loss jumps up on some seeds, and never comes back
        "min_questions": 5,
        "max_questions": 20,
    },
    "pluralllm": {  # on GlobalOpinionQA; --opinions names its file, --encoder a model that embeds
        "method": "pluralllm",
        "rounds": 100,
        "lr": 3e-4,
        "eval_every": 5,
    },
    "plural-firm-tiny": {  # FIRM on what four groups of the survey world prefer; trains their predictor first, once
        "world": "survey",
        "objectives": [f"group:survey:{centre}-1" for centre in ("north", "south", "east", "west")],
        "split": "iid",
        "batch_size": 64,
        "max_new_tokens": 3,
        "lora_rank": 8,
        "lr": 3e-3,
        "kl_coef": 0.01,
        "kl_target": 0.0,
        "threads": 1,
    },
    "paper": {},  # the fields' defaults: the paper's settings where it states them, else RiC's or ours
}
PRESETS["tinyllama-12gb"] = PRESETS["tinyllama"] | {  # the same training, in smaller pieces
    "sample_batch_size": 32,
    "eval_batch_size": 32,
    "micro_batch_size": 2,
    "reward_batch_size": 8,
}


@dataclass
class RunConfig(Checked):
    """What the run is and where it goes."""

    preset: Literal[tuple(PRESETS)] = setting(
        "tiny", "settings to start from; paper, the defaults of all fields, is what --model alone starts from"
    )
    method: Literal[(*METHODS, pluralllm.NAME)] = setting(
        "firm", "; ".join([*(f"{m.name}: {m.help}" for m in METHODS.values()), f"{pluralllm.NAME}: {pluralllm.HELP}"])
    )
    advantages: Literal[tuple(LEARNERS)] | None = setting(
        None, "how a client learns: ppo, with a critic; group, from --group_size responses to a prompt, without one; "
        "grpo, the same over the group's deviation; the method's own if not given"
    )  # fmt: skip
    weights: Literal[tuple(WEIGHTS)] | None = setting(
        None, "who picks lambda: min-norm, as firm; fixed, as linear; hypergradient, as fedmoa; the method's own if "
        "not given"
    )  # fmt: skip
    aggregation: Literal[tuple(AGGREGATIONS)] | None = setting(
        None, "what clients weigh in the average: fedavg, by their prompts; accuracy, as fedmoa; the method's own if "
        "not given"
    )  # fmt: skip
    objectives: list[str] = setting(
        [], "[NAME=]rule:NAME, hf:DIR_OR_HUB, py:FILE.py:FUNCTION or group:PREDICTOR:GROUP, one or more"
    )
    client_objectives: list[str] = setting(
        [],
        "WHO=NAME,NAME,...: the objectives that some clients hold, WHO a client's number or a task; all if not given",
    )
    world: Literal["toy", "reasoning", "survey"] = setting(
        "toy", "the embedded world that stands in where no --model is given"
    )
    severity: Share = setting(0.0, "reasoning world: share of wrong references in the data of its poor clients")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to run; auto takes a GPU where there is one")
    threads: Index = setting(0, "CPU threads, of pluralllm one a client; 0 leaves torch's choice")
    eval_samples: Count = setting(8, "responses to each held-out prompt, before and after")
    eval_batch_size: Count = setting(256, "rows per batch in the evaluation")
    eval_every: Index = setting(
        0, "rounds from one held-out evaluation to the next, whose adapter is kept (pluralllm: and checkpoint); 0: none"
    )
    adapter: str | None = setting(
        None, "an adapter in PEFT's format to start from; the reference stays the base model; with --rounds 0 it is "
        "evaluated only"
    )  # fmt: skip
    reward_dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "type of the reward models")
    reward_batch_size: Count = setting(32, "rows per batch of a reward model")
    profile: bool = setting(False, "print where the rounds' time goes, and peak memory (a sweep: summary.json)")
    show: Index = setting(4, "held-out prompts whose answers are printed, before and after")
    out: str | None = setting(None, "run directory; the next free one in runs/, by method and preset, if not given")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda was asked for, but torch sees no GPU; use --device cpu")


OWN_SETTINGS = {method.name: type(method.settings) for method in METHODS.values() if method.settings}
SETTINGS = {  # the dataclasses whose fields are flags
    "run": RunConfig, "rollout": RolloutConfig, "data": DataConfig, "firm": FIRMConfig, "client": ClientConfig,
    "ppo": PPOConfig, "lora": LoRAConfig, "plural": PluralConfig, **OWN_SETTINGS,
}  # fmt: skip
TITLES = {  # of the flags' groups in the help
    "run": "the run (run.py)", "rollout": "the policy and its responses (rollout.py)", "data": "prompts (data.py)",
    "firm": "the federation, and firm's own (firm.py)", "client": "a client's step (clients.py)",
    "ppo": "PPO (ppo.py)", "lora": "the adapter (lora.py)", "plural": "the preference predictor (pluralllm.py)",
}  # fmt: skip
EXAMPLES = """Train one adapter for several objectives, by many clients.

  python run.py                                          firm on the toy world, about a minute on a laptop CPU
  python run.py --method linear --preference 0.8 0.2     another method, another preference; every setting is a flag
  python run.py --model DIR --prompts FILE --objectives hf:DIR py:mine.py:polite    your own
  python run.py --preset tinyllama                       a preset; its values are the defaults shown below
"""
PREDICTOR_ONLY = {f.name for f in fields(PluralConfig)}
POLICY_ONLY = {f.name for group in SETTINGS.values() for f in fields(group)} - PREDICTOR_ONLY - {
    "preset", "method", "world", "rounds", "clients_per_round", "lr", "max_grad_norm", "seed", "device", "threads",
    "eval_every", "out",
}  # fmt: skip
REMOVED = {  # settings that older versions wrote into config.json, and their neutral value
    "entropy_coef": 0.0, "gamma": 1.0,
    "value_clip": None, "critic_lr": None,  # there was none: a run with the older critic cannot go on
}  # fmt: skip


@dataclass
class Config(TrainingConfig):
    """The settings of every module, together; `own` are those of the methods that have some, by the method's name."""

    run: RunConfig
    rollout: RolloutConfig
    data: DataConfig
    lora: LoRAConfig
    plural: PluralConfig
    own: dict[str, Any]

    @classmethod
    def of(cls, groups: dict[str, Any]) -> "Config":
        """From one dataclass per name in SETTINGS."""
        own = {name: groups[name] for name in OWN_SETTINGS}
        return cls(**{name: group for name, group in groups.items() if name not in OWN_SETTINGS}, own=own)

    @property
    def method(self) -> Method:
        """The chosen method, with its own settings, and the parts that --advantages, --weights, --aggregation name.

        Raises ValueError for parts that do not go with the method.
        """
        method, run = METHODS[self.run.method], self.run
        parts = {"learner": LEARNERS[run.advantages]} if run.advantages else {}
        for field in ("weights", "aggregation"):
            if getattr(run, field) and method.own_server:
                raise ValueError(f"{field}: {method.name} has a server of its own for that; leave --{field} out")
        if run.weights:
            if method.trainings is not Method.trainings:
                raise ValueError(f"weights: {method.name} has one loss and no weights to pick; leave --weights out")
            donor = WEIGHTS[run.weights]
            parts |= {name: getattr(donor, name) for name in ("weights", "adapt", "takes_preference")}
        if run.aggregation:
            donor = AGGREGATIONS[run.aggregation]
            parts |= {name: getattr(donor, name) for name in ("client_weights", "numbers")}
        method = replace(method, **parts)
        return replace(method, settings=self.own.get("fedmoa" if method.needs_primary else method.name))

    @property
    def front_is_known(self) -> bool:
        """Whether this is the toy world with its own two objectives, whose exact Pareto front is known."""
        toy = not self.rollout.model and self.run.world == "toy"
        return toy and self.run.objectives == PRESETS["tiny"]["objectives"]

    def flat(self) -> dict[str, Any]:
        """Every field by its own name; names are unique."""
        groups = [self.own[name] if name in OWN_SETTINGS else getattr(self, name) for name in SETTINGS]
        return {name: value for group in groups for name, value in asdict(group).items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `flat`. A field that did not exist when the values were written takes its default; one that
        has been removed since is left out with a line. Raises ValueError for an unknown one, and for a removed one
        that had an effect.
        """
        known = {f.name for group in SETTINGS.values() for f in fields(group)}
        for name in sorted(values.keys() - known):
            if name not in REMOVED:
                raise ValueError(f"config: unknown setting {name!r}; was it written by a newer version?")
            if values[name] != REMOVED[name]:
                raise ValueError(f"config: {name} {values[name]} does not exist any more; go on with an older version")
            print(f"note: the setting {name} does not exist any more and is left out; it had no effect")
        if "objectives" in values:  # the embedded world lay at the root once
            moved = [re.sub(r"py:toy\.py:", "py:worlds/toy.py:", spec) for spec in values["objectives"]]
            values = values | {"objectives": moved}
        return cls.of(
            {
                name: group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
                for name, group in SETTINGS.items()
            }
        )


def absolute(config: Config) -> Config:
    """The same settings with the user's files named from the root, so that --resume may be given from anywhere."""
    values = config.flat()
    here = lambda name: str(Path(name).resolve()) if name and Path(name).exists() else name  # noqa: E731

    def spec(text: str) -> str:
        found = re.fullmatch(r"((?:[^=:]*=)?)(hf|py|group):(.+?)(:[^:/]+)?", text)
        if not found or not found[4]:
            return f"{found[1]}hf:{here(found[3])}" if found and found[2] == "hf" else text
        inside = found[2] == "py" and Path(found[3]).resolve().is_relative_to(Path(__file__).parent)
        return text if inside else f"{found[1]}{found[2]}:{here(found[3])}{found[4]}"

    values |= {name: here(values[name]) for name in ("model", "opinions", "encoder", "adapter")}
    linked = lambda name: str(Path(name).parent.resolve() / Path(name).name) if Path(name).exists() else name  # noqa: E731
    values |= {"prompts": [*map(linked, values["prompts"])], "objectives": [*map(spec, values["objectives"])]}
    return Config.from_flat(values)


def parse(arguments: Sequence[str]) -> tuple[Config, Path | None, list[str] | None, list[str] | None]:
    """Command line -> settings, the run directory to go on with, and what --sweep and --compare name (None without).

    The last two are no settings of a run; `sweep.plan` reads them. Ends the program on bad usage.
    """
    one_line = lambda message: parser.exit(2, f"run.py: error: {message}\n" * ranks.first())  # noqa: E731 - no usage
    first, parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False), flag_parser()
    for flag in ("--preset", "--resume", "--model"):
        first.add_argument(flag)
    parser.error = first.error = one_line
    early, others = first.parse_known_args(arguments)
    flags = {a.split("=")[0] for a in others if a.startswith("-")}
    try:
        if early.resume is not None:
            if flags & {"--sweep", "--compare"}:
                raise ValueError("resume: a sweep goes on by its own command with --out naming its directory")
            if early.preset or early.model or flags - {"--rounds"}:
                raise ValueError("resume: a run goes on with its own settings; only --rounds may stand beside --resume")
            parser.set_defaults(**saved_settings(Path(early.resume)).flat())
        else:
            preset = early.preset or ("paper" if early.model else "tiny")
            if preset in PRESETS:
                parser.set_defaults(preset=preset, **PRESETS[preset])
        *groups, rest, unknown = parser.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown option or value: {unknown[0]}; see --help")
        if rest.compare and "--method" in flags:
            raise ValueError("compare: it names the methods itself; leave --method out")
        if rest.sweep and "--preference" in flags:
            raise ValueError("sweep: it names the preferences itself; leave --preference out")
        config = Config.of(dict(zip(SETTINGS, groups, strict=True)))
        idle = {flag[2:] for flag in flags} & (POLICY_ONLY if config.run.method == pluralllm.NAME else PREDICTOR_ONLY)
        if idle:
            raise ValueError(f"{min(idle)}: {config.run.method} does not read it; leave --{min(idle)} out")
        return absolute(config), Path(rest.resume) if rest.resume else None, rest.sweep, rest.compare
    except ValueError as error:
        parser.error(str(error))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The examples as they are, and a default only where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says = action.default not in (None, "", [], argparse.SUPPRESS) and "--no_" not in action.option_strings[0]
        return super()._get_help_string(action) if says else action.help


def flag_parser() -> HfArgumentParser:
    """A flag for every setting, one spelling each, in groups by module; before them the commands, no settings."""
    for module, group in SETTINGS.items():
        group._argument_group_name = TITLES.get(module, f"{module}'s own")
    parser = HfArgumentParser(
        list(SETTINGS.values()), prog="run.py", usage="python run.py [--FLAG VALUE ...]", allow_abbrev=False,
        formatter_class=Help, description=EXAMPLES,
    )  # fmt: skip
    commands = parser.add_argument_group("commands")
    parser._action_groups.insert(2, parser._action_groups.pop())  # behind argparse's own two
    for flag in [flag for flag in parser._option_string_actions if "-" in flag[2:]]:  # its second spelling of each
        parser._option_string_actions.pop(flag).option_strings.remove(flag)
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"the opposite of --{action.dest}"
        if action.metavar is None and action.choices is None and action.nargs != "?":
            action.metavar = {int: "N", float: "X"}.get(action.type, "TEXT")
    commands.add_argument(
        "--resume", metavar="RUN", help="go on with a run directory; only --rounds may stand beside it"
    )
    commands.add_argument(
        "--sweep", nargs="+", metavar="P", help="a run per preference: 0.3 is (0.3, 0.7); a:b:c for any objectives"
    )
    commands.add_argument(
        "--compare", nargs="+", metavar="METHOD", help="these methods side by side, soups among them; with --sweep too"
    )
    return parser


def saved_settings(run: Path) -> Config:
    """The settings in a run directory. Raises ValueError where there are none."""
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(f"resume: {file} is missing; name a run directory")
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"resume: {file} holds no settings ({error}); put it back, or start a new run") from error
    return Config.from_flat(found)
