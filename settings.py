"""Every setting once: its default, its help, its limits, its source. The bottom of the house: it imports nothing of it.

`Config` is flat, `config.lr`; its base classes group the fields by what reads them, and each can stand alone, so that a
test of the loss writes `UpdateSettings(clip_range=0.1)`. Presets: presets.toml; flags: app/options.py.
[paper] is FIRM's; [code] public code, mostly RiC's MORLHF; [ours] our choice where the sources are silent.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

HUGE = 1e30  # beyond it 32-bit numbers overflow in one product


def setting(
    default: Any, help: str, low: float | None = None, above: float | None = None, high: float = HUGE,
    choices: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """A field with one line of help. A number lies in [low, high] or (above, high]; a text is one of the choices."""
    metadata = {"help": help, "low": low, "above": above, "high": high, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(settings: Any) -> None:
    """Raise ValueError naming the field whose value is of another type than its default's, or outside its limits."""
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value, options, limits = getattr(settings, f.name), get_args(hints[f.name]) or (hints[f.name],), f.metadata
        if value is None and type(None) in options:
            continue
        if get_origin(hints[f.name]) is list or any(get_origin(option) is list for option in options):
            if not isinstance(value, list):
                raise ValueError(f"{f.name}: {value!r} is not a list; see --help")
            continue
        kinds = (*options, int) if float in options else options
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{f.name}: {value!r} is of another type; see --help")
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{f.name}: {value!r} is none of {', '.join(limits['choices'])}")
        low, above, high = limits["low"], limits["above"], limits["high"]
        if (low is not None or above is not None) and not (
            math.isfinite(value) and (value > above if low is None else value >= low) and value <= high
        ):
            lowest = f"at least {low:g}" if low is not None else f"above {above:g}"
            raise ValueError(f"{f.name}: {value} must be {lowest}" + f" and at most {high:g}" * (high < 2**63))


class Settings:
    """Base of the groups: a group checks itself, whoever makes it, a flag, a file, or a test."""

    def __post_init__(self) -> None:
        check(self)


@dataclass
class RunSettings(Settings):
    """the run (run.py)"""

    preset: str = setting("tiny", "settings to start from (presets.toml); if not given tiny, or paper with --model")
    seed: int = setting(0, "equal seeds give equal runs, bit for bit on a CPU", low=0, high=2**63 - 1)
    out: str | None = setting(None, "run directory; the next free one in runs/ if not given")
    device: str = setting("auto", "where to run; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice", low=0)
    eval_samples: int = setting(8, "responses to each held-out prompt, before and after", low=1)
    eval_every: int = setting(0, "rounds between held-out evaluations, whose adapters are kept; 0: none", low=0)
    adapter: str | None = setting(None, "adapter in PEFT's format to start from; the base model stays the reference")
    diagnostics: bool = setting(False, "also log drift and stationarity, and keep the Gram matrices in grams/")
    profile: bool = setting(False, "print where the rounds' time goes, and peak memory")


@dataclass
class ModelSettings(Settings):
    """the policy, its adapter, its responses (rollout.py, lora.py)"""

    model: str = setting("toy", "checkpoint directory or hub name, or an embedded world: toy, reasoning, survey")
    dtype: str = setting("float32", "type of all frozen weights", choices=("float32", "bfloat16", "float16"))
    max_new_tokens: int = setting(128, "response length L, in tokens", low=1)
    temperature: float = setting(1.0, "sampling temperature, also that of every log-prob", above=0)
    gradient_checkpointing: bool = setting(False, "recompute states in the backward pass: less memory, more time")
    lora_rank: int = setting(16, "rank r of every adapter [paper: 16]", low=1)
    lora_alpha: float | None = setting(None, "numerator of the scale alpha / r; 2r if not given [ours]", above=0)
    lora_targets: list[str] = setting(["all-linear"], "modules to adapt, e.g. q_proj; all-linear: all but the head")

    @property
    def lora_scale(self) -> float:
        """The factor in front of B A x."""
        return (2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha) / self.lora_rank


@dataclass
class DataSettings(Settings):
    """prompts and objectives (data.py, rewards.py)"""

    prompts: list[str] = setting([], ".jsonl, .jsonl.gz or .csv files, local or on the hub: HH-RLHF, TRL or GSM8K rows")
    objectives: list[str] = setting([], "[NAME=]rule:NAME, hf:DIR_OR_HUB, py:FILE.py:FUNCTION, group:PREDICTOR:GROUP")
    client_objectives: list[str] = setting([], "CLIENT_OR_TASK=NAME,NAME: what some clients hold; all if not given")
    held_out: int = setting(128, "prompts that no client trains on, for evaluation", low=1)
    max_prompt_tokens: int = setting(256, "drop longer prompts [code: RiC]", low=1)
    split: str = setting("dirichlet", "deal prompts: iid, dirichlet over subsets; files, subset, COLUMN: a client each")
    dirichlet_alpha: float = setting(1.0, "split=dirichlet: small gives each client one subset, large is iid", above=0)
    severity: float = setting(0.0, "reasoning world: share of wrong references at its poor clients", low=0, high=1)


@dataclass
class FederationSettings(Settings):
    """the federation, and FIRM's own (firm.py)"""

    method: str = setting("firm", "what clients and server do")
    rounds: int = setting(16, "T, communication rounds [paper: 16]; 0 evaluates only", low=0)
    clients: int = setting(8, "N, clients that hold prompts [paper: 8]", low=1)
    clients_per_round: int | None = setting(None, "clients sampled per round; all if not given", low=1)
    client_dropout: float = setting(0.0, "probability that a sampled client vanishes from the round", low=0, high=1)
    batch_size: int = setting(16, "responses per client and round [paper: 16]", low=1)
    group_size: int | None = setting(None, "S, responses to a prompt; if not given 1 [paper], 4 without critic", low=1)
    beta: float = setting(0.01, "weight of the regulariser [paper: 0.01]; 0 is MGDA", low=0)
    preference: list[float] | None = setting(None, "p, a weight per objective; uniform if not given")
    server_lr: float = setting(1.0, "server rate; 1 is plain FedAvg", above=0)


@dataclass
class UpdateSettings(Settings):
    """a client's local update (ppo.py, clients.py)"""

    advantages: str | None = setting(None, "how a client learns; the method's own if not given")
    lr: float = setting(2e-4, "client learning rate [ours]", low=0)
    optimizer: str = setting("adam", "client optimizer, fresh every round [ours]", choices=("adam", "sgd"))
    max_grad_norm: float | None = setting(None, "clip the combined gradient to this norm", above=0)
    epochs: int = setting(3, "K, optimizer steps on each batch [paper: 3]", low=1)
    clip_range: float = setting(0.2, "epsilon of the clipped surrogate [ours: the usual 0.2]", above=0)
    gae_lambda: float = setting(0.95, "GAE: 0 trusts the critic, 1 the sampled return [ours]", low=0, high=1)
    kl_coef: float = setting(0.2, "kappa, weight of the KL in the reward, at the start [code: RiC, 0.2]", low=0)
    kl_target: float = setting(3.0, "nats per response that kappa adapts to; 0 keeps kappa [code: RiC, 3]", low=0)
    micro_batch_size: int | None = setting(None, "rows per forward pass; the whole client batch if not given", low=1)


@dataclass
class MethodSettings(Settings):
    """parts of methods (baselines.py, fedmoa.py)"""

    weights: str | None = setting(None, "who picks lambda; the method's own if not given")
    aggregation: str | None = setting(None, "what clients weigh in the average; the method's own if not given")
    hyper_rate: float = setting(2.0, "how far a cosine of 1 moves log w in a round [ours]", low=0)
    accuracy_power: float = setting(1.0, "gamma, the power of a client's accuracy [ours]", low=0)
    personal_rounds: int = setting(0, "local rounds of every client on its own after the last one [ours]", low=0)


@dataclass
class PredictorSettings(Settings):
    """the preference predictor (pluralllm.py)"""

    opinions: str | None = setting(None, "file of survey answers; the survey world's if not given")
    encoder: str | None = setting(None, "checkpoint whose mean hidden states embed texts")
    train_groups: list[str] = setting([], "groups that train, a client each; the public code's or the world's")
    unseen_groups: list[str] = setting([], "groups that are only evaluated; likewise")
    central: bool = setting(True, "beside it, the same training with all groups in one place")
    local_steps: int = setting(6, "Adam steps of a client in a round [code: 6]", low=1)
    questions: list[int] = setting([9, 90], "least and most questions of a context, and of its targets [code: 9 90]")


@dataclass
class Config(
    PredictorSettings, MethodSettings, UpdateSettings, FederationSettings, DataSettings, ModelSettings, RunSettings
):
    """All settings of a run; every field is a flag of `run.py`."""


GROUPS = Config.__mro__[-3:0:-1]  # the base classes, as the help shows them
