"""The sampler: a static cache draws what the growing one draws, in steps that a CUDA graph can hold."""

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
from lora import LoRAConfig
from rollout import Policy, RolloutConfig
from sampler import Decoder, by_length, inverse_cdf

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12, 5, 20)]
UNIFORMS = torch.from_numpy(RNG.random((6, 16)))
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def assert_agree(drawn, expected, tolerance=1e-5):
    """Same tokens where both are real, and the same log-probs there."""
    tokens, mask, logp, alive = drawn
    n = min(mask.shape[1], expected[1].shape[1])
    assert int(mask[:, n:].sum()) == int(expected[1][:, n:].sum()) == 0
    assert torch.equal(mask[:, :n], expected[1][:, :n]) and torch.equal(alive, expected[3])
    assert torch.equal(tokens[:, :n] * mask[:, :n], expected[0][:, :n] * mask[:, :n])
    assert ((logp[:, :n] - expected[2][:, :n]) * mask[:, :n]).abs().max() <= tolerance


def test_a_static_cache_gives_the_growing_ones_tokens_and_logprobs(policy):
    assert policy.sampler.static
    assert_agree(policy.sampler.draw(PROMPTS, UNIFORMS), policy.sampler.draw_growing(PROMPTS, UNIFORMS))


def test_a_bucket_wider_and_longer_than_the_batch_changes_nothing(policy):
    # what a captured graph does: more rows, more prompt columns than this batch needs
    with torch.no_grad():
        wide = Decoder(policy.sampler, rows=11, P=33, L=16).run(PROMPTS, UNIFORMS, cuda_graph=False)
    assert_agree(wide, policy.sampler.draw_growing(PROMPTS, UNIFORMS))


@torch.no_grad()
def test_a_decoder_used_before_draws_as_a_new_one(policy):
    used = Decoder(policy.sampler, rows=6, P=20, L=16)
    used.run([p[::-1] * 2 for p in PROMPTS[:3]], UNIFORMS.flip(0)[:3], cuda_graph=False)
    assert_agree(used.run(PROMPTS, UNIFORMS, cuda_graph=False), policy.sampler.draw_growing(PROMPTS, UNIFORMS))


@torch.no_grad()
def test_rows_that_a_small_batch_leaves_empty_never_run_out_of_positions(policy):
    # a decoder that is kept for long serves smaller batches too; GPT-2 has 64 positions
    kept = Decoder(policy.sampler, rows=6, P=20, L=16)
    for _ in range(6):
        small = kept.run(PROMPTS[:4], UNIFORMS[:4], cuda_graph=False)
    assert_agree(small, policy.sampler.draw_growing(PROMPTS[:4], UNIFORMS[:4]))
    assert int(kept.position.max()) < 64


def test_prefilling_in_pieces_changes_nothing(policy, monkeypatch):
    whole = policy.sampler.draw(PROMPTS, UNIFORMS)
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 24)
    assert_agree(policy.sampler.draw(PROMPTS, UNIFORMS), whole)


def test_rows_with_equal_prompts_are_read_once_and_drawn_as_if_each_had_been(policy, monkeypatch):
    prompts, read = [p for p in PROMPTS[:3] for _ in range(2)], []
    base = policy.model.base_model
    forward = base.forward

    def counted(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            read.extend(kwargs["input_ids"].tolist())
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    drawn = policy.sampler.draw(prompts, UNIFORMS)
    assert len(read) == 3
    assert_agree(drawn, policy.sampler.draw_growing(prompts, UNIFORMS))


@pytest.mark.parametrize("tokens", [1, 20, 24, 1000])
def test_pieces_hold_every_row_once_longest_first_within_the_budget(tokens):
    pieces = list(by_length(PROMPTS, tokens))
    assert sorted(i for piece in pieces for i in piece) == list(range(6))
    lengths = [len(PROMPTS[i]) for piece in pieces for i in piece]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(piece) == 1 or len(piece) * len(PROMPTS[piece[0]]) <= tokens for piece in pieces)


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


def fallback(model) -> Policy:
    policy = Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4))
    theta = policy.adapter.vector()
    policy.adapter.assign(theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_a_sliding_window_takes_the_growing_cache_and_samples_what_it_trains():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=6, **size, **SPECIAL)
    policy = fallback(MistralForCausalLM(config))
    assert not policy.sampler.static
    batch = policy.sample(PROMPTS, UNIFORMS.numpy())
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-4


def test_alibi_takes_the_growing_cache_and_samples_what_it_trains():
    torch.manual_seed(0)
    policy = fallback(BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)))
    assert not policy.sampler.static
    batch = policy.sample(PROMPTS, UNIFORMS.numpy())
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-4


def test_attention_that_counts_back_from_the_tables_end_takes_the_growing_cache():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 2048, "window_size": 8}
    config = GPTNeoConfig(vocab_size=50, attention_types=[[["global", "local"], 1]], **size, **SPECIAL)
    policy = fallback(GPTNeoForCausalLM(config))
    assert not policy.sampler.static
    batch = policy.sample(PROMPTS, UNIFORMS.numpy())
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-4


def test_a_model_that_cannot_run_with_the_adapter_is_refused_in_one_line():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, **SPECIAL))
    with pytest.raises(ValueError, match="model: mamba cannot be sampled.*lora_targets"):
        Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4))


def test_a_model_whose_first_token_is_an_eos_still_gets_its_static_cache():
    model = make_model("llama")
    model.generation_config.eos_token_id = [0, 2]
    assert Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4)).sampler.static


def test_sampling_in_smaller_batches_changes_no_response(kind, monkeypatch):
    whole = make_policy(kind).sample(PROMPTS, UNIFORMS.numpy())
    policy = make_policy(kind)
    policy.sample_batch_size = 4
    draw, sizes = policy.sampler.draw, []
    monkeypatch.setattr(policy.sampler, "draw", lambda p, *args, **kw: sizes.append(len(p)) or draw(p, *args, **kw))
    pieces = policy.sample(PROMPTS, UNIFORMS.numpy())
    assert sizes == [4, 2]
    assert torch.equal(pieces.prompts, whole.prompts) and torch.equal(pieces.mask, whole.mask)
    assert torch.equal(pieces.responses * pieces.mask, whole.responses * whole.mask)
    assert (pieces.sampled_logp - whole.sampled_logp).abs().max() < 1e-5


def test_sampling_from_the_reference_samples_from_the_base_model(kind):
    policy, base = make_policy(kind), make_policy(kind, noise=0.0)
    with policy.adapter.disabled():
        off = policy.sample(PROMPTS, UNIFORMS.numpy())
    expected = base.sample(PROMPTS, UNIFORMS.numpy())
    assert torch.equal(off.responses * off.mask, expected.responses * expected.mask)


def test_sampling_leaves_the_base_weights_bit_for_bit(policy):
    before = {name: layer.base.weight.clone() for name, layer in policy.adapter.layers.items()}
    policy.sample(PROMPTS, UNIFORMS.numpy())
    assert all(torch.equal(layer.base.weight, before[name]) for name, layer in policy.adapter.layers.items())


def test_over_16_bit_weights_the_adapter_is_not_merged_and_samples_what_it_trains(kind):
    policy = Policy(make_model(kind).to(torch.bfloat16), make_tokenizer(), LoRAConfig(lora_rank=4))
    theta = policy.adapter.vector()
    for seed in (1, 2):  # the second time the rounded copies must be new ones
        noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed))
        policy.adapter.assign(theta + 0.1 * noise)
        layer = next(iter(policy.adapter.layers.values()))
        with policy.adapter.ready_to_sample():
            assert layer.enabled and torch.equal(layer.rounded[1], layer.B.to(torch.bfloat16))
        batch = policy.sample(PROMPTS, UNIFORMS.numpy())
        assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_while_sampling_leaves_weights_and_adapter_as_they_were(dtype, monkeypatch):
    policy = Policy(make_model("llama").to(dtype), make_tokenizer(), LoRAConfig(lora_rank=4))
    before = {name: layer.base.weight.clone() for name, layer in policy.adapter.layers.items()}
    monkeypatch.setattr(policy.sampler, "draw", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.sample(PROMPTS, UNIFORMS.numpy())
    for name, layer in policy.adapter.layers.items():
        assert layer.enabled and torch.equal(layer.base.weight, before[name])


def test_checkpointing_gradients_does_not_take_the_cache_from_sampling(kind):
    settings = RolloutConfig(gradient_checkpointing=True)
    policy = Policy(make_model(kind), make_tokenizer(), LoRAConfig(lora_rank=4), settings)
    plain = Policy(make_model(kind), make_tokenizer(), LoRAConfig(lora_rank=4))
    policy.logprobs(policy.sample(PROMPTS, UNIFORMS.numpy()))  # leaves the model in training mode
    assert_agree(policy.sampler.draw(PROMPTS, UNIFORMS), plain.sampler.draw(PROMPTS, UNIFORMS))


@pytest.mark.parametrize("shared", ["weight", "layer"])
def test_where_two_layers_share_a_weight_sampling_still_draws_from_what_is_trained(shared):
    model = make_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    if shared == "layer":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    policy = fallback(model)
    batch = policy.sample(PROMPTS, UNIFORMS.numpy())
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-4


def test_buckets_change_the_mean_reward_by_less_than_two_standard_errors(policy):
    # issue: padding must not move what is learned. The reward is the share of even tokens.
    prompts = [PROMPTS[i % 6] for i in range(300)]
    u = torch.from_numpy(np.random.default_rng(5).random((300, 16)))
    rewards, drawn = [], []
    with torch.no_grad():
        for rows, P in ((300, 20), (512, 64)):
            tokens, mask, _, _ = Decoder(policy.sampler, rows, P, 16).run(prompts, u, cuda_graph=False)
            drawn.append((tokens * mask).tolist())
            rewards.append(((tokens % 2 == 0) & mask).sum(1) / mask.sum(1))
    error = rewards[0].std() / len(prompts) ** 0.5
    assert (rewards[0].mean() - rewards[1].mean()).abs() < 2 * error
    assert sum(a == b for a, b in zip(*drawn, strict=True)) >= 299  # in float32 it is the very same responses


def test_inverse_cdf_picks_the_first_token_past_u():
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, 4)
    u = torch.tensor([0.0, 0.19999, 0.20001, 0.69999, 0.70001, 0.99999], dtype=torch.float64)
    assert inverse_cdf(logp, u).tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_cdf_never_picks_a_token_of_probability_zero():
    logp = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(1000, 5)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert set(inverse_cdf(logp, u).tolist()) == {1, 3}
