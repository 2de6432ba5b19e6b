"""From prompts to responses and their log-probabilities.

Sampling (`sampler.py`) turns uniforms into tokens. A client draws its uniforms from its own stream (`clients.stream`)
and is sampled by itself: in a batch of other rows rounding may draw another token, in 16 bits most longer responses
meet that. So its responses depend on no other client, no restart, and no number of processes. [ours]

    prompts   [N, P]  left-padded: every row's last prompt token stands at P − 1
    responses [N, L]  right-padded; mask [N, L] is 1 up to and including the first EOS, which is trained like any token
    logp      [B, L]  log π(response token | everything before), float32, at the sampling temperature

Log-probs run on a client's rows in micro-batches, for π_old and π_new alike. Log-softmax runs in float32, only over
response positions, a chunk of tokens at a time (`TokenLogProbs`). A row's log-probs must depend on no padding, batch or
cache: `check` tries that on every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lora import Adapter, inject
from sampler import Decoder, Sampler, pad_left, positions
from settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGITS_IN_MEMORY = 2**24  # float32 logits of one chunk: 64 MB, a few times over
WIDE = 1024  # columns of the sampler's table in `check`, nearly all empty


@dataclass
class Rollout:
    """N responses, each with its prompt."""

    prompts: Tensor  # [N, P] token ids, left-padded
    prompt_mask: Tensor  # [N, P]
    responses: Tensor  # [N, L] token ids, right-padded
    mask: Tensor  # [N, L] 1 up to the first EOS inclusive
    sampled_logp: Tensor  # [N, L] as the sampler saw it; only to watch the gap to `Policy.logprobs`
    ended: Tensor  # [N] bool, whether the response came to an EOS
    lengths: Tensor | None = None  # [N, 2] of prompt and response, always on the CPU: cutting asks no GPU for them
    group_size: int = 1  # S: that many consecutive rows answer the same prompt

    def __post_init__(self) -> None:
        if self.lengths is None:
            self.lengths = torch.stack([self.prompt_mask.sum(1), self.mask.sum(1)], 1).cpu()

    def __len__(self) -> int:
        return self.prompts.shape[0]

    def rows(self, rows: slice | Tensor) -> Rollout:
        """Some rows, cut to their own width. rows: a slice of whole groups, or a micro-batch's indices, on the CPU."""
        lengths = self.lengths[rows]
        P, L = lengths.amax(0).tolist()
        prompts, prompt_mask = self.prompts[rows, -P:], self.prompt_mask[rows, -P:]
        responses, mask, sampled_logp = self.responses[rows, :L], self.mask[rows, :L], self.sampled_logp[rows, :L]
        return Rollout(prompts, prompt_mask, responses, mask, sampled_logp, self.ended[rows], lengths, self.group_size)

    def micro_batches(self, size: int | None) -> Iterator[tuple[Tensor, Rollout]]:
        """Pieces of at most `size` rows, each with its row numbers; all rows as they are if that is enough.

        Longest first, every piece cut to its own width, and no group cut that fits. Equal arguments cut alike, as π_old
        and π_θ need it.
        """
        if size is None or size >= len(self):
            yield torch.arange(len(self)), self
            return
        S = self.group_size if self.group_size <= size else 1
        longest = self.lengths.sum(1).view(-1, S).amax(1)  # of each group
        for groups in longest.argsort(descending=True, stable=True).split(size // S):
            rows = (groups[:, None] * S + torch.arange(S)).flatten()
            yield rows, replace(self.rows(rows), group_size=S)


class Policy:
    """A frozen causal language model, its tokenizer, and one adapter: π_θ, and π_ref with the adapter off.

    `eos` is every id that ends a response, `pad` the padding id; no token is added and no embedding resized.
    Raises ValueError, in one line, for a model that cannot be sampled from or trained (`check`).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, seed: int = 0
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.temperature, self.max_new_tokens = settings.temperature, settings.max_new_tokens
        self.gradient_checkpointing = settings.gradient_checkpointing
        self.device = next(model.parameters()).device
        # cuDNN's attention, torch 2.13's first choice on an H100, gives NaN gradients for left-padded rows in 16 bits
        torch.backends.cuda.enable_cudnn_sdp(False)
        vocabulary, self.hidden_size = model.get_output_embeddings().weight.shape
        self.chunk = max(LOGITS_IN_MEMORY // vocabulary, 1)  # tokens
        self.eos, pad = eos_ids(model, tokenizer, vocabulary), tokenizer.pad_token_id
        self.pad = pad if pad is not None and pad < vocabulary else self.eos[0]
        self.adapter: Adapter = inject(model, settings.lora_rank, settings.lora_scale, settings.lora_targets, seed)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.shares_prompts = not self.gradient_checkpointing  # within a group; checkpointing leaves no cache to share
        check(self)
        self.sampler = Sampler(model, self.log_softmax, self.eos, self.pad)

    def sample(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray) -> Rollout:
        """One response to each prompt. prompts: N token lists; uniforms [N, L] float64 in [0, 1), row by row.

        Stops early once every row has ended. Returned widths are P (the longest prompt) and at most L.
        """
        u = torch.from_numpy(uniforms).to(self.device)  # [N, L]
        adapted = self.adapter.enabled  # as the captured step is
        with self.adapter.merged():
            tokens, mask, logp, alive = self.sampler.draw(prompts, u, cuda_graph=adapted)
        return Rollout(*pad_left(prompts, self.pad, self.device), tokens, mask.long(), logp * mask, ended=~alive)

    def logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass over prompts and responses.

        Returns logp [B, L] and entropy [B, L] (nats, float32, 0 if masked), and the hidden states [B, L, H] from which
        each response token was predicted, which a critic may read. Only logp carries a gradient.
        """
        if self.model.training != self.gradient_checkpointing:  # the same function either way: there is no dropout
            self.model.train(self.gradient_checkpointing)
        hidden = self.states(rollout)
        logp, entropy = TokenLogProbs.apply(
            hidden.flatten(0, 1), rollout.responses.flatten(), self.log_softmax, self.chunk
        )  # [B · L] each
        mask = rollout.mask
        return logp.view_as(mask) * mask, entropy.view_as(mask) * mask, hidden.detach()

    def states(self, rollout: Rollout) -> Tensor:
        """The hidden states [B, L, H] from which each response token is predicted: position t predicts token t + 1.

        A group's prompt is read once: its responses go on from the prompt's keys and values, which keep their gradient.
        """
        P, L = rollout.prompts.shape[1], rollout.mask.shape[1]
        S = rollout.group_size if self.shares_prompts and L > 1 else 1
        seen = torch.cat([rollout.prompt_mask, rollout.mask], 1)[:, : -1 if S > 1 else None]  # [B, P + L]
        at, read = positions(seen), self.model.base_model
        if S == 1:
            ids = torch.cat([rollout.prompts, rollout.responses], 1)
            states = read(input_ids=ids, attention_mask=seen, position_ids=at, use_cache=False).last_hidden_state
            return states[:, P - 1 : P + L - 1]
        prompts, mask = rollout.prompts[::S], rollout.prompt_mask[::S]  # [B / S, P]
        first = read(input_ids=prompts, attention_mask=mask, position_ids=at[::S, :P], use_cache=True)
        cache = first.past_key_values
        cache.batch_repeat_interleave(S)
        rest = read(
            input_ids=rollout.responses[:, :-1], attention_mask=seen, position_ids=at[:, P:], past_key_values=cache
        )
        last = first.last_hidden_state[:, -1:].repeat_interleave(S, 0)
        return torch.cat([last, rest.last_hidden_state], 1)

    @torch.no_grad()
    def logprobs_in_pieces(self, rollout: Rollout, micro_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """logp [B, L] and hidden states [B, L, H] of `logprobs`, without a graph, over the update's micro-batches."""
        pieces = [(rows, self.logprobs(piece)) for rows, piece in rollout.micro_batches(micro_batch_size)]
        logp, hidden = (assemble(rollout, [(rows, values[i]) for rows, values in pieces]) for i in (0, 2))
        return logp, hidden

    @torch.no_grad()
    def expected_kl(self, hidden: Tensor, hidden_ref: Tensor, mask: Tensor) -> Tensor:
        """KL(π_θ ‖ π_ref) of each response, Σ_t KL(π_θ(· | x, y_<t) ‖ π_ref(· | x, y_<t)), in nats: [B], float64.

        hidden, hidden_ref [B, L, H] from `logprobs` with the adapter on and off, mask [B, L]. The Rao–Blackwellised
        estimate (Amini et al. 2025): its mean over π_θ's responses is that of Σ_t log π_θ/π_ref, with less noise.
        """
        kl = []
        on_and_off = (states.flatten(0, 1).split(self.chunk) for states in (hidden, hidden_ref))
        for on, off in zip(*on_and_off, strict=True):
            logp = self.log_softmax(on)  # [chunk, V]
            kl.append((logp.exp() * (logp - self.log_softmax(off))).sum(1))
        return (torch.cat(kl).view_as(mask).double() * mask).sum(1)

    def log_softmax(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> log-probs of the next token [..., V], float32, at the sampling temperature."""
        logits = self.model.get_output_embeddings()(hidden).float()
        return torch.log_softmax(logits / self.temperature, dim=-1)

    def texts(self, rollout: Rollout) -> tuple[list[str], list[list[int]]]:
        """Decoded responses without special tokens, and their token ids up to and including EOS."""
        lengths = rollout.mask.sum(1).tolist()
        ids = [row[:n] for row, n in zip(rollout.responses.tolist(), lengths, strict=True)]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True), ids


def assemble(rollout: Rollout, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The results of micro-batches, (rows, [b, l, ...]) each, as one [B, L, ...]; 0 beyond a piece's width."""
    first = pieces[0][1]
    whole = first.new_zeros(*rollout.mask.shape, *first.shape[2:])
    for rows, values in pieces:
        whole[rows, : values.shape[1]] = values
    return whole


class TokenLogProbs(torch.autograd.Function):
    """log π and entropy of n tokens, from the hidden states that predict them, a chunk of tokens at a time.

    log π_t depends on θ through h_t alone, so ∂log π_t/∂h_t [H] is computed here, while the chunk's logits exist. Each
    of the M backward passes then only scales it: the output embedding is passed once backward, not M times, and no
    [B, L, V] tensor is ever whole in memory. [ours]
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, tokens: Tensor, log_softmax: Callable, chunk: int) -> tuple[Tensor, Tensor]:
        """hidden [n, H], tokens [n] -> log π [n] and entropy [n], float32; the entropy has no gradient."""
        logps, entropies, slopes = [], [], []
        for h, token in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
            h = h.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(h.requires_grad):
                logp_all = log_softmax(h)  # [chunk, V]
                logp = logp_all.gather(1, token[:, None])[:, 0]
            logps.append(logp.detach())
            entropies.append(-(logp_all.detach().exp() * logp_all.detach()).sum(1))
            if h.requires_grad:
                slopes.append(torch.autograd.grad(logp, h, torch.ones_like(logp))[0])  # [chunk, H]
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None, None]:
        """The chain rule: ∂L/∂h_t = ∂L/∂log π_t · ∂log π_t/∂h_t."""
        (slopes,) = ctx.saved_tensors  # [n, H]
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model may read, None if its config names no limit.

    Dynamic and longrope positions depend, beyond the length first trained on, on the longest row of a batch: a row's
    log-probs would depend on its neighbours, so that length is the limit.
    """
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return min(context, rope.get("original_max_position_embeddings") or context)
    return context


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS, and those that the generation config names.

    Raises ValueError for a tokenizer without EOS (the model's are then mere defaults), or with none in the vocabulary.
    """
    named = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    inside = sorted(i for i in ids if i < vocabulary)
    if tokenizer.eos_token_id is None or not inside:
        raise ValueError(f"model: its tokenizer names no EOS in its vocabulary of {vocabulary}; set its eos_token")
    return inside


@torch.no_grad()
def check(policy: Policy) -> None:
    """Raise ValueError, naming the model's type, if its log-probs depend on how they are computed. [ours]

    Three computations of the same tokens have to agree, for short rows beside long ones: the sampler's, from a table
    that is nearly empty; the model's own, row by row; and `Policy.logprobs`, with left padding. Models that ignore
    position_ids, look ahead, need another cache, or scale or cap their logits fail. A fourth, of two responses that
    go on from one reading of their prompt, decides whether groups do so.
    """
    model, V = policy.model, len(policy.model.get_output_embeddings().weight)
    words = [V * i // 16 for i in range(16)]
    prompts = [words[:2], words[:2], words[2:], words[2:]]
    u = torch.zeros(4, 3, dtype=torch.float64, device=policy.device)  # token 0, thrice; any token would do
    u[1::2] = 0.9  # but responses to the same prompt should differ
    who, remedy = f"model: {model.config.model_type}", "use a decoder-only model with full attention, such as Llama"
    try:
        endless = Sampler(model, policy.log_softmax, [], policy.pad)
        tokens, mask, sampled, alive = Decoder(endless, 4, 16, WIDE).run(prompts, u, cuda_graph=False)
        rows = [torch.tensor([p + r], device=policy.device) for p, r in zip(prompts, tokens.tolist(), strict=True)]
        outputs = [model(input_ids=row, attention_mask=torch.ones_like(row)) for row in rows]
        logits = torch.cat([output.logits[:, -4:-1] for output in outputs]).float()  # [4, 3, V]
        alone = (logits / policy.temperature).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        padded = pad_left(prompts, policy.pad, policy.device)
        rollout = Rollout(*padded, tokens, mask.long(), sampled, ended=~alive)
        computed, _, _ = policy.logprobs(rollout)
    except Exception as error:  # a model's own code may raise anything on a cache that it does not expect
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{who} cannot be sampled from and trained here ({reason}); {remedy}") from error
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    agree = partial(torch.allclose, computed, rtol=tolerance, atol=tolerance)
    if not agree(sampled) or not agree(alone):
        raise ValueError(f"{who} gives a row other log-probs alone, in a batch or with a cache; {remedy}")
    if policy.shares_prompts:
        try:
            policy.shares_prompts = agree(policy.logprobs(replace(rollout, group_size=2))[0])
        except Exception:  # as above
            policy.shares_prompts = False
        if not policy.shares_prompts:
            warnings.warn(f"{who} cannot read a group's prompt once: it reads it with every response", stacklevel=2)
