"""Every method by name, the parts that a flag puts into one, and settings that do not go together. [ours]"""

from dataclasses import replace

import baselines
import fedmoa
import firm
import grpo
import ppo
from fedavg import FEDAVG
from firm import Method
from settings import Config

METHODS: dict[str, Method] = {  # the one registry: flags, help, sweeps, pictures, experiments, tests
    method.name: method
    for method in (firm.FIRM, firm.MGDA, firm.LINEAR, baselines.MORLHF, baselines.FSMGDA, baselines.FEDCMOO,
                   baselines.SOUPS, fedmoa.FEDMOA, baselines.MINIMUM, baselines.MAXIMUM, baselines.ADAPTIVE)
}  # fmt: skip
PARTS = {  # what a flag of that name puts into a method: the field of `Method`, and the choices
    "advantages": ("estimator", {part.name: part for part in (ppo.CRITIC, grpo.GROUP, grpo.GRPO)}),
    "weights": ("weights", {part.name: part for part in (firm.MIN_NORM, firm.FIXED, fedmoa.HYPERGRADIENT)}),
    "aggregation": ("aggregation", {part.name: part for part in (FEDAVG, fedmoa.ACCURACY)}),
}
EMBEDDED = {"toy": "tiny", "reasoning": "fedmoa-tiny", "survey": "plural-firm-tiny"}  # worlds, and their presets
PREDICTOR = "pluralllm"  # the one value of --method that trains no policy


def method_of(config: Config) -> Method:
    """The chosen method, with the parts that --advantages, --weights and --aggregation name, or a ValueError."""
    if config.method not in METHODS:
        raise ValueError(f"method: {config.method!r} is none of {', '.join(METHODS)}, {PREDICTOR}")
    method = METHODS[config.method]
    for flag, (field, choices) in PARTS.items():
        if name := getattr(config, flag):
            if name not in choices:
                raise ValueError(f"{flag}: {name!r} is none of {', '.join(choices)}")
            if flag == "weights" and method.weights.name not in choices:
                raise ValueError(f"weights: {method.name} has its own; start from --method linear")
            method = replace(method, **{field: choices[name]})
    return method


def settings_of(method: Method) -> set[str]:
    """The settings that this method's parts read, of those that only some parts read."""
    parts = (method.trainings, method.estimator, method.weights, method.aggregation)
    return {name for part in parts for name in part.settings}


def check(config: Config) -> None:
    """Raise ValueError for settings that do not go together, before anything is loaded."""
    method, M = method_of(config), len(config.objectives)
    if method.several_runs:
        raise ValueError(f"method: {method.name} is several runs; add --sweep 0.1 0.5 0.9, or use --compare")
    if not M:
        raise ValueError("objectives: name at least one, as [NAME=]rule:NAME, hf:DIR_OR_HUB or py:FILE.py:FUNCTION")
    if M > 8 and method.weights in (firm.MIN_NORM, firm.UNREGULARISED):
        raise ValueError(f"objectives: {M} are too many for min-norm weights; name at most 8, or use --weights fixed")
    if config.preference is not None and len(config.preference) != M:
        raise ValueError(f"preference: {len(config.preference)} numbers for {M} objectives; give one for each")
    if (config.clients_per_round or 1) > config.clients:
        raise ValueError(f"clients_per_round: {config.clients_per_round} is more than clients, {config.clients}")
    if config.personal_rounds and method.server.equal_objectives:
        raise ValueError(f"personal_rounds: {method.name} leaves a client nothing to train alone; use 0")
    if config.diagnostics and config.client_objectives:
        raise ValueError("diagnostics: it compares clients on all objectives; leave --client_objectives out")
    if config.severity and (config.model != "reasoning" or config.split != "client"):
        raise ValueError("severity: only the reasoning world has poor clients; add --model reasoning --split client")
    if config.model not in EMBEDDED and not config.prompts:
        raise ValueError("prompts: name the files that go with --model, as --prompts FILE...")
    firm.responses_per_prompt(config, method.estimator)
