"""Sampling and log-probs: batch, padding and early stops must not matter, on rotary and on learned positions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model, make_policy, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig

from rollout import Policy, Rollout, TokenLogProbs, context_length
from settings import ModelSettings

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12, 5, 20)]
UNIFORMS = RNG.random((6, 16))
MANY = np.random.default_rng(2).random((120, 16))


def policy_of(model, **settings) -> Policy:
    return Policy(model, make_tokenizer(), ModelSettings(lora_rank=4, **settings))


def real_tokens(rollout) -> list[list[int]]:
    return [row[:n] for row, n in zip(rollout.responses.tolist(), rollout.mask.sum(1).tolist(), strict=True)]


def alone(policy, prompt, response):
    """log π of every response token and the entropy before it, from the model's own logits of the row by itself."""
    logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    distribution = torch.distributions.Categorical(logits=logits.double() / policy.temperature)
    return distribution.log_prob(torch.tensor(response)), distribution.entropy()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logprobs_entropies_and_gradients_are_those_of_every_row_by_itself(kind, temperature):
    policy = make_policy(kind, temperature=temperature)
    rollout = policy.sample(PROMPTS, UNIFORMS)
    logp, entropy, hidden = policy.logprobs(rollout)
    slope = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
    loss, expected = (logp * slope).sum(), 0.0
    for i, (prompt, response) in enumerate(zip(PROMPTS, real_tokens(rollout), strict=True)):
        row_logp, row_entropy = alone(policy, prompt, response)
        n = len(response)
        assert (logp[i, :n] - row_logp).abs().max() < 1e-4
        assert (entropy[i, :n] - row_entropy).abs().max() < 1e-4
        assert not torch.cat([logp[i, n:], entropy[i, n:]]).any()
        expected = expected + (row_logp * slope[i, :n]).sum()
    gradients = [torch.autograd.grad(value, policy.adapter.parameters) for value in (loss, expected)]
    assert all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(*gradients, strict=True))
    assert not hidden.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_samplers_logprobs_are_those_of_training_after_every_change_of_the_adapter(kind, dtype, tolerance):
    policy = make_policy(kind, dtype=dtype)
    for _ in range(2):
        rollout = policy.sample(PROMPTS, UNIFORMS)
        assert (policy.logprobs(rollout)[0] - rollout.sampled_logp).abs().max() <= tolerance
        policy.adapter.assign(policy.adapter.vector() * -1.5)


def qwen(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, vocab_size=50, eos_token_id=2, **sizes)
    )


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2", "qwen3"])
def test_responses_that_share_their_prompts_row_are_as_rows_by_themselves(model, monkeypatch):
    policy = policy_of(qwen(model)) if model.startswith("qwen") else make_policy(model)
    shares, read = [], policy.model.base_model.forward
    monkeypatch.setattr(
        policy.model.base_model, "forward", lambda **of: shares.append(len(of["input_ids"])) or read(**of)
    )
    prompts, u = [prompt for prompt in PROMPTS for _ in range(3)], np.random.default_rng(1).random((18, 8))
    group = replace(policy.sample(prompts, u), group_size=3)
    shares.clear()
    slope = torch.randn(group.mask.shape, generator=torch.Generator().manual_seed(0))
    shared, alone = policy.logprobs(group), policy.logprobs(replace(group, group_size=1))
    assert shares == [6, 18, 18]  # rows: prompts, their responses; and both at once
    for a, b in zip(shared, alone, strict=True):
        assert ((a - b)[group.mask.bool()]).abs().max() < 1e-5
    J, expected = (
        torch.autograd.grad((logp * slope).sum(), policy.adapter.parameters) for logp, _, _ in (shared, alone)
    )
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(J, expected, strict=True))


def test_a_model_that_cannot_go_on_from_its_cache_reads_prompts_with_every_response_and_says_so(kind, monkeypatch):
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", lambda cache, repeats: cache.crop(1))
    with pytest.warns(UserWarning, match="cannot read a group's prompt once"):
        assert not make_policy(kind).shares_prompts


def test_micro_batches_cut_no_group_that_fits(policy):
    sampled = policy.sample([prompt for prompt in PROMPTS for _ in range(2)], MANY[:12])
    for size, S, rows in ((5, 2, [4, 4, 4]), (1, 1, [1] * 12)):
        pieces = list(replace(sampled, group_size=2).micro_batches(size))
        assert [len(numbers) for numbers, _ in pieces] == rows and {piece.group_size for _, piece in pieces} == {S}
        assert sorted(torch.cat([numbers for numbers, _ in pieces]).tolist()) == list(range(12))
        assert all(torch.equal(n[::S] + S - 1, n[S - 1 :: S]) for n, _ in pieces)


def test_sampling_leaves_the_base_weights_bit_for_bit_even_after_an_error(policy, monkeypatch):
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    policy.sample(PROMPTS, UNIFORMS)
    monkeypatch.setattr(policy.sampler, "draw", lambda *_, **__: 1 / policy.adapter.enabled)  # off while it is merged
    with pytest.raises(ZeroDivisionError):
        policy.sample(PROMPTS, UNIFORMS)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.named_parameters())
    assert policy.adapter.enabled


def test_with_the_adapter_off_the_base_model_is_sampled_from(kind):
    policy, base = make_policy(kind), make_policy(kind, noise=0.0)
    with policy.adapter.disabled():
        reference = real_tokens(policy.sample(PROMPTS, UNIFORMS))
    assert reference == real_tokens(base.sample(PROMPTS, UNIFORMS))
    assert reference != real_tokens(policy.sample(PROMPTS, UNIFORMS))


def test_a_response_depends_on_its_prompt_and_its_own_uniforms_alone(policy):
    whole = real_tokens(policy.sample(PROMPTS * 20, MANY))
    assert [real_tokens(policy.sample([PROMPTS[i % 6]], MANY[i : i + 1]))[0] for i in range(120)] == whole
    short = [i for i, row in enumerate(whole) if len(row) < 9]
    early = policy.sample([PROMPTS[i % 6] for i in short], MANY[short])
    assert early.responses.shape[1] < 9  # it stopped before the others would have
    assert real_tokens(early) == [whole[i] for i in short]


def test_the_mask_ends_with_the_first_of_the_named_eos_which_is_trained():
    model = make_model("llama")
    model.generation_config.eos_token_id = [7, 11]
    policy = policy_of(model)
    assert policy.eos == [2, 7, 11]
    rollout = policy.sample(PROMPTS * 20, MANY)
    seen = set()
    for ids, mask, ended in zip(rollout.responses.tolist(), rollout.mask.tolist(), rollout.ended.tolist(), strict=True):
        ends = [t for t, token in enumerate(ids) if token in policy.eos]
        n = ends[0] + 1 if ends else len(ids)
        assert mask == [1] * n + [0] * (len(ids) - n)
        assert ended == bool(ends)
        seen.add(ids[n - 1] if ended else None)
    assert seen == {2, 7, 11, None}
    last = rollout.mask.sum(1, keepdim=True) - 1
    assert (policy.logprobs(rollout)[0].gather(1, last)[rollout.ended] < 0).all()


def test_a_sampled_pad_token_is_a_token_like_any_other(policy):
    rollout = policy.sample(PROMPTS * 20, MANY)
    real_pads = (rollout.responses == policy.pad) & (rollout.mask == 1)
    assert real_pads.any()
    assert (policy.logprobs(rollout)[0][real_pads] < 0).all()


def test_micro_batches_hold_every_row_once_longest_first_and_give_the_whole_batchs_values(policy):
    rollout = policy.sample(PROMPTS, UNIFORMS)
    pieces = list(rollout.micro_batches(4))
    rows = torch.cat([numbers for numbers, _ in pieces])
    lengths = rollout.lengths.sum(1)[rows]
    assert sorted(rows.tolist()) == list(range(6))
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    for numbers, piece in pieces:
        assert [piece.prompts.shape[1], piece.responses.shape[1]] == rollout.lengths[numbers].amax(0).tolist()
    whole, assembled = policy.logprobs_in_pieces(rollout, None), policy.logprobs_in_pieces(rollout, 4)
    assert (whole[0] - assembled[0]).abs().max() < 1e-4
    assert ((whole[1] - assembled[1]) * rollout.mask[..., None]).abs().max() < 1e-4


def test_checkpointing_gradients_changes_neither_gradients_nor_responses(kind):
    gradients = []
    for checkpointed in (False, True):
        policy = policy_of(make_model(kind), gradient_checkpointing=checkpointed)
        policy.adapter.assign(policy.adapter.vector() + 0.05)  # no factor is zero
        policy.logprobs(policy.sample(PROMPTS, UNIFORMS))  # leaves the model in training mode
        rollout = policy.sample(PROMPTS, UNIFORMS)
        gradients.append(torch.autograd.grad(policy.logprobs(rollout)[0].sum(), policy.adapter.parameters))
        gradients[-1] += (rollout.responses * rollout.mask,)
    layers = [module for module in policy.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers and policy.model.training  # it really was the checkpointed path
    assert all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_tokens_give_the_logprobs_entropies_and_gradients_of_the_whole(chunk):
    torch.manual_seed(0)
    head = torch.randn(11, 5, dtype=torch.float64)
    tokens = torch.tensor([3, 0, 10, 7, 7, 1, 2])
    log_softmax = lambda h: (h @ head.T).log_softmax(-1)  # noqa: E731
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    logp, entropy = TokenLogProbs.apply(hidden, tokens, log_softmax, chunk)
    whole = log_softmax(hidden)
    assert (logp - whole[range(7), tokens]).abs().max() < 1e-12
    assert (entropy + (whole.exp() * whole).sum(1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda h: TokenLogProbs.apply(h, tokens, log_softmax, chunk)[0], (hidden,))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator inside makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_the_logits_of_the_whole_batch_are_never_in_memory_at_once():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = policy_of(LlamaForCausalLM(LlamaConfig(vocab_size=5000, **size)))
    rollout = policy.sample(PROMPTS, UNIFORMS)
    for chunk, elements in (
        (10**6, rollout.responses.numel() * 5000),
        (10, 10 * 5000),
    ):  # the output embedding has 8 * 5000
        policy.chunk = chunk
        with Largest() as largest:
            torch.autograd.grad(policy.logprobs(rollout)[0].sum(), policy.adapter.parameters)
        assert largest.elements == elements


def kl_parts(policy, rollout):
    """Of every response: log π_θ − log π_ref of the drawn tokens, and the expected KL at its positions."""
    logp, hidden = policy.logprobs_in_pieces(rollout, 7)
    with policy.adapter.disabled():
        logp_ref, hidden_ref = policy.logprobs_in_pieces(rollout, 7)
    return ((logp - logp_ref) * rollout.mask).sum(1).double(), policy.expected_kl(hidden, hidden_ref, rollout.mask)


def test_the_expected_kl_averages_to_the_kl_of_whole_responses_summed_over_all_of_them():
    # every response of at most two tokens: EOS at once, or 49 others times 50
    policy = make_policy(noise=0.3)
    policy.chunk = 64
    eos, V = policy.eos[0], 50
    responses = torch.tensor([(a, b) for a in range(V) for b in range(V) if a != eos] + [(eos, 0)])
    mask = torch.ones_like(responses)
    mask[-1, 1] = 0
    n = len(responses)
    prompts, zeros = torch.tensor([[5, 9, 11]] * n), torch.zeros(n, 2)
    rollout = Rollout(prompts, torch.ones_like(prompts), responses, mask, zeros, zeros[:, 0] > 0)
    p = policy.logprobs_in_pieces(rollout, None)[0].double().sum(1).exp()
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    drawn, expected = kl_parts(policy, rollout)
    assert float(p @ drawn) > 0.01
    assert float(p @ expected) == pytest.approx(float(p @ drawn), rel=1e-4)
    assert expected.min() >= 0.0 > drawn.min()


def test_texts_have_no_special_tokens_and_their_ids_end_with_eos(policy):
    rollout = policy.sample(PROMPTS * 20, MANY)
    texts, ids = policy.texts(rollout)
    assert ids == real_tokens(rollout)
    assert texts == [" ".join(f"w{i - 4}" for i in row if i > 3) for row in ids]


@pytest.mark.parametrize("eos", [None, "<end>"])  # <end> has no embedding
def test_a_tokenizer_without_an_eos_that_the_model_knows_is_refused(eos):
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos}) if eos else setattr(tokenizer, "eos_token", None)
    model.generation_config.eos_token_id = None if eos else 2
    with pytest.raises(ValueError, match="^model: .*EOS"):
        Policy(model, tokenizer, ModelSettings())


@pytest.mark.parametrize("pad", [None, "<padding>"])
def test_a_pad_token_that_is_missing_or_outside_the_vocabulary_becomes_eos(pad):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": pad}) if pad else setattr(tokenizer, "pad_token", None)
    assert Policy(make_model("llama"), tokenizer, ModelSettings()).pad == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["scaled logits", "no position ids"])
def test_a_model_whose_logprobs_depend_on_how_they_are_computed_is_refused_by_name(fault, dtype):
    def without_positions(module, args, inputs):
        single = inputs["position_ids"] is None or inputs["position_ids"].shape[1] == 1
        return args, inputs if single else {**inputs, "position_ids": None}

    model = make_model("gpt2").to(dtype)
    if fault == "scaled logits":
        model.register_forward_hook(lambda module, inputs, output: output | {"logits": output["logits"] * 0.5})
    else:
        model.transformer.register_forward_pre_hook(without_positions, with_kwargs=True)
    with pytest.raises(ValueError, match="^model: gpt2 gives a row other log-probs .*; .*$"):
        policy_of(model)


@pytest.mark.parametrize(("rope", "limit"), [("default", 64), ("yarn", 64), ("dynamic", 16), ("longrope", 16)])
def test_if_positions_depend_on_the_longest_row_the_context_is_the_length_first_trained_on(rope, limit):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": rope, "original_max_position_embeddings": 16}
    assert context_length(config) == limit
    assert context_length(MambaConfig()) is None
