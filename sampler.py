"""Drawing responses: prompts and uniforms in, tokens out, one column at a time.

Sampling is inverse-CDF: the token at step t is the first whose cumulative probability exceeds a uniform u_t drawn
up front. So a response depends on its prompt and its own uniforms, and not on who shares the batch. [ours]

    prefill   the distinct prompts, sorted by length, in pieces padded to their own width: keys and values go into the
              cache, into all rows that begin with them
    choose    hidden state of the last token -> distribution -> token t         [N, H] -> [N, V] -> [N]
    advance   token t -> the model, which reads and extends the cache -> hidden state        [N] -> [N, H]

The cache is a static table, N rows × (P + L) columns of keys and values, allocated once. Row i's prompt ends at column
P − 1 and its token t stands at column P + t; a mask says which columns a row may see. Nothing else changes shape
either, and the step counter lives on the device, so on a GPU "advance, choose" is captured once as a CUDA graph and
replayed: one launch a token in place of a thousand, and no word from the host. Rows that have ended go on, unseen,
until all have; whether they have is asked every STOP_CHECK tokens there, and at every token on a CPU, where asking is
free.

Models that cannot work on such a table (sliding windows, ALiBi, …) are found out when they are loaded and take
`draw_growing`: the same tokens, with transformers' own cache.

Left out on purpose: top-k and top-p (π would no longer be the distribution that is trained), beam search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_TOKENS = 4096  # rows × width of one prefill pass: less padding, bounded memory, and a GPU is still full
BUCKET = 64  # a captured graph serves every prompt width up to the next multiple
WIDE = 1024  # columns of the table that a model is tried on when it is loaded
STOP_CHECK = 16  # tokens between two looks at whether every row has ended, on a GPU
GPU = "cuda"  # the type of device that can capture a graph

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

    A token of probability 0 is never chosen. Summed in float64, so that V = 32,000 terms still add up to 1.
    """
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(logp.shape[1] - 1)


def by_length(prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest prompts first, in pieces of at most `tokens` rows × width (and at least one row)."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        rows = max(tokens // len(prompts[order[0]]), 1)
        yield order[:rows]
        order = order[rows:]


class TableLayer(DynamicLayer):
    """One layer's keys and values [N, heads, P + L, head size]; new ones go to `column` [1], which all layers share."""

    def __init__(self, like: DynamicLayer, rows: int, width: int, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in (like.keys, like.values))
        self.column, self.is_initialized = column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the model's attention calls: take one column in, give the whole table out."""
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
        self.hidden: Tensor | None = None  # [rows, H]; its type and the cache's shapes come with the first prefill
        self.cache: Cache | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Every prompt's keys and values into the table, its last hidden state into `hidden`; step 0 comes next.

        Rows with equal prompts are read once: a group of responses costs one prompt.
        """
        for buffer in (self.t, self.position, self.seen, self.mask):
            buffer.zero_()
        self.column.fill_(self.P)
        self.seen[:, self.P - 1] = True  # rows without a prompt see something: attention to nothing would be NaN
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        distinct = list(rows_of)
        for numbers in by_length(distinct, PREFILL_TOKENS):
            read = [distinct[i] for i in numbers]
            ids, mask = pad_left(read, self.sampler.pad, self.sampler.device)
            out = self.sampler.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True
            )
            grown, last = out.past_key_values.layers, out.last_hidden_state[:, -1]
            if any(type(layer) is not DynamicLayer for layer in grown):
                raise NotImplementedError("a cache that is no plain table of keys and values")
            if self.cache is None:
                self.hidden, self.minus_infinity = last.new_zeros(self.rows, last.shape[1]), torch.finfo(last.dtype).min
                self.cache = Cache([TableLayer(layer, self.rows, self.P + self.L, self.column) for layer in grown])
            pairs = [(row, i) for i, prompt in enumerate(read) for row in rows_of[prompt]]
            rows, source = torch.tensor(pairs, device=self.sampler.device).unbind(1)  # a table row, and what it repeats
            columns = slice(self.P - ids.shape[1], self.P)
            for table, layer in zip(self.cache.layers, grown, strict=True):
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
        """N ≤ rows prompts, uniforms [N, at most L] -> what was drawn, up to where the last row ends."""
        N, wanted = uniforms.shape
        cuda_graph = cuda_graph and self.L > 1  # the first token needs no step
        self.prefill(prompts)
        if cuda_graph and self.graph is None:
            cuda_graph = self.capture()
            self.prefill(prompts)  # capturing ran the step
        self.alive.zero_()
        self.alive[:N] = True
        self.u[:N, :wanted] = uniforms
        self.choose()
        for t in range(1, wanted):
            if (not cuda_graph or t % STOP_CHECK == 0) and not self.alive.any():
                break
            if cuda_graph:
                self.graph.replay()
            else:
                self.advance()
                self.choose()
        drawn = int(self.mask[:N].any(0).sum())  # a graph may have gone on after the end
        tokens, mask, logp = (x[:N, :drawn].clone() for x in (self.tokens, self.mask, self.logp))
        return tokens, mask, logp, self.alive[:N].clone()

    def capture(self) -> bool:
        """Record one step as a CUDA graph, after a first call outside it, in which libraries set themselves up.

        A model whose step cannot be recorded is drawn from without: False, and a line that says so.
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
            print(f"warning: the decode step cannot be captured ({reason}); start anew with --cuda_graph False")
            self.sampler.cuda_graph, self.sampler.decoder = False, None
            return False
        self.graph = graph
        return True


class GrowingDecoder(Decoder):
    """The same steps on transformers' own cache, which grows by a column a token, as the mask then does."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """All prompts in one pass, padded to one width."""
        ids, self.seen = pad_left(prompts, self.sampler.pad, self.sampler.device)
        self.position = self.seen.sum(1, keepdim=True)
        self.read(ids, positions(self.seen), None)

    def advance(self) -> None:
        """The model reads token t."""
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], 1)
        self.read(self.token[:, None], self.position, self.cache)
        self.position, self.t = self.position + 1, self.t + 1

    def read(self, ids: Tensor, position: Tensor, cache: Cache | None) -> None:
        """One pass over ids [N, T] behind what the cache holds."""
        out = self.sampler.model.base_model(
            input_ids=ids, attention_mask=self.seen, position_ids=position, past_key_values=cache, use_cache=True
        )
        self.cache, self.hidden = out.past_key_values, out.last_hidden_state[:, -1]


class Sampler:
    """Draws from one model; on a GPU it keeps the last decoder, whose graph usually fits the next batch too.

    log_softmax: hidden states [N, H] -> log-probs [N, V], float32, at the sampling temperature.
    """

    def __init__(
        self, model: PreTrainedModel, log_softmax: Callable[[Tensor], Tensor], eos: list[int], pad: int,
        cuda_graph: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.log_softmax, self.pad = model, log_softmax, pad
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos, device=self.device)
        self.cuda_graph = cuda_graph and self.device.type == GPU
        self.decoder: Decoder | None = None
        self.stream = torch.cuda.Stream() if self.cuda_graph else None  # one, so that libraries keep one workspace
        self.static = False  # until `try_out` has seen it work

    @torch.no_grad()
    def draw(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, cuda_graph: bool = True) -> Drawn:
        """One response to each of N token lists, from uniforms [N, L] float64, cut where the last row ends.

        cuda_graph=False: not from the captured step, for a model that was switched to another since.
        """
        if self.model.training:  # where gradients are checkpointed; it would do without a cache
            self.model.eval()
        if not self.static:
            return self.draw_growing(prompts, uniforms)
        N, P, L = len(prompts), max(map(len, prompts)), uniforms.shape[1]
        if not (self.cuda_graph and cuda_graph):  # buffers cost little there, and the exact size is the fastest
            return Decoder(self, N, P, L).run(prompts, uniforms, cuda_graph=False)
        kept = self.decoder
        if kept is None or not (kept.rows / 2 < N <= kept.rows and P <= kept.P and L == kept.L):
            self.decoder = kept = None  # its memory goes before the next one takes its own
            self.decoder = Decoder(self, N, -(-P // BUCKET) * BUCKET, L)
        return self.decoder.run(prompts, uniforms, cuda_graph=True)

    @torch.no_grad()
    def draw_growing(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> Drawn:
        """What `draw` draws, with a cache that grows: for models without a static one, and to check those with."""
        width = max(map(len, prompts))
        return GrowingDecoder(self, len(prompts), width, uniforms.shape[1]).run(prompts, uniforms, cuda_graph=False)

    @torch.no_grad()
    def try_out(self, prompts: Sequence[Sequence[int]]) -> Drawn:
        """Three tokens for each prompt, with a growing cache and without an end.

        From then on `draw` works on a static table, if the model was made for one and computes the same on it.
        """
        u = torch.zeros(len(prompts), 3, dtype=torch.float64, device=self.device)  # draws token 0, however it rounds
        eos, self.eos = self.eos, self.eos[:0]
        growing = self.draw_growing(prompts, u)
        if getattr(self.model, "_can_compile_fullgraph", False):
            try:  # in a table far wider than its content: attention to the last few columns alone shows
                table = Decoder(self, len(prompts) + 2, max(map(len, prompts)) + 3, WIDE)
                static = table.run(prompts, u, cuda_graph=False)
                tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2  # what 16 bits may round
                self.static = torch.allclose(static[2], growing[2], rtol=tolerance, atol=tolerance)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception:  # whatever a model's own code raises on a cache that it does not expect
                self.static = False
        self.eos = eos
        if not self.static and self.device.type == GPU:
            print("note: this model cannot work on a static cache; sampling is several times slower than it could be")
        return growing
