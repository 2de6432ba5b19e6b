"""A reward model: a checkpoint that reads a prompt and a response and returns one number; and how it learns to.

**Reading.** It reads its own chat template, where its tokenizer has one, else the pair of texts
("\\n\\nHuman: ... \\n\\nAssistant:", response), with a space before the last marker [code: RiC, and the model cards
of Ray2333/gpt2-large-*-reward_model]; the score is logits[0]. What is too long for the model loses its beginning:
special tokens survive, and the response's end [ours]. Batches are sorted by length and padded on the right. A
missing pad token becomes EOS, in the config too. GPT-2's and Llama's heads score the last token that is not
config.pad_token_id, so a final EOS is skipped: the score sits on the token before it, alone or in a batch.

**Learning** [Bradley & Terry 1952; Ouyang et al. 2022]. From pairs in which people chose one reply over another,

    minimise  -log sigmoid(r(chosen) - r(rejected))

with AdamW, a linear warm-up over a tenth of the steps and a linear decay, and no dropout.

    python rewards.py --backbone DIR --pairs FILE... --test-pairs FILE... --out DIR --freeze-backbone

With --freeze-backbone only the head learns. A BERT's pooler counts as head, since few checkpoints come with one that
was trained to sum up a text. The head reads one state of each text (the first token's or the last's), so the frozen
backbone is run once and then *replaced by the table of those states*, and the training loop cannot tell [ours].
What is saved is an ordinary sequence-classification checkpoint either way.

Left out on purpose: several labels, margins between replies, ensembles.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import logging as hf_logging

from data import REPLY, read_rows, split_dialogue, to_messages


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings and loading bars from the user's screen."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


class RewardModel:
    """A model and its tokenizer, called like any objective: (prompts, completions, **columns) -> list[float]."""

    def __init__(self, model, tokenizer, batch_size: int = 32, max_length: int | None = None):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size  # eval: no dropout
        tokenizer.truncation_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.use_cache = False  # every text is read once: keys and values would only take memory
        model.config.pad_token_id = tokenizer.pad_token_id  # heads look for the last token that is none of these
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa's positions start behind the padding's
            positions -= table.padding_idx + 1
        self.max_length = min(positions, tokenizer.model_max_length, max_length or positions)

    def encode(self, prompts: list[str], completions: list[str], messages: list | None = None) -> list[dict]:
        """What the model reads of each prompt and response: input_ids (at most max_length), perhaps token types."""
        completions = [completion.strip() for completion in completions]
        if not self.tokenizer.chat_template:
            return [self._encode_pair(p, c) for p, c in zip(prompts, completions, strict=True)]
        messages = messages or [to_messages(prompt) for prompt in prompts]
        return [self._encode_chat(m, c) for m, c in zip(messages, completions, strict=True)]

    def _encode_pair(self, prompt: str, completion: str) -> dict:
        first = f"{prompt.removesuffix(REPLY).rstrip()} {REPLY}"
        encoding = self.tokenizer(first, completion, verbose=False)
        if len(encoding["input_ids"]) > self.max_length:  # the prompt pays first
            encoding = self.tokenizer("", completion, truncation="only_second", max_length=self.max_length)
            if len(encoding["input_ids"]) < self.max_length:
                encoding = self.tokenizer(first, completion, truncation="only_first", max_length=self.max_length)
        return dict(encoding)

    def _encode_chat(self, messages: list[dict], completion: str) -> dict:
        chat = [*messages, {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > self.max_length:
            bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = bos + ids[len(ids) - self.max_length + len(bos) :]
        return {"input_ids": ids}

    def batches(self, encodings: list[dict]) -> list[list[int]]:
        """The rows of each batch, longest texts first: what is too much for the memory fails at once."""
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]["input_ids"]))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def forward(self, encodings: list[dict]) -> Tensor:
        """Scores [B], float32, of one right-padded batch."""
        batch = self.tokenizer.pad(encodings, padding_side="right", return_tensors="pt")
        return self.model(**batch.to(self.model.device)).logits[:, 0].float()

    @torch.no_grad()
    def scores(self, encodings: list[dict], progress: str = "") -> Tensor:
        """Scores [N] on the CPU, in the order given; `progress` names a progress bar."""
        scores = torch.empty(len(encodings))
        for batch in tqdm(self.batches(encodings), progress, disable=not progress):
            scores[batch] = self.forward([encodings[i] for i in batch]).cpu()
        return scores

    def __call__(self, prompts: list[str], completions: list[str], messages=None, **columns) -> list[float]:
        return self.scores(self.encode(prompts, completions, messages)).tolist()


def load_reward_model(where: str, device="cpu", dtype="float32", new_head: bool = False, **settings) -> RewardModel:
    """The RewardModel of a directory or hub name; with new_head any backbone gets a random head (for training).

    Raises ValueError if it cannot be loaded, or is no reward model: an untrained head, or not one label.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # see rollout.avoid_cudnn_attention
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    labels = {"num_labels": 1} if new_head else {}
    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                where, dtype=dtype, output_loading_info=True, **labels
            )
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:150]
        raise ValueError(f"{where} cannot be loaded ({reason}); pass a local checkpoint directory") from error
    if not new_head and info["missing_keys"]:
        raise ValueError(
            f"{where} is no trained reward model: it lacks {min(info['missing_keys'])}; train one on it with "
            f"python rewards.py --backbone {where}"
        )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{where} has {model.config.num_labels} labels where a reward model has one; wrap it in a py: function"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: the tokenizer has neither pad nor EOS token; set one in tokenizer_config.json")
    return RewardModel(model.to(device), tokenizer, **settings)


# ---- training ------------------------------------------------------------------------------------------------


@dataclass
class RewardTraining:
    """Settings of the command line. Raises ValueError naming the field that is wrong."""

    backbone: str = field(metadata={"help": "checkpoint (directory or hub name) to put a reward head on"})
    pairs: list[str] = field(metadata={"help": "training pairs: HH-RLHF .jsonl or .jsonl.gz files"})
    out: str = field(metadata={"help": "new directory for the trained reward model"})
    test_pairs: list[str] = field(
        default_factory=list, metadata={"help": "pairs to test on; without them a tenth of the pairs is held out"}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "train the head only: minutes, not hours"})
    max_pairs: int | None = field(default=None, metadata={"help": "train on so many pairs, drawn at random"})
    epochs: int | None = field(default=None, metadata={"help": "passes over the pairs (1; 3 for a head only)"})
    batch_size: int = field(default=16, metadata={"help": "pairs a step"})
    lr: float | None = field(default=None, metadata={"help": "peak learning rate (2e-5; 2e-4 for a head only)"})
    max_length: int = field(default=512, metadata={"help": "tokens read of a text; the beginning is cut off"})
    seed: int = field(default=0, metadata={"help": "of the new head and the order of the pairs"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ... (default: a GPU if there is one)"})

    def __post_init__(self):
        self.epochs = (3 if self.freeze_backbone else 1) if self.epochs is None else self.epochs
        self.lr = (2e-4 if self.freeze_backbone else 2e-5) if self.lr is None else self.lr
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for name in ("epochs", "batch_size", "lr", "max_pairs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.max_length < 8:
            raise ValueError(f"max_length is {self.max_length}: special tokens and a few words need at least 8")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device}, but there is no CUDA device here: use --device cpu")
        if Path(self.out).exists() and (not Path(self.out).is_dir() or any(Path(self.out).iterdir())):
            raise ValueError(f"out: {self.out} already holds something; name a new directory or delete it")


def read_pairs(files: list[str]) -> list[tuple[str, str, str, str]]:
    """(prompt, response) of `chosen` and of `rejected`, a pair a row (the two prompts may differ).

    Raises ValueError with file and line.
    """
    pairs = []
    for file in files:
        for where, row in read_rows(file, ("chosen", "rejected")):
            try:
                pairs.append((*split_dialogue(row["chosen"]), *split_dialogue(row["rejected"])))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return pairs


class Table(nn.Module):
    """Stands in for a frozen backbone: its states [N, H] are computed, input_ids are row numbers."""

    def __init__(self, states: Tensor, pooler: nn.Module | None):
        super().__init__()
        self.states, self.pooler = states, pooler

    def forward(self, input_ids: Tensor, *_, **__) -> BaseModelOutputWithPoolingAndCrossAttentions:
        states = self.states[input_ids]  # [B, 1, H]
        pooled = None if self.pooler is None else self.pooler(states)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=pooled)


@contextmanager
def frozen_backbone(reward_model: RewardModel, encodings: list[dict]) -> Iterator[list[dict]]:
    """Within, the backbone is a Table of its states of `encodings`, and the encodings yielded are row numbers.

    Raises ValueError if the head reads anything but the first or the last token's state.
    """
    model, seen = reward_model.model, []
    backbone, pad = model.base_model, model.config.pad_token_id
    hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    states = torch.empty(2, len(encodings), model.config.hidden_size, device=model.device)
    scores = torch.empty(len(encodings), device=model.device)
    with torch.no_grad():
        for batch in tqdm(reward_model.batches(encodings), "backbone"):
            scores[batch] = reward_model.forward([encodings[i] for i in batch])
            hidden = seen.pop().float()  # [B, T, H]
            last = [max((t for t, x in enumerate(encodings[i]["input_ids"]) if x != pad), default=0) for i in batch]
            states[0, batch], states[1, batch] = hidden[:, 0], hidden[range(len(batch)), last]
    hook.remove()
    rows = [{"input_ids": [i]} for i in range(len(encodings))]
    pooler = getattr(backbone, "pooler", None)
    try:
        for position in (0, 1):
            setattr(model, model.base_model_prefix, Table(states[position], pooler))
            if torch.allclose(reward_model.scores(rows).to(scores), scores, rtol=1e-3, atol=1e-4):
                break
        else:
            raise ValueError("freeze_backbone: this head reads more than one token's state; train without it")
        yield rows
    finally:
        setattr(model, model.base_model_prefix, backbone)


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
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
    bar.close()


def accuracy(reward_model: RewardModel, pairs: list[tuple[str, str, str, str]], progress: str = "") -> float:
    """Share of pairs whose chosen reply scores higher; ties count half."""
    chosen_prompts, chosen, rejected_prompts, rejected = zip(*pairs, strict=True)
    encodings = reward_model.encode([*chosen_prompts, *rejected_prompts], [*chosen, *rejected])
    margins = reward_model.scores(encodings, progress).unflatten(0, (2, -1))  # [2, N]
    return (((margins[0] - margins[1]).sign() + 1) / 2).mean().item()


def train(settings: RewardTraining) -> dict:
    """Trains, tests and saves a reward model; returns (and writes to reward_training.json) settings and figures.

    The standard error is a coin's, 0.5 / sqrt(test pairs).

    Raises ValueError for unreadable pairs or backbone, before any training.
    """
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
    chosen_prompts, chosen, rejected_prompts, rejected = zip(*pairs, strict=True)
    encodings = reward_model.encode([*chosen_prompts, *rejected_prompts], [*chosen, *rejected])
    if settings.freeze_backbone:
        with frozen_backbone(reward_model, encodings) as rows:
            fit(reward_model, rows, settings)
    else:
        fit(reward_model, encodings, settings)
    share, error = accuracy(reward_model, test, "testing"), 0.5 / math.sqrt(len(test))
    record = {
        "settings": asdict(settings),
        "train_pairs": len(pairs),
        "test_pairs": len(test),
        "test_accuracy": share,
        "standard_error": error,
        "standard_errors_over_chance": (share - 0.5) / error,
    }
    out = Path(settings.out)
    partial = out.with_name(out.name + ".partial")
    with quiet():
        reward_model.model.save_pretrained(partial)
        reward_model.tokenizer.save_pretrained(partial)
    (partial / "reward_training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    partial.replace(out)
    return record


def main(arguments: list[str] | None = None) -> None:
    """The command line of `python rewards.py`."""
    parser = HfArgumentParser(RewardTraining, prog="rewards.py", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"rewards.py: error: {message}\n")  # one line, without the usage
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            parser.error(f"unknown option {' '.join(unknown)}: see --help")
        record = train(settings)
    except ValueError as error:
        parser.error(str(error))
    print(
        "test accuracy {test_accuracy:.3f} ± {standard_error:.3f} on {test_pairs} pairs, "
        "{standard_errors_over_chance:.1f} standard errors over chance".format(**record)
        + f"; saved to {settings.out}"
    )
