"""A run's parts, loaded and checked before any long work: policy, objectives, prompts, federation. [ours]"""

import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import fedmoa
import methods
import rewards
from app import checkpoint, metrics, peft_files, predictor, ranks
from app.loading import fingerprint, pretrained
from app.metrics import Evaluation
from app.objectives import check_prompts, load_objectives
from clients import Client
from data import Prompt
from firm import Federation
from rollout import Policy, Rollout, context_length
from settings import Config
from worlds import reasoning, survey, toy
from worlds.rows import rows_of


class Session:
    """Everything a run needs. Raises ValueError if something is wrong with the settings or what they name."""

    def __init__(
        self, config: Config, progress: bool = True, apart: bool = False, kind: Callable[..., Federation] = Federation
    ) -> None:
        """apart: whether clients' prompts, some or all, are elsewhere; kind: what makes the federation."""
        self.config, self.progress = config, progress and ranks.first()
        self.started = time.perf_counter()
        self.before: Evaluation | None = None  # the base model's, from `begin` or `restore`
        self.start = ""  # a hash of the adapter that training starts at, if --adapter names one
        self.lines: list[dict] = []  # of metrics.jsonl
        self.scores_after: dict[int, Tensor] = {}  # [n, S, M] of the adapter after some rounds
        if config.threads:
            torch.set_num_threads(config.threads)
        gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if gpu else "cpu"
        if gpu:
            ranks.take_gpu()
        methods.check(config)
        self.base_model, files = config.model, config.prompts
        bar = partial(tqdm, desc="pre-training, once", disable=not self.progress, leave=False)
        world = {
            "toy": lambda: toy.prepare(progress=bar),
            "reasoning": lambda: reasoning.prepare(config.severity, config.seed, progress=bar),
            "survey": lambda: survey.prepare(config.seed, progress=bar),
        }.get(config.model)
        if world:
            model, *_, prompts = world()
            self.base_model, files = str(model), files or [str(prompts)]
        specs = predictor.of_the_world(config.objectives, config.seed, progress)
        self.objectives = load_objectives(specs, self.device, config.dtype)
        self.names = [objective.name for objective in self.objectives]
        model, tokenizer = pretrained("AutoModelForCausalLM", self.base_model, config.dtype, self.device)
        context = context_length(model.config)
        room = None if context is None else context - config.max_new_tokens
        rows = (row for file in files for row in rows_of(file))
        prompts, self.counts = data.prompts_from(rows, tokenizer, config.max_prompt_tokens, room)
        self.prompts_of, self.held_out = data.share_out(prompts, config.clients, config, config.seed, apart)
        owners = [share[0].owner(config.split) for share in self.prompts_of if share]
        self.client_names = [] if config.split in ("iid", "dirichlet") else list(map(str, owners))
        self.tasks = [Counter([p.task for p in share] or ["all"]).most_common(1)[0][0] for share in self.prompts_of]
        held = data.objectives_of(config.client_objectives, self.names, self.tasks)
        for own, share in [*zip(held, self.prompts_of, strict=True), (range(len(self.names)), self.held_out)]:
            for j in own:
                check_prompts(self.objectives[j], share)
        self.policy = Policy(model, tokenizer, config, config.seed)
        method, codes = methods.method_of(config), [zlib.crc32(task.encode()) for task in self.tasks]
        self.federation = kind(self.policy, self.prompts_of, self.names, self.score, method, config, held, codes, ranks)

    def score(self, prompts: Sequence[Prompt], rollout: Rollout, client: Client | None = None) -> Tensor:
        """Raw rewards [n, M] of a rollout, as `rewards.score` gives them."""
        texts, ids = self.policy.texts(rollout)
        return rewards.score(self.objectives, prompts, texts, ids, client)

    def evaluate(self, label: str, chosen: Sequence[int] | None = None) -> Evaluation:
        """Answer the held-out prompts, or those chosen. Raises ValueError for a policy that is not finite."""
        chosen = range(len(self.held_out)) if chosen is None else chosen
        bar = partial(tqdm, desc=label, disable=not self.progress, leave=False)
        evaluation = metrics.evaluate(self.federation, {i: self.held_out[i] for i in chosen}, bar)
        if not evaluation.kl.isfinite().all():
            raise ValueError(f"lr: the {label}'s KL to the base model is not finite; lower lr or server_lr")
        if evaluation.gap > 0.1 and self.config.dtype == "float32":  # 16 bits round about as much
            print(f"warning: sampling and training differ by up to {evaluation.gap:.2g} nats a token (logp_gap)")
        return evaluation

    def begin(self) -> None:
        """Calibrate the rewards on the base model and measure it; then put the adapter that training starts at."""
        fresh = self.federation.theta
        if start := self.config.adapter:  # first: it may be refused
            base, self.start = peft_files.load(self.policy.adapter, start), fingerprint(start)
            if base and Path(base).resolve() != Path(self.base_model).resolve() and self.progress:
                print(f"warning: {start} was trained on {base}; it means nothing on other weights")
            self.federation.theta = self.policy.adapter.vector()
            self.policy.adapter.assign(fresh)
        self.federation.calibrate()
        self.before = self.evaluate("base model")
        for name, constant in zip(self.names, self.federation.calibration.constant.tolist(), strict=True):
            if constant and self.progress:
                print(f"warning: {name} gave every response of the base policy the same reward; it is not scaled, and")
                print("  while its gradient is zero, min-norm weights go to it alone and nothing is learnt")
        self.policy.adapter.assign(self.federation.theta)

    def of_kind(self, client: int) -> list[int]:
        """The held-out prompts that --split would give a client, else those of its subsets, else all."""
        for kind in (lambda prompt: prompt.owner(self.config.split), lambda prompt: prompt.subset):
            kinds = set(map(kind, self.prompts_of[client])) - {None}
            if same := [i for i, prompt in enumerate(self.held_out) if kind(prompt) in kinds]:
                return same
        return list(range(len(self.held_out)))

    def personalised(self, out: Path) -> list[Evaluation]:
        """Each client's adapter after local rounds on its own: saved, and measured on held-out prompts of its kind."""
        evaluations = []
        bar = tqdm(ranks.mine(self.federation.clients), "personalisation", disable=not self.progress, leave=False)
        thetas = {client.index: fedmoa.personalise(self.federation, client) for client in bar}
        for c, adapter in ranks.merged(thetas).items():
            self.policy.adapter.assign(adapter)
            if ranks.first():
                peft_files.save(self.policy.adapter, out / "personal" / f"client{c}", self.base_model)
            evaluations.append(self.evaluate(f"client {c}", self.of_kind(c)))
        self.policy.adapter.assign(self.federation.theta)
        return evaluations

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Hashes of what the settings name: prompts with their columns, the base model, the objectives."""
        hashes = {f"objective {objective.name}": objective.fingerprint for objective in self.objectives}
        hashes["the base model"] = fingerprint(self.base_model)
        for whose, prompts in (("the clients'", sum(self.prompts_of, [])), ("the held-out", self.held_out)):
            rows = [[p.token_ids, {k: v for k, v in p.columns.items() if v is not None}] for p in prompts]
            hashes[f"{whose} prompts"] = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
        return hashes

    def save(self, out: Path) -> None:
        """All that --resume needs beside config.json."""
        content = checkpoint.federation_state(self.federation) | {"before": vars(self.before), "start": self.start}
        content |= {"held_out": self.scores_after, "lines": self.lines, "seconds": time.perf_counter() - self.started}
        checkpoint.write(out, content | {"identity": checkpoint.identity(self.config, self.inputs)})

    def restore(self, out: Path) -> None:
        """Take back what `save` wrote. Raises ValueError if the file is damaged, or of another run."""
        read = checkpoint.read(out, checkpoint.identity(self.config, self.inputs)) if ranks.first() else None
        content = ranks.exchanged(read)[0]
        if content["rounds_done"] > self.config.rounds:
            raise ValueError(f"rounds: {content['rounds_done']} are done already; ask for at least as many")
        checkpoint.restore_federation(self.federation, content)
        self.before, self.scores_after = Evaluation(**content["before"]), content["held_out"]
        self.lines, self.start, self.started = content["lines"], content["start"], self.started - content["seconds"]
