"""Sampling and log-probs: batch, padding and early stops must not matter, on rotary and on learned positions."""

from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_model, make_policy, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertGenerationConfig,
    BioGptConfig,
    FuyuConfig,
    GitConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MBartConfig,
    PegasusConfig,
    RobertaConfig,
    TrOCRConfig,
)

import rollout
from lora import LoRAConfig, inject
from rollout import Policy, Rollout, RolloutConfig, TokenLogProbs, context_of, load_model

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12, 5, 20)]
UNIFORMS = RNG.random((6, 16))


def test_the_samplers_logprobs_equal_the_forward_passs(policy):
    batch = policy.sample(PROMPTS, UNIFORMS)
    logp, _, _ = policy.logprobs(batch)
    assert (logp - batch.sampled_logp).abs().max() <= 1e-4


def alone(policy, batch, i):
    """Largest change of row i's log-probs when its response is scored without neighbours and padding."""
    row = batch.rows(slice(i, i + 1))
    n = int(batch.mask[i].sum())
    assert row.prompts.shape[1] == len(PROMPTS[i])
    return float((policy.logprobs(row)[0][0] - policy.logprobs(batch)[0][i, :n]).detach().abs().max())


def test_left_padding_and_neighbours_change_no_logprob(policy):
    batch = policy.sample(PROMPTS, UNIFORMS)
    assert max(alone(policy, batch, i) for i in range(6)) <= 1e-5


def test_without_position_ids_learned_positions_would_go_wrong(monkeypatch):
    policy = make_policy("gpt2")
    batch = policy.sample(PROMPTS, UNIFORMS)
    monkeypatch.setattr(rollout, "positions", lambda mask: torch.arange(mask.shape[1]).expand_as(mask))
    assert max(alone(policy, batch, i) for i in range(6)) > 1e-2


def test_a_token_depends_on_its_neighbours_only_at_an_edge_of_the_cdf(policy):
    together = policy.sample(PROMPTS, UNIFORMS)
    for i in range(6):
        single = policy.sample([PROMPTS[i]], UNIFORMS[i : i + 1])
        n = int(together.mask[i].sum())
        same = single.responses[0, :n] == together.responses[i, :n]
        if not same.all():
            t = int((~same).nonzero()[0])
            prefix = PROMPTS[i] + together.responses[i, :t].tolist()
            p = policy.model(input_ids=torch.tensor([prefix])).logits[0, -1].double().softmax(0)
            assert (p.cumsum(0) - UNIFORMS[i, t]).abs().min() <= 1e-5
        else:
            assert int(single.mask.sum()) == n


def test_sampling_follows_the_models_distribution():
    policy = make_policy()
    n = 4000
    batch = policy.sample([PROMPTS[0]] * n, np.random.default_rng(1).random((n, 1)))
    with torch.no_grad():
        p = policy.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(0)
    frequency = torch.bincount(batch.responses[:, 0], minlength=50) / n
    error = (p * (1 - p) / n).sqrt().clamp_min(1e-3)
    assert ((frequency - p).abs() / error).max() < 4.5


def test_a_low_temperature_samples_the_likeliest_token():
    policy = make_policy(temperature=1e-3)
    batch = policy.sample(PROMPTS, UNIFORMS[:, :1])
    with torch.no_grad():
        best = [int(policy.model(input_ids=torch.tensor([p])).logits[0, -1].argmax()) for p in PROMPTS]
    assert batch.responses[:, 0].tolist() == best


def test_logprobs_are_taken_at_the_sampling_temperature():
    hot, batch = make_policy(temperature=2.0), make_policy().sample(PROMPTS, UNIFORMS)
    row = batch.rows(slice(1, 2))
    with torch.no_grad():
        scores = hot.model(input_ids=torch.cat([row.prompts, row.responses], 1)).logits[0, len(PROMPTS[1]) - 1 : -1]
        expected = (scores / 2.0).log_softmax(-1).gather(1, row.responses[0][:, None])[:, 0]
        assert (hot.logprobs(row)[0][0] - expected).abs().max() < 1e-5


def test_the_mask_ends_with_the_first_eos_inclusive(policy):
    batch = policy.sample(PROMPTS * 20, np.random.default_rng(2).random((120, 16)))
    for ids, mask, ended in zip(batch.responses.tolist(), batch.mask.tolist(), batch.ended.tolist(), strict=True):
        n = ids.index(2) + 1 if 2 in ids else len(ids)
        assert mask == [1] * n + [0] * (len(ids) - n)
        assert ended == (2 in ids)
    assert 0 < int(batch.ended.sum()) < 120  # both kinds occurred


def test_a_sampled_pad_token_is_a_token_like_any_other():
    policy = make_policy()
    batch = policy.sample(PROMPTS * 20, np.random.default_rng(3).random((120, 16)))
    real_pads = (batch.responses == policy.pad) & (batch.mask == 1)
    assert real_pads.any()
    assert (policy.logprobs(batch)[0][real_pads] < 0).all()  # it is scored, as a pad behind the end is not


def test_every_named_eos_ends_a_response():
    model = make_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    policy = Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4))
    batch = policy.sample(PROMPTS * 20, np.random.default_rng(2).random((120, 16)))
    last = batch.responses.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert set(last[batch.ended].tolist()) == {2, 7}


def test_stopping_early_changes_no_response(policy):
    # A row's EOS comes early or late with its uniforms; pick rows that end within 8 tokens, and one that does not.
    u = np.random.default_rng(2).random((400, 16))
    batch = policy.sample([PROMPTS[0]] * 400, u)
    lengths = batch.mask.sum(1)
    short = ((lengths <= 8) & batch.ended).nonzero().flatten()[:3].tolist()
    long = int((lengths == 16).nonzero()[0])
    early = policy.sample([PROMPTS[0]] * len(short), u[short])
    late = policy.sample([PROMPTS[0]] * (len(short) + 1), u[[*short, long]])
    assert early.responses.shape[1] <= 8 < late.responses.shape[1]
    n = early.responses.shape[1]
    assert torch.equal(late.responses[:-1, :n] * early.mask, early.responses * early.mask)
    assert int(late.mask[:-1, n:].sum()) == 0


def test_micro_batches_give_the_whole_batchs_logprobs(policy):
    batch = policy.sample(PROMPTS, UNIFORMS)
    whole, pieces = policy.logprobs_in_pieces(batch, None), policy.logprobs_in_pieces(batch, 4)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(whole, pieces, strict=True))


def test_entropy_is_that_of_the_next_token_distribution():
    policy = make_policy()
    row = policy.sample(PROMPTS[1:2], UNIFORMS[1:2])
    with torch.no_grad():
        logits = policy.model(input_ids=torch.cat([row.prompts, row.responses], 1)).logits[0, len(PROMPTS[1]) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert (policy.logprobs(row)[1][0] - expected).abs().max() < 1e-4


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
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(lambda h: TokenLogProbs.apply(h, tokens, log_softmax, chunk)[0], (hidden,))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator inside makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_the_logits_of_the_whole_batch_are_never_in_memory_at_once():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=5000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    policy = Policy(model, make_tokenizer(), LoRAConfig(lora_rank=1))
    batch = policy.sample(PROMPTS, UNIFORMS)
    weights = max(p.numel() for p in model.parameters())
    whole = batch.responses.numel() * 5000
    for chunk, least, most in ((10**6, whole, whole), (4, weights, 4 * 5000)):
        policy.chunk = chunk
        with Largest() as largest:
            logp, _, _ = policy.logprobs(batch)
            torch.autograd.grad(logp.sum(), policy.adapter.parameters)
        assert largest.elements <= max(most, weights)
        assert largest.elements >= least


def kl_parts(policy, batch):
    """Of every response: log π_θ − log π_ref of the drawn tokens, and the expected KL at its positions."""
    logp, hidden = policy.logprobs_in_pieces(batch, 7)
    with policy.adapter.disabled():
        logp_ref, hidden_ref = policy.logprobs_in_pieces(batch, 7)
    return ((logp - logp_ref) * batch.mask).sum(1).double(), policy.expected_kl(hidden, hidden_ref, batch.mask)


def test_the_expected_kl_averages_to_the_kl_of_whole_responses_summed_over_all_of_them():
    # every response of at most two tokens: EOS at once, or 49 others times 50
    policy = make_policy(noise=0.3)
    policy.chunk = 64
    eos, V = policy.eos[0], 50
    all_two = [(a, b) for a in range(V) for b in range(V) if a != eos] + [(eos, 0)]
    responses = torch.tensor(all_two)
    mask = torch.ones_like(responses)
    mask[-1, 1] = 0
    n = len(all_two)
    zeros = torch.zeros(n, 2)
    batch = Rollout(torch.tensor([[5, 9, 11]] * n), torch.ones(n, 3).long(), responses, mask, zeros, zeros[:, 0] > 0)
    logp = (policy.logprobs_in_pieces(batch, None)[0].double()).sum(1)
    assert logp.exp().sum() == pytest.approx(1.0, abs=1e-5)
    drawn, expected = kl_parts(policy, batch)
    assert float(logp.exp() @ drawn) > 0.01
    assert float(logp.exp() @ expected) == pytest.approx(float(logp.exp() @ drawn), rel=1e-4)


def test_the_expected_kl_is_never_negative_and_less_noisy_than_that_of_the_drawn_tokens(policy):
    n = 256
    batch = policy.sample([[5, 9, 11]] * n, np.random.default_rng(3).random((n, 8)))
    drawn, expected = kl_parts(policy, batch)
    assert expected.min() >= 0.0 and drawn.min() < 0.0
    assert expected.var() < drawn.var()
    spread = float((drawn - expected).std() / n**0.5)
    assert abs(float((drawn - expected).mean())) < 4 * spread


def test_the_expected_kl_of_the_base_model_is_zero():
    policy = make_policy(noise=0.0)
    batch = policy.sample([[5, 9, 11], [4]], np.random.default_rng(3).random((2, 8)))
    assert kl_parts(policy, batch)[1].tolist() == [0.0, 0.0]


def test_hidden_states_carry_no_gradient(policy):
    assert not policy.logprobs(policy.sample(PROMPTS, UNIFORMS))[2].requires_grad


def test_texts_have_no_special_tokens_and_their_ids_end_with_eos():
    policy = make_policy()
    batch = policy.sample(PROMPTS * 20, np.random.default_rng(2).random((120, 16)))
    texts, ids = policy.texts(batch)
    for text, row, ended in zip(texts, ids, batch.ended.tolist(), strict=True):
        assert "<" not in text
        assert (row[-1] == 2) == ended and row.count(2) == ended


def test_the_tokenizers_eos_ends_a_response_that_the_config_does_not_name():
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.generation_config.eos_token_id = 7
    assert Policy(model, tokenizer, LoRAConfig()).eos == [2, 7]


def test_an_eos_outside_the_vocabulary_is_refused():
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="EOS"):
        Policy(model, tokenizer, LoRAConfig())


def test_a_pad_token_outside_the_vocabulary_becomes_eos():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert Policy(make_model("llama"), tokenizer, LoRAConfig()).pad == 2


def test_a_model_that_says_it_caps_its_logits_is_refused():
    model = make_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="scales or caps"):
        Policy(model, make_tokenizer(), LoRAConfig())


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj"):
        load_model(str(tmp_path), "float32", "cpu")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path), "float32", "cpu")


def test_a_tokenizer_without_eos_is_refused_whatever_the_models_config_says():
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        Policy(model, tokenizer, LoRAConfig())


def test_a_model_that_scales_its_logits_is_refused():
    model = make_model("llama")
    plain = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=plain(**inputs).logits * 0.5)
    with pytest.raises(ValueError, match="scales or caps"):
        Policy(model, make_tokenizer(), LoRAConfig())


SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 2}


def tiny(config_class, **settings):
    """A random causal language model of 50 words."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return AutoModelForCausalLM.from_config(config_class(vocab_size=50, **special, **settings))


def refusal(model, *targets):
    """The one line with which a policy of the model is refused."""
    with pytest.raises(ValueError, match="^model: ") as refused:
        Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4, lora_targets=targets or ["all-linear"]))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [BartConfig, MBartConfig, PegasusConfig, TrOCRConfig])
def test_a_decoder_that_ignores_position_ids_is_refused(config, dtype):
    line = refusal(tiny(config, **BART).to(dtype), "self_attn.q_proj", "fc1")
    assert line.startswith(f"model: {config.model_type} gives a left-padded row other log-probs than the row alone; ")


@pytest.mark.parametrize("config", [BertGenerationConfig, BertConfig, RobertaConfig])
def test_a_model_that_reads_what_comes_after_a_token_is_refused(config):
    assert f"model: {config.model_type} predicts a token from those behind it; " in refusal(tiny(config, **SIZE))


def test_the_same_model_as_a_causal_one_samples_what_it_trains():
    policy = Policy(tiny(BertGenerationConfig, is_decoder=True, **SIZE), make_tokenizer(), LoRAConfig(lora_rank=4))
    batch = policy.sample(PROMPTS, UNIFORMS)
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-4


def test_a_head_of_more_than_an_output_embedding_is_refused():
    assert "more than an output embedding" in refusal(tiny(BertConfig, is_decoder=True, **SIZE))


def test_a_model_whose_cache_gives_other_logprobs_than_one_pass_is_refused():
    vision = {**SIZE, "image_size": 8, "patch_size": 4}  # its text attends to what is cached as to an image
    assert "other log-probs with a cache than in one pass" in refusal(tiny(GitConfig, vision_config=vision, **SIZE))


def test_an_adapter_that_no_gradient_reaches_is_refused_by_its_layers_name():
    model = make_model("llama")
    model.model.tower = torch.nn.Linear(8, 8)  # for pictures, say
    assert "makes no use of model.tower on text alone; leave it out of lora_targets" in refusal(model)


def test_a_model_of_another_build_is_refused_with_what_its_code_raised():
    model = tiny(Llama4TextConfig, **SIZE, head_dim=8, intermediate_size_mlp=64, num_key_value_heads=2)
    assert "llama4_text cannot be sampled from or trained with this adapter (AttributeError" in refusal(model, "q_proj")


def test_a_model_without_an_output_embedding_is_refused():
    assert "llama is no language model as used here (AttributeError" in refusal(make_model("llama").model)


def test_trying_a_model_out_leaves_adapter_and_eos_as_they_were(kind):
    policy, model = make_policy(kind, noise=0.0), make_model(kind)
    assert torch.equal(policy.adapter.vector(), inject(model, LoRAConfig(lora_rank=4)).vector())
    assert policy.sampler.eos.tolist() == policy.eos and policy.adapter.enabled
    assert all(parameter.grad is None for parameter in policy.adapter.parameters)


@torch.no_grad()
def test_a_policy_can_be_made_where_no_gradients_are_taken(kind):
    assert make_policy(kind).sampler.static


@pytest.mark.parametrize("error", [AttributeError, AssertionError, TypeError, ZeroDivisionError])
def test_whatever_a_checkpoint_makes_transformers_raise_becomes_one_line(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error("first line\n  second line")

    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=rf"^model: .*\({error.__name__}: first line second line\); .*--model DIR$"):
        load_model(str(tmp_path), "float32", "cpu")


def test_a_missing_pad_token_becomes_eos():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert Policy(make_model("llama"), tokenizer, LoRAConfig()).pad == 2


def test_a_loaded_model_has_no_dropout(kind, tmp_path):
    model = make_model(kind)
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        setattr(model.config, key, 0.5)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "float32", "cpu")
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "limit"), [("default", 64), ("linear", 64), ("yarn", 64), ("dynamic", 16), ("longrope", 16)]
)
def test_where_positions_depend_on_the_longest_row_the_context_is_the_length_first_trained_on(kind, limit):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 16}
    assert context_of(config) == limit


def test_a_model_that_names_no_context_has_no_limit():
    assert context_of(MambaConfig()) is None


def test_the_context_of_a_model_that_also_sees_is_that_of_its_text():
    assert context_of(FuyuConfig(text_config={"model_type": "persimmon", "max_position_embeddings": 77})) == 77


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (BioGptConfig, {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, **SIZE}),
        (FuyuConfig, {"text_config": {"model_type": "persimmon", "vocab_size": 50, "hidden_dropout": 0.5, **SIZE}}),
    ],
)
def test_dropout_is_gone_by_whatever_name_the_config_calls_it(config, settings, tmp_path):
    tiny(config, **settings).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "float32", "cpu")
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model: .* config\.json"):
        load_model(str(tmp_path), "float32", "cpu")


def test_a_model_that_cannot_be_downloaded_says_how_to_pass_a_local_one(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries, no waiting
    with pytest.raises(ValueError, match="--model DIR"):
        load_model("nobody/no-such-model", "float32", "cpu")


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "int8"), ("max_new_tokens", 0), ("temperature", 0.0), ("temperature", float("nan"))]
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        RolloutConfig(**{field: value})
