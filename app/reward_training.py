"""How a reward model (rewards.RewardModel) learns from pairs in which people chose one reply over another.

    python rewards.py --backbone DIR --pairs FILE... --test-pairs FILE... --out DIR --freeze-backbone

minimises -log sigmoid(r(chosen) - r(rejected)) [Bradley & Terry 1952; Ouyang et al. 2022] with AdamW, a linear warm-up
over a tenth of the steps, a linear decay, and no dropout. With --freeze-backbone only the head learns. A BERT's pooler
counts as head, since few checkpoints come with one that was trained to sum up a text. The head reads one state of each
text (the first token's or the last's), so the frozen backbone is run once and then *only looks those states up*, and
the training loop cannot tell [ours]. What is saved is an ordinary sequence-classification checkpoint.

Left out on purpose: several labels, margins between replies, ensembles.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from app import quiet_libraries
from app.fields import Checked, Count, Limits, Positive, Seed, setting
from app.files import new_directory
from app.loading import check_ids, named
from app.program import run_to_the_end
from data import read_rows, split_dialogue
from rewards import RewardModel, load_reward_model

Pair = tuple[str, str, str, str]  # prompt and response of `chosen`, prompt and response of `rejected`


@dataclass
class RewardTraining(Checked):
    """Settings of the command line. Raises ValueError naming the field that is wrong."""

    backbone: str = setting(MISSING, "checkpoint (directory or hub name) to put a reward head on")
    pairs: list[str] = setting(MISSING, "training pairs: HH-RLHF .jsonl or .jsonl.gz files")
    out: str = setting(MISSING, "new directory for the trained reward model")
    test_pairs: list[str] = setting([], "pairs to test on; without them a tenth of the pairs is held out")
    freeze_backbone: bool = setting(False, "train the head only: minutes, not hours")
    max_pairs: Count | None = setting(None, "train on so many pairs, drawn at random")
    epochs: Count | None = setting(None, "passes over the pairs (1; 3 for a head only)")
    batch_size: Count = setting(16, "pairs a step")
    lr: Positive | None = setting(None, "peak learning rate (2e-5; 2e-4 for a head only)")
    max_length: Annotated[int, Limits(8)] = setting(512, "tokens read of a text; the beginning is cut off")
    seed: Seed = setting(0, "of the new head and the order of the pairs")
    device: str = setting("", "cpu, cuda, ... (default: a GPU if there is one)")

    def __post_init__(self):
        super().__post_init__()
        self.epochs = self.epochs or (3 if self.freeze_backbone else 1)
        self.lr = self.lr or (2e-4 if self.freeze_backbone else 2e-5)
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device: {self.device}, but there is no CUDA device here; use --device cpu")


def read_pairs(files: list[str]) -> list[Pair]:
    """A pair a row; its two prompts may differ. Raises ValueError with file and line."""
    pairs = []
    for file in files:
        for where, row in read_rows(file, ("chosen", "rejected")):
            try:
                pairs.append((*split_dialogue(row["chosen"]), *split_dialogue(row["rejected"])))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return pairs


@contextmanager
def frozen_backbone(reward_model: RewardModel, encodings: list[dict]) -> Iterator[list[dict]]:
    """Within, the backbone only looks up its states of `encodings`, and the encodings yielded are row numbers.

    Which token's state the head reads, its gradient tells. Raises ValueError if it reads those of several.
    """
    model = reward_model.model
    backbone, pooler, hidden = model.base_model, getattr(model.base_model, "pooler", None), None
    forward, states = backbone.forward, torch.empty(len(encodings), model.config.hidden_size, device=model.device)

    def output(hidden: Tensor) -> BaseModelOutputWithPoolingAndCrossAttentions:
        pooled = pooler(hidden) if pooler else None
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)

    def run(*inputs, **named) -> BaseModelOutputWithPoolingAndCrossAttentions:
        nonlocal hidden
        with torch.no_grad():
            hidden = forward(*inputs, **named)[0]  # [B, T, H]
        return output(hidden.requires_grad_())

    try:
        backbone.forward = run
        for batch in tqdm(reward_model.batches(encodings), "backbone"):
            scores = reward_model.forward([encodings[i] for i in batch])
            read = torch.autograd.grad(scores.sum(), hidden)[0].any(2)  # [B, T]
            if not (read.sum(1) == 1).all():
                raise ValueError("freeze_backbone: this head reads more than one token's state; train without it")
            states[batch] = hidden.detach()[read]
        backbone.forward = lambda input_ids, *_, **__: output(states[input_ids])  # [B, 1, H]
        yield [{"input_ids": [row]} for row in range(len(encodings))]
    finally:
        del backbone.forward  # its class has it


def fit(reward_model: RewardModel, encodings: list[dict], settings: RewardTraining) -> None:
    """Bradley-Terry training in place; encodings are those of all chosen texts, then of all rejected, [2N]."""
    n = len(encodings) // 2
    generator = torch.Generator().manual_seed(settings.seed)
    trainable = [p for p in reward_model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=0.01)
    steps = settings.epochs * math.ceil(n / settings.batch_size)
    warmup = math.ceil(steps / 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )
    width = [max(len(encodings[i]["input_ids"]), len(encodings[n + i]["input_ids"])) for i in range(n)]
    smooth, bar = None, tqdm(total=steps, desc="training")
    for _ in range(settings.epochs):
        order = torch.randperm(n, generator=generator).tolist()
        pool = 50 * settings.batch_size  # pairs of like length share a batch, in an order that stays random
        order = [i for s in range(0, n, pool) for i in sorted(order[s : s + pool], key=width.__getitem__)]
        batches = [order[s : s + settings.batch_size] for s in range(0, n, settings.batch_size)]
        for k in torch.randperm(len(batches), generator=generator).tolist():
            batch = batches[k]
            r = reward_model.forward([encodings[i] for i in batch] + [encodings[n + i] for i in batch])  # [2B]
            loss = -logsigmoid(r[: len(batch)] - r[len(batch) :]).mean()
            if not torch.isfinite(loss):
                raise ValueError(f"lr: the loss is {loss.item()} in step {bar.n + 1}; lower lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
    bar.close()


def encode_pairs(reward_model: RewardModel, pairs: list[Pair]) -> list[dict]:
    """What the model reads of all chosen texts, then of all rejected ones, [2N]."""
    chosen_prompts, chosen, rejected_prompts, rejected = zip(*pairs, strict=True)
    encodings = reward_model.encode([*chosen_prompts, *rejected_prompts], [*chosen, *rejected])
    with named("backbone"):
        check_ids((encoding["input_ids"] for encoding in encodings), reward_model.model)
    return encodings


def accuracy(reward_model: RewardModel, pairs: list[Pair], progress: str = "") -> float:
    """Share of pairs whose chosen reply scores higher; ties count half."""
    margins = reward_model.scores(encode_pairs(reward_model, pairs), progress).unflatten(0, (2, -1))  # [2, N]
    return (((margins[0] - margins[1]).sign() + 1) / 2).mean().item()


def train(settings: RewardTraining) -> dict:
    """Trains, tests and saves a reward model; returns (and writes to reward_training.json) settings and figures.

    The standard error is a coin's, 0.5 / sqrt(test pairs). Raises ValueError for bad input, before any training, and
    for a training that diverges.
    """
    with new_directory(settings.out, "reward-model") as out:
        pairs, test = read_pairs(settings.pairs), read_pairs(settings.test_pairs)
        torch.manual_seed(settings.seed)
        pairs = [pairs[i] for i in torch.randperm(len(pairs)).tolist()]
        if not settings.test_pairs:
            held_out = max(1, len(pairs) // 10)
            pairs, test = pairs[held_out:], pairs[:held_out]
        pairs = pairs[: settings.max_pairs]
        if not pairs or not test:
            raise ValueError("pairs: too few rows to train and to test on; pass files with more")
        reward_model = load_reward_model(
            settings.backbone, settings.device, new_head=True, batch_size=32, max_length=settings.max_length
        )
        encodings = encode_pairs(reward_model, pairs)
        with (
            frozen_backbone(reward_model, encodings) if settings.freeze_backbone else nullcontext(encodings) as readable
        ):
            fit(reward_model, readable, settings)
        share, error = accuracy(reward_model, test, "testing"), 0.5 / math.sqrt(len(test))
        if not all(weight.isfinite().all() for weight in reward_model.model.parameters()):
            raise ValueError("lr: the last step gave weights that are not finite; lower lr")
        record = {
            "settings": asdict(settings),
            "train_pairs": len(pairs),
            "test_pairs": len(test),
            "test_accuracy": share,
            "standard_error": error,
            "standard_errors_over_chance": (share - 0.5) / error,
        }
        save(reward_model, record, out)
    return record


def save(reward_model: RewardModel, record: dict, out: Path) -> None:
    """Write an ordinary checkpoint, each of its files whole, and config.json, which makes it one, last."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as aside:
        reward_model.model.save_pretrained(aside)
        reward_model.tokenizer.save_pretrained(aside)
        Path(aside, "reward_training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python rewards.py`. Returns the exit status, as `run_to_the_end` does."""
    parser = HfArgumentParser(RewardTraining, prog="rewards.py", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"rewards.py: error: {message}\n")  # one line, without the usage

    def work() -> None:
        quiet_libraries()
        settings, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown option {' '.join(unknown)}: see --help")
        record = train(settings)
        measured = "test accuracy {test_accuracy:.3f} ± {standard_error:.3f} on {test_pairs} pairs, "
        measured += "{standard_errors_over_chance:.1f} standard errors over chance"
        print(f"{measured.format(**record)}; saved to {settings.out}")

    return run_to_the_end("rewards.py", work)
