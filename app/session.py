"""A run's parts, loaded and checked: policy, objectives, prompts, federation; and their evaluation. [ours]

`Session(config)` finds all that can be wrong before any long work, and `evaluate` measures the policy as it stands on
prompts that no client trains on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import clients
import data
import fedmoa
import mgda
import rewards
from app import quiet_libraries, ranks
from app.checkpoint import (
    check_unchanged,
    federation_state,
    read_state,
    restore_federation,
    what_is_fixed,
    write_state,
)
from app.loading import check_ids, fingerprint_of, named
from app.stopwatch import phase
from data import Prompt
from firm import Federation, Method
from rollout import Policy, Rollout, context_of, load_model
from settings import Config
from worlds import reasoning, survey, toy


@dataclass
class Evaluation:
    """What a policy answered to n held-out prompts, S times each."""

    scores: Tensor  # [n, S, M] raw, float64
    kl: Tensor  # [n, S] nats per response
    texts: list[str]  # each prompt's first answer


class Session:
    """Everything a run needs. Raises ValueError where something is wrong with the settings or what they name."""

    def __init__(self, config: Config, progress: bool = True) -> None:
        self.config, self.progress = config, progress and ranks.first()
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.device = config.run.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            ranks.take_gpu()
        check(config)
        quiet_libraries()
        self.base_model, files, specs = config.rollout.model, config.data.prompts, config.run.objectives
        if not self.base_model and config.run.world == "survey":
            made = survey.prepare(config.firm.seed, progress=progress)
            self.base_model, files = str(made.model), files or [str(made.prompts)]
            from app import predictor_run  # here: it reports as a run does, and a run's report reads sessions

            specs = predictor_run.of_the_world(specs, config.firm.seed, progress)
        self.objectives = rewards.load_objectives(
            specs, self.device, config.run.reward_dtype, config.run.reward_batch_size
        )
        self.names = [objective.name for objective in self.objectives]
        self.primary = clients.primary_of(config.firm.primary, self.names)
        if not self.base_model:
            if config.run.world == "reasoning":
                made = reasoning.prepare(config.run.severity, config.firm.seed, progress=progress)
            else:
                made = toy.prepare(progress=progress)
            self.base_model, files = str(made[0]), files or [str(made[1])]
        model, tokenizer = load_model(self.base_model, config.rollout.dtype, self.device)
        context, L = context_of(model.config), config.rollout.max_new_tokens
        if context is not None and context <= L:
            raise ValueError(f"max_new_tokens: {L} leaves no room in a context of {context}")
        prompts, self.counts = data.load_prompts(
            files, tokenizer, config.data.min_prompt_tokens, config.data.max_prompt_tokens,
            None if context is None else context - L, config.data.question_template,
        )  # fmt: skip
        with named("model"):
            check_ids([prompt.token_ids for prompt in prompts], model)
        self.shares, self.held_out = data.share_out(prompts, config.firm.clients, config.data, config.firm.seed)
        split = config.data.split
        self.owner = None if split in ("iid", "dirichlet") else lambda prompt: prompt.owner(split)  # None: by chance
        self.client_names = names_of([str(self.owner(share[0])) for share in self.shares if self.owner])
        self.tasks = [Counter(p.task for p in share).most_common(1)[0][0] for share in self.shares]  # each client's
        self.held = held_objectives(config.run.client_objectives, self.names, self.tasks)
        self.policy = Policy(model, tokenizer, config.lora, config.rollout, config.firm.seed)
        self.federation = self.federate(config)

    def federate(self, config: Config) -> Federation:
        """The federation of these clients under the method and the settings given, see `check`. Raises ValueError."""
        numbers = [sorted(set(self.tasks)).index(task) for task in self.tasks]
        return Federation(self.policy, self.shares, self.names, self.score, config.method, config, self.held, numbers)

    @phase("score")
    def score(self, prompts: Sequence[Prompt], rollout: Rollout, holdings: list | None = None) -> Tensor:
        """Raw rewards [N, M] of a rollout; holdings as in `rewards.score`."""
        texts, ids = self.policy.texts(rollout)
        return rewards.score(self.objectives, prompts, texts, ids, holdings)

    def evaluate(self, label: str, chosen: Sequence[int] | None = None) -> Evaluation:
        """Answer held-out prompts, all or those chosen, `eval_samples` times each; whoever is asked when and by which
        process, from the same uniforms.
        """
        S, L = self.config.run.eval_samples, self.config.rollout.max_new_tokens
        chosen = range(len(self.held_out)) if chosen is None else chosen
        rows = [self.held_out[i] for i in chosen for _ in range(S)]
        streams = [clients.stream(self.config.firm.seed, clients.EVALUATION, i) for i in chosen]
        u = np.concatenate([rng.random((S, L)) for rng in streams])  # [n·S, L]
        made, size = {}, self.config.run.eval_batch_size
        starts = ranks.of_this_process(range(0, len(rows), size))
        for start in tqdm(starts, label, disable=not self.progress, leave=False):
            prompts = rows[start : start + size]
            rollout = self.policy.sample([p.token_ids for p in prompts], u[start : start + size])
            scores = self.score(prompts, rollout)
            made[start] = (scores, *self.kl_and_gap(rollout), self.policy.texts(rollout)[0])
        scores, kl, gaps, texts = zip(*ranks.merged(made).values(), strict=True)
        kl, gap, texts = torch.cat(kl).cpu(), max(gaps), [text for part in texts for text in part]
        if not kl.isfinite().all():
            raise ValueError(f"lr: the {label}'s KL to the base model is not finite; lower lr or server_lr")
        if gap > 0.1 and self.config.rollout.dtype == "float32":  # 16 bits round about as much
            print(f"warning: log-probs at sampling and in training differ by up to {gap:.2g} nats a token; this")
            print("  model's responses are not drawn from the policy that is trained (see logp_gap in metrics.jsonl)")
        shape = (len(chosen), S)
        return Evaluation(torch.cat(scores).view(*shape, -1), kl.view(shape), texts[::S])

    @cached_property
    def start(self) -> Tensor:
        """θ_0: a fresh adapter, or that of --adapter; a run that goes on does without. Raises ValueError as it does."""
        theta, adapter = self.federation.theta, self.policy.adapter
        if not (found := self.config.run.adapter):
            return theta
        adapter.load(found)
        theirs = json.loads(Path(found, "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        other = isinstance(theirs, str) and Path(theirs).resolve() != Path(self.base_model).resolve()  # or hub names
        if other and self.progress:
            print(f"warning: the adapter is of {theirs}, and is put on {self.base_model}")
        start = adapter.vector()
        adapter.assign(theta)
        return start

    def begin(self) -> Evaluation:
        """The base model measured, and the rewards calibrated on it; only then the adapter that training starts at."""
        start = self.start  # first: it may be refused
        before = self.evaluate("base model")
        self.federation.calibrate()
        self.federation.theta = start
        self.policy.adapter.assign(start)
        return before

    def kl_and_gap(self, rollout: Rollout) -> tuple[Tensor, float]:
        """The KL to the base model of each response [N], and the largest gap between sampled and computed log-probs."""
        rows = self.config.ppo.micro_batch_size or self.config.firm.batch_size  # what training has room for
        logp, hidden = self.policy.logprobs_in_pieces(rollout, rows)
        with self.policy.adapter.disabled():
            _, hidden_ref = self.policy.logprobs_in_pieces(rollout, rows)
        gap = ((rollout.sampled_logp - logp).abs() * rollout.mask).max()
        return self.policy.expected_kl(hidden, hidden_ref, rollout.mask), float(gap)

    def of_kind(self, client: int) -> list[int]:
        """The held-out prompts that --split would give a client, else those of its subsets, else all."""
        for kind in filter(None, (self.owner, lambda prompt: prompt.subset)):
            kinds = set(map(kind, self.shares[client]))
            if found := [i for i, prompt in enumerate(self.held_out) if kind(prompt) in kinds]:
                return found
        return list(range(len(self.held_out)))

    def personalised(self, directory: Path) -> list[Evaluation]:
        """Each client's adapter after local rounds on its own: saved, and measured on held-out prompts of its kind."""
        found, theta, mine = [], self.federation.theta, ranks.of_this_process(self.federation.clients)
        bar = tqdm(mine, "personalisation", disable=not self.progress, leave=False)
        own = {c.index: fedmoa.personalise(self.federation, c, self.config.own["fedmoa"]) for c in bar}
        for c, adapter in ranks.merged(own).items():
            self.policy.adapter.assign(adapter)
            if ranks.first():
                self.policy.adapter.save(directory / f"client{c}", self.base_model)
            found.append(self.evaluate(f"client {c}", self.of_kind(c)))
        self.policy.adapter.assign(theta)
        return found

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of what figures depend on beside the settings: who holds which prompts, the base model's weights, what
        each objective is made of.
        """
        prompts = hashlib.sha256()
        for share in (*self.shares, self.held_out):
            rows = [[p.token_ids, {k: v for k, v in p.columns.items() if v is not None}] for p in share]
            prompts.update(json.dumps(rows, default=str).encode())
        base = [(n, w) for n, w in self.policy.model.named_parameters() if not w.requires_grad]
        found = {"the prompts": prompts.hexdigest(), "the base model": fingerprint_of(base)}
        return found | {f"objective {o.name}": o.fingerprint for o in self.objectives}

    def save(self, directory: Path, before: Evaluation) -> None:
        """All that --resume needs beside config.json."""
        tensors, values = federation_state(self.federation)
        tensors |= {"before.scores": before.scores, "before.kl": before.kl}
        values |= {"before_texts": before.texts} | what_is_fixed(self.config, self.fingerprint)
        write_state(directory, tensors, values)

    def restore(self, directory: Path) -> Evaluation:
        """Take back what `save` wrote; returns the evaluation before training.

        Raises ValueError where the files are damaged, or of another run.
        """
        tensors, values = read_state(directory)
        check_unchanged(values, self.config, self.fingerprint)
        if values["rounds_done"] > self.config.firm.rounds:
            raise ValueError(f"rounds: {values['rounds_done']} are done already; ask for at least as many")
        restore_federation(self.federation, tensors, values)
        return Evaluation(tensors["before.scores"], tensors["before.kl"], values["before_texts"])


def names_of(owners: list[str]) -> list[str]:
    """What clients are called: a file by its folder and name, where that tells them apart."""
    short = ["/".join(Path(owner).parts[-2:]) if Path(owner).is_absolute() else owner for owner in owners]
    return short if len(set(short)) == len(owners) else owners


def held_objectives(specs: Sequence[str], names: Sequence[str], tasks: Sequence[str]) -> list[list[int]]:
    """The numbers of every client's objectives, by --client_objectives; tasks: each client's.

    A client goes by its number, else by its task, else it holds all. Raises ValueError for a WHO that is neither or
    both or is named twice, and for a NAME that is no objective or comes twice.
    """
    numbers, found = [str(client) for client in range(len(tasks))], {}
    for spec in specs:
        who, equals, listed = spec.rpartition("=")
        own = listed.split(",")
        if not equals or not set(own) <= set(names) or len(set(own)) < len(own):
            raise ValueError(
                f"client_objectives: {spec!r}; write WHO=NAME,NAME,... with objectives from {', '.join(names)}"
            )
        if who not in tasks and who not in numbers:
            raise ValueError(
                f"client_objectives: {who!r} is no client's task and no client; the tasks are "
                f"{', '.join(sorted(set(tasks)))}, the clients 0 to {len(tasks) - 1}"
            )
        if who in found or (who in tasks and who in numbers):
            raise ValueError(f"client_objectives: {who} is named twice, or is a client and a task; give one list")
        found[who] = [names.index(name) for name in own]
    everything = list(range(len(names)))
    return [found.get(client, found.get(task, everything)) for client, task in zip(numbers, tasks, strict=True)]


def check(config: Config) -> None:
    """Raise ValueError for settings that do not go together, before anything is loaded."""
    method = config.method
    if method.mixes:
        raise ValueError(f"method: {method.name} is several runs and no training of its own; add --sweep 0.1 0.5 0.9")
    if not config.run.objectives:
        raise ValueError("objectives: name at least one, as [NAME=]rule:NAME, hf:DIR_OR_HUB or py:FILE.py:FUNCTION")
    if (config.firm.clients_per_round or 1) > config.firm.clients:
        raise ValueError(
            f"clients_per_round: {config.firm.clients_per_round} is more than clients, {config.firm.clients}"
        )
    names = [rewards.parse_spec(spec)[0] for spec in config.run.objectives]
    clients.responses_per_prompt(config.firm, method.learner)
    clients.primary_of(config.firm.primary, names)
    if config.own["fedmoa"].personal_rounds and (method.server_weights or method.trainings is not Method.trainings):
        raise ValueError(f"personal_rounds: {method.name} has no local training of its own on all objectives; use 0")
    p = mgda.preference_vector(config.firm.preference, len(names))
    if not method.takes_preference and p.std(correction=0) > 1e-9:
        raise ValueError(f"preference: {method.name} takes none; leave it out, or use firm, linear or morlhf")
    if config.run.severity and (config.rollout.model or config.run.world != "reasoning" or config.data.prompts):
        raise ValueError("severity: only the reasoning world has poor clients; add --world reasoning")
    if config.run.severity and config.data.split not in ("natural", "client"):  # two names for one
        raise ValueError("severity: wrong references would be held out too; add --split natural")
    if config.rollout.model and not config.data.prompts:
        raise ValueError("prompts: name the files that go with --model, as --prompts FILE...")
    for file in config.data.prompts:
        data.locate(file)
