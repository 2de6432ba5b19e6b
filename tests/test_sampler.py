"""The sampler: a response depends on its prompt and its own uniforms, from steps that a CUDA graph can hold."""

import numpy as np
import pytest
import torch
from conftest import make_model, make_policy, make_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import sampler
from rollout import Policy
from sampler import Decoder, by_length, inverse_cdf
from settings import ModelSettings

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12, 5, 20)]
UNIFORMS = torch.from_numpy(RNG.random((6, 16)))
MANY = torch.from_numpy(RNG.random((60, 16)))


@torch.no_grad()
def by_hand(policy, prompt, uniforms) -> list[int]:
    """A response from the model's own logits, one whole pass over the row for every token: no cache, no padding."""
    tokens = []
    while len(tokens) < len(uniforms) and not set(tokens) & set(policy.eos):
        logits = policy.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        cdf = (logits.double() / policy.temperature).softmax(-1).cumsum(-1)
        tokens.append(int((cdf > uniforms[len(tokens)]).nonzero()[0]))
    return tokens


def responses(drawn) -> list[list[int]]:
    """The real tokens of every row."""
    tokens, mask, _, _ = drawn
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_response_is_what_a_loop_without_cache_padding_and_neighbours_draws(kind, temperature):
    policy = make_policy(kind, temperature=temperature)
    drawn = policy.sampler.draw(PROMPTS * 10, MANY)
    assert responses(drawn) == [by_hand(policy, prompt, u) for prompt, u in zip(PROMPTS * 10, MANY, strict=True)]
    ended = [row[-1] in policy.eos for row in responses(drawn)]
    assert drawn[3].tolist() == [not end for end in ended]
    assert 0 < sum(ended) < 60  # both kinds occurred


@torch.no_grad()
def test_a_table_of_more_rows_and_columns_used_before_draws_the_same(policy):
    # a captured graph's table is kept and serves smaller batches; GPT-2 has 64 positions, which rows may not run out of
    expected = responses(policy.sampler.draw(PROMPTS * 10, MANY))
    ended = [i for i, row in enumerate(expected) if len(row) < 12]
    wide = Decoder(policy.sampler, rows=99, P=33, L=16)
    for rows in (list(range(60)), ended) * 3:
        drawn = wide.run([PROMPTS[i % 6] for i in rows], MANY[rows], cuda_graph=False)
        assert responses(drawn) == [expected[i] for i in rows]
    assert drawn[0].shape[1] < 12  # it stopped early
    assert int(wide.position.max()) < 64


def test_equal_prompts_are_read_once_and_prefilling_in_pieces_changes_nothing(policy, monkeypatch):
    prompts = [p for p in PROMPTS[:3] for _ in range(2)]
    expected = responses(policy.sampler.draw(prompts, UNIFORMS))
    base, widths = policy.model.base_model, []
    forward = base.forward

    def counted(*args, **kwargs):
        widths.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 10)
    assert responses(policy.sampler.draw(prompts, UNIFORMS)) == expected
    assert widths[:2] == [(1, 9), (2, 3)]  # then single tokens
    assert {width for _, width in widths[2:]} == {1}


@pytest.mark.parametrize("tokens", [1, 20, 24, 1000])
def test_pieces_hold_every_prompt_once_longest_first_within_the_budget(tokens):
    pieces = list(by_length(PROMPTS, tokens))
    assert [p for piece in pieces for p in piece] == sorted(PROMPTS, key=len, reverse=True)
    assert all(len(piece) == 1 or len(piece) * len(piece[0]) <= tokens for piece in pieces)


@torch.no_grad()
def test_a_step_leaves_every_buffer_where_it_was(policy):
    # a graph reads and writes the addresses of its recording
    decoder = Decoder(policy.sampler, 6, 20, 16)
    decoder.prefill(PROMPTS)

    def buffers():
        named = {k: v.data_ptr() for k, v in vars(decoder).items() if isinstance(v, torch.Tensor)}
        return named | {i: (x.keys.data_ptr(), x.values.data_ptr()) for i, x in enumerate(decoder.cache.layers)}

    before = buffers()
    decoder.advance()
    decoder.choose()
    decoder.run(PROMPTS[:2], UNIFORMS[:2], cuda_graph=False)
    assert buffers() == before


SIZE = {"vocab_size": 50, "hidden_size": 32, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2}
WINDOW = MistralConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=64, **SIZE)
LOCAL = GPTNeoConfig(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=64, **SIZE)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: MistralForCausalLM(WINDOW), "mistral"),  # a window, however wide
        (lambda: GPTNeoForCausalLM(LOCAL), "gpt_neo"),  # attention that counts back from the table's end
        (lambda: BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **SIZE)), "bloom"),  # ALiBi
        (lambda: MambaForCausalLM(MambaConfig(num_hidden_layers=2, **SIZE)), "mamba"),  # a recurrent state
    ],
)
def test_a_model_that_needs_another_cache_is_refused_by_name_in_one_line(model, name):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"^model: {name} .*; .*$"):
        Policy(model(), make_tokenizer(), ModelSettings(lora_rank=4))


def test_a_model_whose_unlikely_first_token_is_an_eos_is_not_refused():
    model = make_model("llama")
    model.generation_config.eos_token_id = [0, 2]  # `check` draws token 0
    assert Policy(model, make_tokenizer(), ModelSettings(lora_rank=4)).eos == [0, 2]


def test_inverse_cdf_picks_the_first_token_past_u_and_never_one_of_probability_zero():
    logp = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).log().expand(7, 6)
    u = torch.tensor([0.0, 0.19999, 0.20001, 0.69999, 0.70001, 0.99999, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logp, u).tolist() == [1, 1, 3, 3, 4, 4, 4]
