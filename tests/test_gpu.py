"""The captured decode step, on the pretended graph of pretend.py and, with `python -m pytest -m gpu`, on CUDA."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_policy, make_tokenizer
from pretend import pretend
from transformers import LlamaConfig, LlamaForCausalLM

from rollout import Policy
from sampler import Decoder
from settings import ModelSettings

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12)]
UNIFORMS = RNG.random((4, 16))


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def capturing(request, monkeypatch):
    """Makes policies that capture their decode step."""
    if request.param == "cuda":
        return partial(make_policy, device="cuda")
    return lambda *args, **settings: pretend(make_policy(*args, **settings), monkeypatch)


def captured(policy: Policy) -> bool:
    """Whether the sampler draws from a graph now."""
    return policy.sampler.decoder is not None and policy.sampler.decoder.graph is not None


def drawn(policy: Policy, cuda_graph: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Real tokens, and their log-probs."""
    u = torch.from_numpy(UNIFORMS).to(policy.device)
    with policy.adapter.merged():
        tokens, mask, logp, _ = policy.sampler.draw(PROMPTS, u, cuda_graph)
    return tokens * mask, logp * mask


def test_the_captured_step_gives_the_eager_ones_tokens_and_logprobs(capturing, kind):
    policy = capturing(kind)
    for _ in range(2):  # the second time from the graph of the first
        (tokens, logp), (expected, eager) = drawn(policy), drawn(policy, cuda_graph=False)
        assert captured(policy)
        assert torch.equal(tokens, expected)
        assert (logp - eager).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_captured_step_reads_the_adapter_as_it_is_now_and_is_left_alone_while_it_is_off(capturing, kind, dtype):
    policy = capturing(kind, dtype=dtype)
    first = policy.sample(PROMPTS, UNIFORMS)
    graph = policy.sampler.decoder.graph
    theta = policy.adapter.vector()
    policy.adapter.assign(theta * -1.5)
    changed = policy.sample(PROMPTS, UNIFORMS)
    with policy.adapter.disabled():
        reference = policy.sample(PROMPTS, UNIFORMS)
        gap = (policy.logprobs(reference)[0] - reference.sampled_logp).abs().max()
    gap = max(gap, (policy.logprobs(changed)[0] - changed.sampled_logp).abs().max())
    assert gap <= (1e-3 if dtype == torch.float32 else 0.1)
    policy.adapter.assign(theta)
    assert torch.equal(policy.sample(PROMPTS, UNIFORMS).responses, first.responses)
    assert captured(policy)
    assert policy.sampler.decoder.graph is graph
    assert not torch.equal(changed.responses, first.responses)
    assert not torch.equal(reference.responses, first.responses)


def test_a_smaller_batch_uses_the_same_graph_and_a_far_smaller_a_wider_or_a_shorter_one_another(capturing):
    policy = capturing()
    whole = policy.sample(PROMPTS, UNIFORMS)
    decoder = policy.sampler.decoder
    part = policy.sample(PROMPTS[1:], UNIFORMS[1:])
    assert policy.sampler.decoder is decoder
    n = part.responses.shape[1]
    assert torch.equal(part.responses * part.mask, (whole.responses * whole.mask)[1:, :n])
    longer = [p * 22 for p in PROMPTS]  # 66 tokens, beyond the first bucket
    for prompts, uniforms in ((PROMPTS[:1], UNIFORMS[:1]), (longer[:1], UNIFORMS[:1]), (longer[:1], UNIFORMS[:1, :9])):
        before = policy.sampler.decoder
        rollout = policy.sample(prompts, uniforms)
        assert policy.sampler.decoder is not before
        assert captured(policy)
        assert (policy.logprobs(rollout)[0] - rollout.sampled_logp).abs().max() <= 1e-3


def test_a_single_new_token_needs_no_captured_step(capturing, kind):
    assert capturing(kind).sample(PROMPTS, UNIFORMS[:, :1]).responses.shape == (4, 1)


def test_a_step_that_cannot_be_captured_is_drawn_without_a_graph_and_says_so_once(monkeypatch):
    policy = pretend(make_policy(), monkeypatch)
    expected, _ = drawn(policy)
    choose = Decoder.choose
    monkeypatch.setattr(Decoder, "choose", lambda self: (choose(self), self.alive.any().item()))  # the host waits
    policy.sampler.decoder = None
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert torch.equal(drawn(policy)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(drawn(policy)[0], expected)
    assert not captured(policy)


@pytest.mark.gpu
def test_the_forward_pass_on_a_gpu_gives_the_cpus_logprobs(kind):
    cpu, gpu = make_policy(kind), make_policy(kind, device="cuda")
    there = gpu.sample(PROMPTS, UNIFORMS)
    logp = gpu.logprobs(there)[0].cpu()
    here = cpu.sample(PROMPTS, UNIFORMS)
    for name, value in vars(there).items():
        if isinstance(value, torch.Tensor):
            setattr(here, name, value.cpu())
    assert (cpu.logprobs(here)[0] - logp).abs().max() < 1e-3


@pytest.mark.gpu
def test_checkpointing_and_micro_batches_give_the_same_gradients_on_a_gpu():
    plain, saving = make_policy(device="cuda"), make_policy(device="cuda")
    saving.gradient_checkpointing = True
    saving.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    rollout = plain.sample(PROMPTS, UNIFORMS)
    slope = torch.randn(rollout.mask.shape, device="cuda")
    gradients = []
    for policy, size in ((plain, None), (saving, 2)):
        total = torch.zeros(policy.adapter.size, device="cuda")
        for rows, piece in rollout.micro_batches(size):
            logp, _, _ = policy.logprobs(piece)
            loss = (logp * slope[rows.cuda(), : logp.shape[1]]).sum()
            grads = torch.autograd.grad(loss, policy.adapter.parameters)
            total += torch.cat([grad.flatten() for grad in grads])
        gradients.append(total)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-3 * gradients[0].abs().max()


@pytest.mark.gpu
def test_left_padding_to_a_width_of_64_modulo_128_leaves_the_gradients_finite_and_float32():
    # cuDNN's attention gives NaN there (torch 2.13): rows that see nothing, in 16 bits, head size 64
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **size, **special))
    policy = Policy(model.to("cuda", torch.bfloat16), make_tokenizer(), ModelSettings(lora_rank=4))
    policy.sampler.eos = policy.sampler.eos[:0]  # so that the width is 188 + 4
    rollout = policy.sample([[5] * 40, [6] * 188], RNG.random((2, 4)))
    assert rollout.prompts.shape[1] + rollout.responses.shape[1] == 192
    loss = policy.logprobs(rollout)[0].sum()
    for grad in torch.autograd.grad(loss, policy.adapter.parameters):
        assert grad.dtype == torch.float32
        assert torch.isfinite(grad).all()
