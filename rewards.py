r"""Objectives: what a reward function is, how responses are scored, how rewards in unlike units become comparable.

An objective is a function (prompts, completions, **columns) -> list[float]. That is TRL's convention: all arguments are
lists passed by keyword, prompts and completions are plain texts, and it returns one finite number per completion.
`columns` are the data's own columns (None if a row has no value), completion_ids (token ids), messages (the prompt as a
chat) and subset. `app/objectives.py` loads objectives.

**A reward model** is a sequence classifier with one label; the reward is logits[0]. It reads prompt and response as one
text, tokenised once: the conversation in the tokenizer's chat template, which writes the special tokens itself, or else

    \n\nHuman: ... \n\nAssistant: response

with the tokenizer's special tokens, a space before the last marker [code: RiC] and one behind it, as in HH-RLHF [ours].
A text that is too long loses its beginning, but not a leading BOS or [CLS] [ours]. GPT-2's and Llama's heads score the
last token that is not config.pad_token_id. If a checkpoint does not name it, the tokenizer's pad token becomes it, or
else EOS; then a final EOS counts as padding, and the token before it is scored.

**Calibration** [ours]. Each objective is shifted and scaled to mean 0 and deviation 1 on samples of the base policy,
once. For each objective that it holds, client c sends n_c, m_c = mean r and s_c = sum (r - m_c)^2. All clients then use

    mean = sum n_c m_c / n      scale^2 = sum [s_c + n_c (m_c - mean)^2] / n      z = (r - mean) / scale

with n = sum n_c. An objective that does not vary gets scale 1.

`python rewards.py --backbone DIR --pairs FILE... --out DIR` trains a reward model (`fit`; app/reward_training.py).
Left out on purpose: asynchronous functions, and TRL's None for "does not apply": here a missing reward is an error.
"""

import copy
import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR

REPLY = "\n\nAssistant:"  # ends every plain prompt


def length(completions: list[str], **columns) -> list[float]:
    """Number of words."""
    return [len(text.split()) for text in completions]


def brevity(completions: list[str], **columns) -> list[float]:
    """1 for no words, 1/2 for 20, towards 0 beyond: conflicts with length."""
    return [1 / (1 + len(text.split()) / 20) for text in completions]


def distinct(completions: list[str], **columns) -> list[float]:
    """Share of different ones among the pairs of neighbouring words: 1 without repetition."""
    pairs = [list(pairwise(text.lower().split())) for text in completions]
    return [len(set(each)) / len(each) if each else 1.0 for each in pairs]


RULES = {rule.__name__: rule for rule in (length, brevity, distinct)}


class RewardModel:
    """A sequence classifier with one label, called as any objective; max_length: tokens that it reads of a text."""

    def __init__(self, model, tokenizer, batch_size: int = 32, max_length: int | None = None) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size  # eval: no dropout
        limits = (max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.max_length = min(limit for limit in limits if limit)
        model.config.use_cache = False  # each text is read once: keys and values would only take memory
        pads = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        model.config.pad_token_id = next(pad for pad in pads if pad is not None)  # 0 is one too

    def encode(self, prompts: list[str], completions: list[str], messages: list) -> list[list[int]]:
        """The token ids that the model reads of each prompt and its response, at most max_length."""
        replies = [completion.strip() for completion in completions]
        if chat := bool(self.tokenizer.chat_template):
            pairs = zip(messages, replies, strict=True)
            dialogues = [[*dialogue, {"role": "assistant", "content": reply}] for dialogue, reply in pairs]
            texts = self.tokenizer.apply_chat_template(dialogues, tokenize=False)
        else:
            pairs = zip(prompts, replies, strict=True)
            texts = [f"{prompt.removesuffix(REPLY).rstrip()} {REPLY} {reply}" for prompt, reply in pairs]
        rows = self.tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
        for i, ids in enumerate(rows):
            if len(ids) > self.max_length:
                first = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
                rows[i] = first + ids[len(ids) - self.max_length + len(first) :]
        return rows

    def forward(self, rows: list[list[int]]) -> Tensor:
        """Scores [B], float32, of one batch of token ids, which is padded on the right."""
        texts = [torch.tensor(ids, device=self.model.device) for ids in rows]
        ids = pad_sequence(texts, batch_first=True, padding_value=self.model.config.pad_token_id)  # [B, T]
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)  # [B, T]
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()

    @torch.no_grad()
    def scores(self, rows: list[list[int]]) -> Tensor:
        """Scores [N] on the CPU, in the order of the rows."""
        scores = torch.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # texts too long for the memory fail at once
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self.forward([rows[i] for i in batch]).cpu()
        return scores

    def __call__(self, /, prompts: list[str], completions: list[str], messages: list, **columns) -> list[float]:
        return self.scores(self.encode(prompts, completions, messages)).tolist()


def fit(reward_model: RewardModel, rows: list[list[int]], settings: Any, bar: Callable = iter) -> None:
    """Train in place on pairs: rows are the token ids of all chosen texts, then of all rejected ones, [2N].

    Minimises -log sigmoid(r(chosen) - r(rejected)) [Bradley & Terry 1952; Ouyang et al. 2022] with AdamW, a linear
    warm-up over a tenth of the steps, a linear decay, and no dropout. settings: lr, epochs, batch_size.
    """
    n, parameters = len(rows) // 2, list(reward_model.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.01)
    steps = settings.epochs * math.ceil(n / settings.batch_size)
    warmup = math.ceil(steps / 10)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1)))
    batches = [b.tolist() for _ in range(settings.epochs) for b in torch.randperm(n).split(settings.batch_size)]
    for batch in bar(batches):
        scores = reward_model.forward([rows[i] for i in batch] + [rows[n + i] for i in batch])  # [2B]
        chosen, rejected = scores.chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()


def accuracy(reward_model: RewardModel, rows: list[list[int]]) -> float:
    """Share of pairs whose chosen reply scores higher; ties count half. rows as in `fit`."""
    chosen, rejected = reward_model.scores(rows).chunk(2)
    return (((chosen - rejected).sign() + 1) / 2).mean().item()


@dataclass(frozen=True)
class Objective:
    """A reward function under a name; `spec` is what the user wrote."""

    name: str
    spec: str
    function: Callable[..., list[float]]
    fingerprint: str = ""  # a hash of its code or weights: another fingerprint means other rewards


def score(
    objectives: Sequence[Objective], prompts: Sequence[Any], completions: list[str], completion_ids: list[list[int]],
    client: Any = None,
) -> Tensor:  # fmt: skip
    """Raw rewards [N, M], float64, of N completions and their prompts (data.Prompt).

    client: whose they are (clients.Client), NaN marks objectives that it lacks; None: nobody's, scored by all.
    Raises ValueError naming objective, client and prompt for anything but one finite number per completion.
    """
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    given = {name: [prompt.columns.get(name) for prompt in prompts] for name in names} | {
        "prompts": [prompt.text for prompt in prompts],
        "completions": completions,
        "completion_ids": completion_ids,
        "messages": [list(prompt.messages) for prompt in prompts],
        "subset": [prompt.subset for prompt in prompts],
    }
    raw = torch.full((len(prompts), len(objectives)), math.nan, dtype=torch.float64)
    for j in client.objectives if client else range(len(objectives)):
        raw[:, j] = torch.tensor(_called(objectives[j], given, client), dtype=torch.float64)
    return raw


def _called(objective: Objective, columns: dict[str, list], client: Any) -> list[float]:
    """The rewards of one call. The function gets copies, so it cannot change what the next one sees."""
    rewards = list(objective.function(**copy.deepcopy(columns)))
    what = f"objective {objective.name!r} returned"
    if len(rewards) != (n := len(columns["prompts"])):
        raise ValueError(f"{what} {len(rewards)} rewards for {n} completions; return one for each")
    for reward, prompt in zip(rewards, columns["prompts"], strict=True):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # None, a text, a tensor of two, 10**999
            if math.isfinite(reward):
                continue
        whose = f"client {client.index} and " if client else ""
        asked = textwrap.shorten(prompt, 80, placeholder=" ...")
        raise ValueError(f"{what} {reward!r} for {whose}the prompt {asked!r}; a reward must be a finite number")
    return [float(reward) for reward in rewards]


@dataclass(frozen=True)
class Calibration:
    """z = (r - mean) / scale for each of M objectives. A checkpoint holds its three tensors, `vars(calibration)`."""

    mean: Tensor  # [M] float64
    scale: Tensor  # [M] float64
    constant: Tensor  # [M] bool, True if the objective did not vary (its scale is 1)

    def apply(self, raw: Tensor) -> Tensor:
        """Calibrated rewards z [..., M] of raw ones; NaN stays NaN."""
        return (raw - self.mean.to(raw)) / self.scale.to(raw)

    def pooled(self) -> "Calibration":
        """One mean and one scale for all objectives: keeps the order of raw rewards that have the same unit. [ours]"""
        variance = torch.where(self.constant, 0.0, self.scale.square()).mean()
        scale = torch.where(variance > 0, variance.sqrt(), 1.0)
        return Calibration(self.mean.mean().expand_as(self.mean), scale.expand_as(self.scale), self.constant)


def calibration_sums(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a client sends of its raw rewards [n, M], NaN aside: number, mean, sum of squares about it, [M] each."""
    n = (~raw.isnan()).sum(0)
    mean = raw.double().nansum(0) / n.clamp_min(1)
    return n, mean, (raw.double() - mean).square().nansum(0)


def combine_sums(sums: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Calibration:
    """The Calibration that all clients use. Squares are about each client's own mean (Chan et al. 1983): a plain sum of
    squares would lose a small spread about a huge mean to rounding.
    """
    n, means, squares = (torch.stack(each) for each in zip(*sums, strict=True))  # [C, M]
    total = n.sum(0)  # [M]
    mean = (n * means).sum(0) / total
    scale = ((squares + n * (means - mean).square()).sum(0) / total).sqrt()
    constant = scale <= 1e-14 * mean.abs() * total.double().sqrt()  # a float64 mean is rounded by about so much
    return Calibration(mean, torch.where(constant, 1.0, scale), constant)


if __name__ == "__main__":
    from app.reward_training import main  # here, since only the command line may use what stands above this floor

    main()
