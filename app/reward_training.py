"""The command line that trains a reward model (`rewards.fit`) on pairs of replies, of which people chose one.

The result is an ordinary sequence-classification checkpoint. With --freeze_backbone only the head learns.

Left out on purpose: several labels, margins between replies, ensembles.
"""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from app.loading import pretrained
from app.options import Parser
from data import split_dialogue, to_messages
from rewards import RewardModel, accuracy, fit
from settings import Settings, setting
from worlds.rows import rows_of


@dataclass
class RewardTraining(Settings):
    """Settings of the command line."""

    backbone: str = setting(MISSING, "checkpoint (directory or hub name) to put a reward head on")
    pairs: list[str] = setting(MISSING, "training pairs: files with rows of HH-RLHF (chosen, rejected)")
    out: str = setting(MISSING, "new directory for the trained reward model")
    test_pairs: list[str] = setting([], "pairs to test on; if not given, a tenth of the pairs is held out")
    freeze_backbone: bool = setting(False, "train the head only: an epoch takes a third of the time")
    max_pairs: int | None = setting(None, "train on this many pairs, drawn at random; all if not given", low=1)
    epochs: int = setting(1, "passes over the pairs", low=1)
    batch_size: int = setting(16, "pairs a step", low=1)
    lr: float = setting(2e-5, "peak learning rate; a head alone may take ten times as much", above=0)
    max_length: int = setting(512, "tokens read of a text; the beginning is cut off", low=8)
    seed: int = setting(0, "of the new head and the order of the pairs", low=0)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda; the default is a GPU, if any")


def encode_pairs(reward_model: RewardModel, pairs: list[tuple[str, dict]]) -> list[list[int]]:
    """The token ids of all chosen texts, then of all rejected ones, [2N]. Raises ValueError naming file and line."""
    texts = {"chosen": [], "rejected": []}
    for where, row in pairs:
        for name, rows in texts.items():
            try:
                prompt, reply = split_dialogue(row[name])
                rows += reward_model.encode([prompt], [reply], [to_messages(prompt)])
            except Exception as error:  # chat templates raise what they like
                raise ValueError(f"{where}: {type(error).__name__} in {name!r}: {error}; drop the row") from error
    return texts["chosen"] + texts["rejected"]


def train(settings: RewardTraining) -> None:
    """Train, test and save a reward model. Raises ValueError for a row that cannot be used, before any training."""
    out = Path(settings.out)
    aside = out.with_name(f"{out.name}.tmp")
    if out.exists():
        raise ValueError(f"out: {out} exists; name a new directory")
    pairs = [pair for file in settings.pairs for pair in rows_of(file)]
    test = [pair for file in settings.test_pairs for pair in rows_of(file)]
    torch.manual_seed(settings.seed)
    pairs = [pairs[i] for i in torch.randperm(len(pairs)).tolist()]
    held_out = 0 if settings.test_pairs else max(len(pairs) // 10, 1)
    pairs, test = pairs[held_out:][: settings.max_pairs], test or pairs[:held_out]
    if not pairs or not test:
        raise ValueError(f"pairs: {len(pairs)} to train on and {len(test)} to test on; each needs at least one")
    classifier = "AutoModelForSequenceClassification"
    model, tokenizer = pretrained(classifier, settings.backbone, device=settings.device, new_head=True)
    reward_model = RewardModel(model, tokenizer, max_length=settings.max_length)
    for name, parameter in model.base_model.named_parameters():  # a BERT's pooler, rarely trained on texts, is head
        parameter.requires_grad_(not settings.freeze_backbone or "pooler" in name)
    rows, test_rows = encode_pairs(reward_model, pairs), encode_pairs(reward_model, test)
    aside.mkdir(parents=True, exist_ok=True)  # before the training, since it may fail
    fit(reward_model, rows, settings, partial(tqdm, desc="training"))
    share, error = accuracy(reward_model, test_rows), 0.5 / math.sqrt(len(test))  # the error is that of a coin
    record = asdict(settings) | {"trained_on": len(pairs), "tested_on": len(test), "accuracy": share, "error": error}
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "reward_training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    os.rename(aside, out)  # the checkpoint is whole or not there
    print(f"test accuracy {share:.3f} ± {error:.3f} on {len(test)} pairs, a coin's error; saved to {out}")


def main(arguments: list[str] | None = None) -> None:
    """The command line of `python rewards.py`. Bad input ends the program with status 2 and one line."""
    parser = Parser("rewards.py", "Train a reward model on pairs of replies.")
    parser.add_settings(RewardTraining, {})
    try:
        train(RewardTraining(**vars(parser.parse_args(arguments))))
    except (ValueError, OSError, RuntimeError, TypeError) as error:  # the last for a setting that was not given
        parser.error(str(error))
