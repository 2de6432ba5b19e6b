"""From prompts to responses and their log-probabilities.

Sampling (`sampler.py`) turns uniforms into tokens. A client draws its uniforms from a stream of its own
(`clients.stream`), so its responses do not depend on who shares its batch, on early stops, or on a restart, except
where a uniform lies within rounding of an edge of the CDF: hardly ever in float32, but in most longer responses in 16
bits, where another batch rounds otherwise; they then have the same distribution. [ours]

    prompts   [N, P]  left-padded, so that every row's last prompt token stands at P − 1
    responses [N, L]  right-padded; mask [N, L] is 1 up to and including the first EOS, which is trained like any token
    logp      [B, L]  log π(response token | everything before), float32, at the sampling temperature

Position ids come from the mask. Log-softmax runs in float32 and only over response positions: the backbone's hidden
states first, then the output embedding, on the slice that is needed and a chunk of tokens at a time (`TokenLogProbs`).
Sampling is cohort-wide; a client's log-probs run on its own rows, cut to its own width and to micro-batches, for
π_old and π_new alike. All this rests on a model that gives a row the same log-probs however it is computed; one that
does not is found out when its policy is made (`unfit`), and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as widened

from app.fields import Checked, Count, Positive, setting
from app.loading import in_one_line, named, pretrained
from app.stopwatch import phase
from lora import Adapter, LoRAConfig, inject
from sampler import Sampler, pad_left, positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGITS_IN_MEMORY = 2**24  # float32 logits of one chunk: 64 MB, a few times over
OTHER = "choose another decoder-only model, or other lora_targets"
LOGIT_SETTINGS = (  # what caps and scales are called; off where None or 1
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
)  # fmt: skip


@dataclass
class RolloutConfig(Checked):
    """The policy and how it answers."""

    model: str = setting("", "policy: a checkpoint directory or a hub name; empty is the tiny model of --world")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "type of the frozen weights")
    max_new_tokens: Count = setting(128, "response length L, in tokens")
    temperature: Positive = setting(1.0, "sampling temperature, also that of every log-prob")
    sample_batch_size: Count | None = setting(None, "rows sampled at once; the whole cohort where not given")
    cuda_graph: bool = setting(True, "on a GPU, capture the decode step as a CUDA graph")
    gradient_checkpointing: bool = setting(
        False, "keep one state per layer and recompute the rest: less memory, more time"
    )


@dataclass
class Rollout:
    """N responses, each with its prompt; in a whole batch those of a group stand in consecutive rows."""

    prompts: Tensor  # [N, P] token ids, left-padded
    prompt_mask: Tensor  # [N, P]
    responses: Tensor  # [N, L] token ids, right-padded
    mask: Tensor  # [N, L] 1 up to the first EOS inclusive
    sampled_logp: Tensor  # [N, L] as the sampler saw it; only to watch the gap to `Policy.logprobs`
    ended: Tensor  # [N] bool, whether the response came to an EOS
    lengths: Tensor | None = None  # [N, 2] of prompt and response, always on the CPU: cutting asks no GPU for them
    group_size: int = 1  # S, so many rows in a row answer one prompt; no half-batch cuts them apart

    def __post_init__(self) -> None:
        if self.lengths is None:
            self.lengths = torch.stack([self.prompt_mask.sum(1), self.mask.sum(1)], 1).cpu()

    def __len__(self) -> int:
        return self.prompts.shape[0]

    @property
    def half(self) -> int:
        """Rows of the first half-batch: whole groups, the larger half of an odd number of them."""
        return (len(self) // self.group_size + 1) // 2 * self.group_size

    def rows(self, rows: slice | Tensor) -> Rollout:
        """Some rows, cut to their own width. rows: a slice of whole groups, or a micro-batch's indices, on the CPU."""
        cut = replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "group_size"})
        P, L = cut.lengths.amax(0).tolist()
        return replace(
            cut,
            prompts=cut.prompts[:, -P:],
            prompt_mask=cut.prompt_mask[:, -P:],
            responses=cut.responses[:, :L],
            mask=cut.mask[:, :L],
            sampled_logp=cut.sampled_logp[:, :L],
        )

    def micro_batches(self, size: int | None) -> Iterator[tuple[Tensor, Rollout]]:
        """Pieces of at most `size` rows, each with its row numbers; all rows as they are where that is enough.

        Each half of the batch is cut apart by itself, longest rows first, every piece to its own width: less padding,
        and a half's gradient costs nothing extra. Equal arguments cut alike, so that π_old and π_θ are computed alike.
        """
        if size is None or size >= len(self):
            yield torch.arange(len(self)), self
            return
        for half in torch.arange(len(self)).split(self.half):
            order = half[self.lengths[half].sum(1).argsort(descending=True, stable=True)]
            for rows in order.split(size):
                yield rows, self.rows(rows)


class Policy:
    """A frozen causal language model, its tokenizer, and one adapter: π_θ, and π_ref with the adapter off.

    `eos` is every id that ends a response, `pad` the padding id; no token is added and no embedding resized.
    Raises ValueError, in one line, for a model that cannot be sampled from or trained (`unfit`).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoRAConfig,
        config: RolloutConfig | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        config = config or RolloutConfig()
        self.model, self.tokenizer, self.temperature = model, tokenizer, config.temperature
        self.sample_batch_size, self.gradient_checkpointing = config.sample_batch_size, config.gradient_checkpointing
        self.max_new_tokens = config.max_new_tokens
        self.device = next(model.parameters()).device
        avoid_cudnn_attention()
        model.eval()
        with in_one_line(f"model: {model.config.model_type} is no language model as used here", OTHER):
            vocabulary = model.get_input_embeddings().num_embeddings
            self.hidden_size = model.get_output_embeddings().weight.shape[1]
        self.chunk = max(LOGITS_IN_MEMORY // vocabulary, 1)  # tokens
        self.eos, pad = eos_ids(model, tokenizer, vocabulary), tokenizer.pad_token_id
        self.pad = pad if pad is not None and pad < vocabulary else self.eos[0]
        self.adapter: Adapter = inject(model, lora, seed)
        self.sampler = Sampler(model, self.log_softmax, self.eos, self.pad, config.cuda_graph)
        with in_one_line(
            f"model: {model.config.model_type} cannot be sampled from or trained with this adapter", OTHER
        ):
            if self.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            reason = unfit(self)
        if reason:
            raise ValueError(f"model: {model.config.model_type} {reason}")

    @phase("sample")
    def sample(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray) -> Rollout:
        """One response to each prompt. prompts: N token lists; uniforms [N, L] float64 in [0, 1), row by row.

        Stops early once every row has ended. Returned widths are P (the longest prompt) and at most L.
        """
        u = torch.from_numpy(uniforms).to(self.device)  # [N, L]
        size = self.sample_batch_size or len(prompts)
        on = self.adapter.enabled  # the captured step has it on
        with self.adapter.ready_to_sample():
            pieces = [
                self.sampler.draw(prompts[i : i + size], u[i : i + size], cuda_graph=on)
                for i in range(0, len(prompts), size)
            ]
        width = max(tokens.shape[1] for tokens, _, _, _ in pieces)
        widen = lambda x, value: widened(x, (0, width - x.shape[1]), value=value)  # noqa: E731
        tokens = torch.cat([widen(tokens, self.pad) for tokens, _, _, _ in pieces])
        mask = torch.cat([widen(mask, False) for _, mask, _, _ in pieces])
        logp = torch.cat([widen(logp, 0.0) for _, _, logp, _ in pieces])
        alive = torch.cat([alive for _, _, _, alive in pieces])
        return Rollout(*pad_left(prompts, self.pad, self.device), tokens, mask.long(), logp * mask, ended=~alive)

    def logprobs(self, batch: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass over prompts and responses.

        Returns logp [B, L] and entropy [B, L] (nats, float32, 0 where masked) and the hidden states [B, L, H] from
        which each response token was predicted, detached: what a critic may read of the past and nothing more. Only
        logp carries a gradient.
        """
        if self.model.training != self.gradient_checkpointing:  # the same function either way: there is no dropout
            self.model.train(self.gradient_checkpointing)
        seen = torch.cat([batch.prompt_mask, batch.mask], 1)  # [B, P + L]
        P, L = batch.prompts.shape[1], batch.responses.shape[1]
        hidden = self.model.base_model(
            input_ids=torch.cat([batch.prompts, batch.responses], 1),
            attention_mask=seen,
            position_ids=positions(seen),
            use_cache=False,
        ).last_hidden_state[:, P - 1 : P + L - 1]  # [B, L, H]; position t predicts token t + 1
        logp, entropy = TokenLogProbs.apply(
            hidden.flatten(0, 1), batch.responses.flatten(), self.log_softmax, self.chunk
        )  # [B · L] each
        return logp.view_as(batch.mask) * batch.mask, entropy.view_as(batch.mask) * batch.mask, hidden.detach()

    @torch.no_grad()
    def logprobs_in_pieces(self, batch: Rollout, micro_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """logp [B, L] and hidden states [B, L, H] of `logprobs`, without a graph, over the update's micro-batches."""
        pieces = [(rows, self.logprobs(piece)) for rows, piece in batch.micro_batches(micro_batch_size)]
        logp, hidden = (assemble(batch, [(rows, values[i]) for rows, values in pieces]) for i in (0, 2))
        return logp, hidden

    @torch.no_grad()
    def expected_kl(self, hidden: Tensor, hidden_ref: Tensor, mask: Tensor) -> Tensor:
        """KL(π_θ ‖ π_ref) of each response, Σ_t KL(π_θ(· | x, y_<t) ‖ π_ref(· | x, y_<t)), in nats: [B], float64.

        hidden, hidden_ref [B, L, H] from `logprobs` with the adapter on and off, mask [B, L]. Over responses drawn from
        π_θ its mean is that of Σ_t log π_θ/π_ref, without the noise of which token was drawn, and but for rounding
        it is never negative (the Rao–Blackwellised estimate, Amini et al. 2025).
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


def assemble(batch: Rollout, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What micro-batches gave, (rows, [b, l, ...]) each, as one [B, L, ...]; 0 where a piece was cut off."""
    first = pieces[0][1]
    whole = first.new_zeros(*batch.mask.shape, *first.shape[2:])
    for rows, values in pieces:
        whole[rows, : values.shape[1]] = values
    return whole


class TokenLogProbs(torch.autograd.Function):
    """log π and entropy of n tokens, from the hidden states that predict them, a chunk of tokens at a time.

    log π_t depends on θ through h_t alone, so ∂log π_t/∂h_t [H] is taken here, while the chunk's logits exist. Each of
    the M backward passes then only scales it: the output embedding is passed once backward, not M times, and no
    [B, L, V] tensor is ever whole in memory. [ours]
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, tokens: Tensor, log_softmax: Callable[[Tensor], Tensor], chunk: int
    ) -> tuple[Tensor, Tensor]:
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


def avoid_cudnn_attention() -> None:
    """Leave attention to torch's other kernels: cuDNN's, torch 2.13's first choice on H100 to B200, gives NaN gradients
    where a mask leaves a left-padded row nothing to see, and plans anew for every new shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def context_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model may read, None where it names no limit.

    Dynamic and longrope positions depend, beyond the length first trained on, on the longest row of a batch: a row's
    log-probs would depend on its neighbours, so that length is the limit there.
    """
    config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if context is None or rope.get("rope_type") not in ("dynamic", "longrope"):
        return context
    trained = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return min(context, trained or context)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS, and those that the generation config names.

    Raises ValueError for a tokenizer without EOS (the ids in a model's config are then mere defaults), and where every
    EOS lies outside the vocabulary.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("model: its tokenizer names no EOS token; set eos_token in tokenizer_config.json")
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not any(0 <= i < vocabulary for i in ids):
        raise ValueError(f"model: its EOS ids {sorted(ids)} lie outside its vocabulary of {vocabulary}")
    return sorted(i for i in ids if 0 <= i < vocabulary)


@torch.enable_grad()  # even where a policy is made without
def unfit(policy: Policy) -> str | None:
    """Why a model cannot be trained here, or None. [ours]

    What it makes of a row by itself is compared, over the whole vocabulary, with what `Policy.logprobs` makes of the
    row left-padded beside a longer one, and with what was sampled. Bidirectional models show, logits that are scaled
    or capped after the output embedding (Gemma 2, Cohere), and decoders that ignore `position_ids` (BART's kin).
    """
    model, exact = policy.model, policy.model.dtype == torch.float32
    words = torch.linspace(0, model.get_input_embeddings().num_embeddings - 1, 16, device=policy.device).long()
    short, long = words[:2], words[2:]

    def alone(row: Tensor) -> Tensor:
        return torch.log_softmax(model(input_ids=row[None]).logits[0].float() / policy.temperature, -1)  # [T, V]

    def differ(x: Tensor, y: Tensor) -> bool:  # or are NaN
        return not (x - y).norm() <= (1e-3 if exact else 0.1) * (y - y.mean(-1, keepdim=True)).norm()

    with torch.no_grad():
        after_long = alone(long)
        if differ(alone(long[:-3]), after_long[:-3]):
            return "predicts a token from those behind it; set is_decoder in its config.json, or use a causal model"
        prompts = [short.tolist(), long.tolist()]
        tokens, mask, sampled, alive = policy.sampler.try_out(prompts)
        after_short = alone(torch.cat([short, tokens[0]]))[1:-1]  # [3, V]
    batch = Rollout(*pad_left(prompts, policy.pad, policy.device), tokens, mask.long(), sampled, ended=~alive)
    logp, _, hidden = policy.logprobs(batch)
    config, ours = model.config.get_text_config(decoder=True), policy.log_softmax(hidden)  # [2, 3, V]
    named = any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS)
    if named or differ(ours[1, :1], after_long[-1:]):
        return "scales or caps its logits, or has more than an output embedding; use a model that does not"
    if differ(ours[0], after_short):
        return "gives a left-padded row other log-probs than the row alone; use a model that heeds position_ids"
    if not torch.allclose(logp.detach(), sampled, rtol=1e-4 if exact else 5e-2, atol=1e-4 if exact else 5e-2):
        return "gives other log-probs with a cache than in one pass; use another decoder-only model"
    grads = torch.autograd.grad(logp.sum(), policy.adapter.leaves(), allow_unused=True)
    unused = [name for name, grad in zip(policy.adapter.layers, grads[::2], strict=True) if grad is None]
    return f"makes no use of {unused[0]} on text alone; leave it out of lora_targets" if unused else None


def load_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, by directory or hub name. Raises ValueError as `pretrained` does."""
    with named("model"):
        remedy = "pass a local directory, --model DIR"
        return pretrained("AutoModelForCausalLM", name, "whole causal language model", remedy, dtype, device)
