"""Drawing responses: prompts and uniforms in, tokens out, one column at a time.

Sampling is inverse-CDF: the token at step t is the first whose cumulative probability exceeds a uniform u_t drawn
up front. A response then depends on its prompt and its own uniforms only. [ours]

    prefill   the distinct prompts, sorted by length, in pieces padded to their own width: keys and values go into the
              cache, into all rows that begin with them
    choose    hidden state of the last token -> distribution -> token t         [N, H] -> [N, V] -> [N]
    advance   token t -> the model, which reads and extends the cache -> hidden state        [N] -> [N, H]

The cache is a static table, N rows × (P + L) columns of keys and values. Row i's prompt ends at column P − 1 and its
token t stands at column P + t; a mask says which columns a row may see. No shape ever changes, and the step counter
lives on the device. On a GPU, "advance, choose" is therefore captured once as a CUDA graph and replayed: one launch per
token instead of about a thousand. A row that has ended goes on, masked, until all have. A CPU checks that after every
token, a GPU after every 16, since the host has to wait for the answer.

Left out on purpose: top-k and top-p (π would no longer be the distribution that is trained), beam search, and models
that need another cache (sliding windows, ALiBi, recurrent states), which `rollout.Policy` refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

PREFILL_TOKENS = 4096  # rows × width of one prefill pass: less padding, bounded memory, and a GPU is still full
BUCKET = 64  # a captured graph serves every prompt width up to the next multiple
STOP_CHECK = 16  # tokens between two checks whether every row has ended, on a GPU

Drawn = tuple[Tensor, Tensor, Tensor, Tensor]  # tokens [N, L], mask [N, L] bool, log-probs [N, L], alive [N] bool


def positions(mask: Tensor) -> Tensor:
    """Position ids [N, T] from an attention mask [N, T]: the first real token of a row stands at 0."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists of any lengths -> ids [N, P] and mask [N, P], padded on the left."""
    P = max(map(len, prompts))
    ids = torch.tensor([[pad] * (P - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def inverse_cdf(logp: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u. logp [N, V], u [N] in [0, 1) -> ids [N].

    A token of probability 0 is never chosen. The sum is in float64, in which V = 32,000 terms still add up to 1.
    """
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(logp.shape[1] - 1)


def by_length(prompts: Iterable[Sequence[int]], tokens: int) -> Iterator[list[Sequence[int]]]:
    """Prompts, longest first, in pieces of at most `tokens` rows × width (and at least one row)."""
    rest = sorted(prompts, key=len, reverse=True)
    while rest:
        rows = max(tokens // len(rest[0]), 1)
        yield rest[:rows]
        rest = rest[rows:]


class TableLayer(DynamicLayer):
    """One layer's keys and values [N, heads, P + L, head size]; new ones go to `column` [1], which all layers share."""

    def __init__(self, like: DynamicLayer, rows: int, width: int, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in (like.keys, like.values))
        self.column, self.is_initialized = column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the model's attention calls: write one column, return the whole table."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


class Decoder:
    """The state of `rows` rows of at most P prompt and L response tokens, at fixed addresses, and the steps on it."""

    def __init__(self, sampler: Sampler, rows: int, P: int, L: int) -> None:
        self.sampler, self.rows, self.P, self.L = sampler, rows, P, L
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=sampler.device)  # noqa: E731
        self.seen = zeros(rows, P + L, dtype=torch.bool)  # the columns a row attends to
        self.t, self.column = zeros(1, dtype=torch.long), zeros(1, dtype=torch.long)  # column = P + t
        self.position = zeros(rows, 1, dtype=torch.long)
        self.u, self.logp = zeros(rows, L, dtype=torch.float64), zeros(rows, L, dtype=torch.float32)
        self.tokens, self.mask = zeros(rows, L, dtype=torch.long), zeros(rows, L, dtype=torch.bool)
        self.token, self.alive = zeros(rows, dtype=torch.long), zeros(rows, dtype=torch.bool)
        self.hidden = self.cache = self.graph = None  # hidden [rows, H] and cache: by `prefill`; graph: by `capture`

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Every prompt's keys and values into the table, its last hidden state into `hidden`; equal prompts once."""
        for buffer in (self.t, self.position, self.seen, self.mask):
            buffer.zero_()
        self.column.fill_(self.P)
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        for read in by_length(rows_of, PREFILL_TOKENS):
            ids, mask = pad_left(read, self.sampler.pad, self.sampler.device)
            out = self.sampler.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True
            )
            layers, last = getattr(out.get("past_key_values"), "layers", [None]), out.last_hidden_state[:, -1]
            if any(type(layer) is not DynamicLayer for layer in layers):
                raise NotImplementedError("its cache is not a plain table of keys and values")
            if self.cache is None:
                self.hidden, self.minus_infinity = last.new_zeros(self.rows, last.shape[1]), torch.finfo(last.dtype).min
                self.cache = Cache([TableLayer(x, self.rows, self.P + self.L, self.column) for x in layers])
            pairs = [(row, i) for i, prompt in enumerate(read) for row in rows_of[prompt]]
            rows, source = torch.tensor(pairs, device=self.sampler.device).unbind(1)  # a table row, and what it repeats
            columns = slice(self.P - ids.shape[1], self.P)
            for table, layer in zip(self.cache.layers, layers, strict=True):
                table.keys[rows, :, columns] = layer.keys[source]
                table.values[rows, :, columns] = layer.values[source]
            self.hidden[rows] = last[source]
            self.seen[rows, columns] = mask[source].bool()
            self.position[rows, 0] = mask[source].sum(1)

    def choose(self) -> None:
        """Token t of every row, from the hidden state before it."""
        logp = self.sampler.log_softmax(self.hidden)  # [N, V]
        token = inverse_cdf(logp, self.u.index_select(1, self.t)[:, 0])  # [N]
        self.logp.index_copy_(1, self.t, logp.gather(1, token[:, None]))
        self.token.copy_(torch.where(self.alive, token, self.sampler.pad))
        self.tokens.index_copy_(1, self.t, self.token[:, None])
        self.mask.index_copy_(1, self.t, self.alive[:, None])
        self.alive.logical_and_((self.token[:, None] != self.sampler.eos).all(1))

    def advance(self) -> None:
        """The model reads token t; out comes the hidden state that predicts token t + 1."""
        self.seen.index_fill_(1, self.column, True)
        mask = torch.zeros_like(self.seen, dtype=self.hidden.dtype).masked_fill_(~self.seen, self.minus_infinity)
        out = self.sampler.model.base_model(
            input_ids=self.token[:, None], attention_mask=mask[:, None, None], position_ids=self.position,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.hidden.copy_(out.last_hidden_state[:, -1])
        for counter in (self.position, self.t, self.column):
            counter.add_(1)

    def run(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, cuda_graph: bool) -> Drawn:
        """N ≤ rows prompts, uniforms [N, at most L] -> what was drawn, up to the end of the longest row."""
        N, L = uniforms.shape
        self.prefill(prompts)
        if cuda_graph and self.graph is None:
            cuda_graph = self.capture()
            self.prefill(prompts)  # capturing ran the step
        self.alive.zero_()
        self.alive[:N] = True
        self.u[:N, :L] = uniforms
        self.choose()
        for t in range(1, L):
            if (not cuda_graph or t % STOP_CHECK == 0) and not self.alive.any():
                break
            if cuda_graph:
                self.graph.replay()
            else:
                self.advance()
                self.choose()
        longest = int(self.mask[:N].any(0).sum())  # a graph may have gone on after the end
        tokens, mask, logp = (x[:N, :longest].clone() for x in (self.tokens, self.mask, self.logp))
        return tokens, mask, logp, self.alive[:N].clone()

    def capture(self) -> bool:
        """Record one step as a CUDA graph, after a first call outside it, in which libraries set themselves up.

        If a model's step cannot be recorded, this warns and returns False, and the sampler goes on without a graph.
        """
        before, aside = torch.cuda.current_stream(), self.sampler.stream
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            self.advance()
            self.choose()
        before.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=aside):
                self.advance()
                self.choose()
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"the decode step cannot be captured ({reason}); sampling will be slower", stacklevel=2)
            self.sampler.cuda_graph, self.sampler.decoder = False, None
            return False
        self.graph = graph
        return True


class Sampler:
    """Draws from one of transformers' causal language models; on a GPU it keeps the last decoder and its graph.

    log_softmax: hidden states [N, H] -> log-probs [N, V], float32, at the sampling temperature.
    """

    def __init__(self, model: nn.Module, log_softmax: Callable, eos: list[int], pad: int) -> None:
        self.model, self.log_softmax, self.pad = model, log_softmax, pad
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos, device=self.device)
        self.decoder: Decoder | None = None
        self.cuda_graph = self.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.cuda_graph else None  # one: libraries keep a workspace for each

    @torch.no_grad()
    def draw(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, cuda_graph: bool = True) -> Drawn:
        """One response to each of N token lists, from uniforms [N, L] float64, cut at the end of the longest row.

        cuda_graph=False: without the captured step, if the model has been switched to another since (adapter off).
        """
        self.model.eval()  # in training mode, a model that checkpoints gradients does without a cache
        N, P, L = len(prompts), max(map(len, prompts)), uniforms.shape[1]
        if not (self.cuda_graph and cuda_graph and L > 1):  # the exact size is the fastest, and buffers cost little
            return Decoder(self, N, P, L).run(prompts, uniforms, cuda_graph=False)
        last = self.decoder
        if last is None or not (last.rows / 2 < N <= last.rows and P <= last.P and L == last.L):
            self.decoder = last = None  # its memory goes before the next one takes its own
            self.decoder = Decoder(self, N, -(-P // BUCKET) * BUCKET, L)
        return self.decoder.run(prompts, uniforms, cuda_graph=True)
