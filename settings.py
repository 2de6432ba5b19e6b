"""Settings: every module's dataclass put together, the presets, and the command line that fills them in. [ours]

Each module owns its settings as a small dataclass beside the code that reads them; every field is a flag with its help,
and its name is unique. A preset is a set of plain overrides of the defaults. Bad usage ends the program with one line.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from transformers import HfArgumentParser

import baselines
import firm
from baselines import FedCMOOConfig
from data import DataConfig
from firm import FIRMConfig, Method
from lora import LoRAConfig
from ppo import PPOConfig
from rollout import RolloutConfig

METHODS: dict[str, Callable[["Config"], Method]] = {
    "firm": lambda config: firm.FIRM,
    "mgda": lambda config: firm.MGDA,
    "linear": lambda config: firm.LINEAR,
    "morlhf": lambda config: baselines.MORLHF,
    "fsmgda": lambda config: baselines.FSMGDA,
    "fedcmoo": lambda config: baselines.fedcmoo(config.fedcmoo),
}
TOY_OBJECTIVES = ["py:worlds/toy.py:helpful", "py:worlds/toy.py:harmless"]

PRESETS = {
    "tiny": {  # the embedded world: a laptop CPU, about a minute
        "objectives": TOY_OBJECTIVES,
        "max_new_tokens": 12,
        "lora_rank": 8,
        "lr": 3e-3,
        "critic_lr": 1e-2,
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
    "paper": {},  # the fields' defaults: the paper's settings where it states them, else RiC's or ours
}
PRESETS["tinyllama-12gb"] = PRESETS["tinyllama"] | {  # the same training, in smaller pieces
    "sample_batch_size": 32,
    "eval_batch_size": 32,
    "micro_batch_size": 2,
    "reward_batch_size": 8,
}


@dataclass
class RunConfig:
    """What the run is and where it goes."""

    preset: str = field(
        default="tiny",
        metadata={"help": "tiny, tinyllama, tinyllama-12gb, or paper: no preset, the default where --model is given"},
    )
    method: str = field(
        default="firm",
        metadata={
            "help": "firm, mgda (firm with beta 0), linear (fixed weights), morlhf, fsmgda, fedcmoo; soups with --sweep"
        },
    )
    objectives: list[str] = field(
        default_factory=list, metadata={"help": "[NAME=]rule:NAME, hf:DIR_OR_HUB or py:FILE.py:FUNCTION, one or more"}
    )
    seed: int = field(default=0, metadata={"help": "equal seeds give equal runs, bit for bit on a CPU"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})
    eval_samples: int = field(default=8, metadata={"help": "responses to each held-out prompt, before and after"})
    eval_batch_size: int = field(default=256, metadata={"help": "rows per batch in the evaluation"})
    reward_dtype: str = field(
        default="float32", metadata={"help": "type of the reward models: float32, bfloat16 or float16"}
    )
    reward_batch_size: int = field(default=32, metadata={"help": "rows per batch of a reward model"})
    profile: bool = field(
        default=False, metadata={"help": "print where the rounds' time goes, and peak memory (a sweep: summary.json)"}
    )
    show: int = field(default=4, metadata={"help": "held-out prompts whose answers are printed, before and after"})
    out: str | None = field(
        default=None, metadata={"help": "run directory; the next free runs/METHOD-PRESET if not given"}
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is none of {', '.join(PRESETS)}")
        if self.method not in (*METHODS, "soups"):
            raise ValueError(f"method: {self.method!r} is none of {', '.join(METHODS)}; or soups, with --sweep")
        if self.reward_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"reward_dtype: {self.reward_dtype!r} is none of float32, bfloat16, float16")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: {self.device!r} is none of auto, cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda was asked for, but torch sees no GPU; use --device cpu")
        for name, least in (("seed", 0), ("threads", 0), ("eval_samples", 1), ("eval_batch_size", 1),
                            ("reward_batch_size", 1), ("show", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {least}")


SETTINGS = {
    "run": RunConfig,
    "rollout": RolloutConfig,
    "data": DataConfig,
    "firm": FIRMConfig,
    "ppo": PPOConfig,
    "lora": LoRAConfig,
    "fedcmoo": FedCMOOConfig,
}


@dataclass
class Config:
    """The settings of every module, together."""

    run: RunConfig
    rollout: RolloutConfig
    data: DataConfig
    firm: FIRMConfig
    ppo: PPOConfig
    lora: LoRAConfig
    fedcmoo: FedCMOOConfig

    def flat(self) -> dict:
        """Every field by its own name; names are unique."""
        return {name: value for group in SETTINGS for name, value in asdict(getattr(self, group)).items()}

    @classmethod
    def from_flat(cls, values: dict) -> "Config":
        """The inverse of `flat`; fields that are not given take their defaults."""
        known = {f.name for group in SETTINGS.values() for f in fields(group)}
        if values.keys() - known:
            raise ValueError(f"config: unknown field {sorted(values.keys() - known)[0]!r}")
        return cls(**{
            name: group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
            for name, group in SETTINGS.items()
        })  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[Config, Path | None, list[str] | None, list[str] | None]:
    """Command line -> settings, the run directory to go on with, and what --sweep and --compare name (None without).

    The last two are no settings of a run; `sweep.plan` reads them. Ends the program on bad usage.
    """
    one_line = lambda message: parser.exit(2, f"run.py: error: {message}\n")  # noqa: E731 - without the usage
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--resume", "--model"):
        first.add_argument(flag)
    parser = HfArgumentParser(
        list(SETTINGS.values()),
        prog="run.py",
        allow_abbrev=False,
        description="Train one adapter for several objectives.",
    )
    parser.error = first.error = one_line
    early, others = first.parse_known_args(arguments)
    flags = {a.split("=")[0] for a in others if a.startswith("-")}
    parser.add_argument("--resume", metavar="RUN", help="go on with a run directory; only --rounds may stand beside it")
    parser.add_argument(
        "--sweep", nargs="+", metavar="P", help="a run per preference: 0.3 is (0.3, 0.7); a:b:c for any objectives"
    )
    parser.add_argument(
        "--compare", nargs="+", metavar="METHOD", help="these methods side by side, soups among them; with --sweep too"
    )
    try:
        if early.resume is not None:
            if flags & {"--sweep", "--compare"}:
                raise ValueError("resume: a sweep goes on by its own command with --out naming its directory")
            if early.preset or early.model or flags - {"--rounds"}:
                raise ValueError("resume: a run goes on with its own settings; only --rounds may stand beside --resume")
            parser.set_defaults(**saved_settings(Path(early.resume)))
        else:
            preset = early.preset or ("paper" if early.model else "tiny")
            if preset in PRESETS:
                parser.set_defaults(preset=preset, **PRESETS[preset])
        *rooms, rest, unknown = parser.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown option or value: {unknown[0]}; see --help")
        if rest.compare and "--method" in flags:
            raise ValueError("compare: it names the methods itself; leave --method out")
        if rest.sweep and "--preference" in flags:
            raise ValueError("sweep: it names the preferences itself; leave --preference out")
        config = Config(**dict(zip(SETTINGS, rooms, strict=True)))
        return config, Path(rest.resume) if rest.resume else None, rest.sweep, rest.compare
    except ValueError as error:
        parser.error(str(error))


def saved_settings(run: Path) -> dict:
    """The settings in a run directory. Raises ValueError where it holds no run that can go on."""
    for file in ("config.json", "checkpoint/state.safetensors"):
        if not (run / file).is_file():
            raise ValueError(f"resume: {run / file} is missing; name a run directory with a checkpoint")
    return json.loads((run / "config.json").read_text("utf-8"))
