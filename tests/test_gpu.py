"""The same facts on a GPU: on the pretend one of pretend.py everywhere, and on CUDA with `python -m pytest -m gpu`."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_policy, make_tokenizer
from pretend import NAME, pretended
from test_firm import fedcmoo, federation
from test_ppo import everything
from transformers import LlamaConfig, LlamaForCausalLM

import clients
import firm
import pluralllm
import run
from app.checkpoint import federation_state, restore_federation
from baselines import FSMGDA, MORLHF
from evidence import bench
from fedmoa import FEDMOA
from firm import FIRM
from grpo import Groups
from lora import LoRAConfig
from rollout import Policy
from sampler import Decoder
from settings import parse

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 50, n).tolist() for n in (3, 9, 1, 12)]
UNIFORMS = RNG.random((4, 16))


@pytest.fixture(params=[NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request) -> Iterator[str]:
    """A device that is not the CPU."""
    with pretended() if request.param == NAME else contextlib.nullcontext():
        yield request.param


def test_the_forward_pass_gives_the_cpus_logprobs(gpu, kind):
    cpu, gpu = make_policy(kind), make_policy(kind, device=gpu)
    batch = gpu.sample(PROMPTS, UNIFORMS)
    there = gpu.logprobs(batch)[0].cpu()
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.cpu())
    assert (cpu.logprobs(batch)[0] - there).abs().max() < 1e-3


def test_the_samplers_logprobs_equal_the_forward_passs(gpu, kind):
    policy = make_policy(kind, device=gpu)
    batch = policy.sample(PROMPTS, UNIFORMS)
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_jacobian_is_float32_and_finite_whatever_the_weights_are(gpu, dtype):
    policy = make_policy(device=gpu, dtype=dtype)
    batch = policy.sample(PROMPTS, UNIFORMS)
    logp, _ = policy.logprobs_in_pieces(batch, None)
    found = everything(policy, batch, logp, torch.randn(*logp.shape, 2, device=gpu))
    assert found.J.dtype == torch.float32 and torch.isfinite(found.J).all()
    assert found.approx_kl < 1e-6  # at the first step every ratio is one


def captured(policy: Policy) -> bool:
    """Whether the sampler draws from a graph now."""
    return policy.sampler.decoder is not None and policy.sampler.decoder.graph is not None


def drawn(policy: Policy, **changes) -> torch.Tensor:
    with policy.adapter.ready_to_sample():
        tokens, mask, logp, _ = policy.sampler.draw(PROMPTS, torch.from_numpy(UNIFORMS).to(policy.device), **changes)
    return tokens * mask, logp * mask


def test_the_captured_step_gives_the_eager_paths_tokens_and_logprobs(gpu, kind):
    policy = make_policy(kind, device=gpu)
    for _ in range(2):  # the second time from the graph of the first
        (tokens, logp), (expected, eager) = drawn(policy), drawn(policy, cuda_graph=False)
        assert captured(policy)
        assert torch.equal(tokens, expected)
        assert (logp - eager).abs().max() <= 1e-4


def test_the_captured_step_in_bfloat16_gives_the_forward_passs_logprobs_to_a_tenth(gpu, kind):
    policy = make_policy(kind, device=gpu, dtype=torch.bfloat16)
    batch = policy.sample(PROMPTS, UNIFORMS)
    assert captured(policy)
    assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_captured_step_reads_the_adapter_as_it_is_now(gpu, dtype):
    policy = make_policy(device=gpu, dtype=dtype)
    before = policy.sample(PROMPTS, UNIFORMS)
    policy.adapter.assign(policy.adapter.vector() * -1.5)
    after = policy.sample(PROMPTS, UNIFORMS)
    assert (policy.logprobs(after)[0] - after.sampled_logp).abs().max() <= 0.1
    assert not torch.equal(before.responses, after.responses)


def test_a_smaller_batch_uses_the_same_graph(gpu):
    policy = make_policy(device=gpu)
    policy.sample(PROMPTS, UNIFORMS)
    decoder = policy.sampler.decoder
    whole = policy.sample(PROMPTS, UNIFORMS)
    part = policy.sample(PROMPTS[1:], UNIFORMS[1:])
    assert policy.sampler.decoder is decoder
    n = part.responses.shape[1]
    assert torch.equal(part.responses * part.mask, (whole.responses * whole.mask)[1:, :n])


def test_checkpointing_and_micro_batches_give_the_same_gradients(gpu):
    plain, saving = make_policy(device=gpu), make_policy(device=gpu)
    saving.gradient_checkpointing = True
    saving.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    batch = plain.sample(PROMPTS, UNIFORMS)
    advantages = torch.randn(*batch.mask.shape, 2, device=gpu)
    results = []
    for policy, size in ((plain, None), (saving, 2)):
        logp, _ = policy.logprobs_in_pieces(batch, size)
        results.append(everything(policy, batch, logp, advantages, micro_batch_size=size).J)
    assert (results[0] - results[1]).abs().max() < 1e-3 * results[0].abs().max()


def test_a_single_new_token_needs_no_captured_step(gpu, kind):
    policy = make_policy(kind, device=gpu)
    assert policy.sample(PROMPTS, UNIFORMS[:, :1]).responses.shape == (4, 1)


def test_left_padding_to_a_width_of_64_modulo_128_leaves_the_gradients_finite(gpu):
    # cuDNN's attention gives NaN there (torch 2.13): rows that see nothing, in 16 bits, head size 64
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, **special)  # fmt: skip
    model = LlamaForCausalLM(config).to(gpu, torch.bfloat16)
    policy = Policy(model, make_tokenizer(), LoRAConfig(lora_rank=4))
    policy.sampler.eos = policy.sampler.eos[:0]  # so that the width is 188 + 4
    batch = policy.sample([[5] * 40, [6] * 188], RNG.random((2, 4)))
    assert batch.prompts.shape[1] + batch.responses.shape[1] == 192
    logp, _ = policy.logprobs_in_pieces(batch, None)
    J = everything(policy, batch, logp, torch.randn(2, 4, 2, device=gpu)).J
    assert torch.isfinite(J).all() and not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_pretend_gpu_refuses_tensors_of_two_devices():
    with pretended():
        there, here = torch.ones(3, device=NAME), torch.ones(3)
        for mixed in (lambda: there + here, lambda: here @ there, lambda: there.index_copy_(0, torch.arange(1), here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (there + torch.tensor(1.0)).device.type == NAME  # a number may come from anywhere


def test_the_pretend_gpu_counts_every_word_between_it_and_the_host():
    with pretended() as device:
        x = torch.ones(8, device=NAME)
        assert device.words == []
        for speak, kind, size in (
            (lambda: bool(x.any()), "read", 1), (lambda: x.long().bincount(), "read", 8),
            (lambda: x.allclose(x), "read", 4), (lambda: x[x > 0], "read", 4), (lambda: x.tolist(), "read", 32),
            (lambda: x.cpu(), "down", 32), (lambda: torch.tensor([1.0], device=NAME), "up", 4),
            (lambda: x.copy_(torch.zeros(8)), "up", 32), (lambda: x[torch.tensor([1, 2])], "up", 16),
        ):  # fmt: skip
            device.words.clear()
            speak()
            assert [(word[0], word[2]) for word in device.words] == [(kind, size)]


def test_a_pretend_graph_computes_anew_where_it_computed_before_and_refuses_words_to_the_host():
    with pretended():
        x, y = torch.ones(3, device=NAME), torch.zeros(3, device=NAME)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = x * 2
            y.add_(z)
        x.fill_(5.0)
        graph.replay()
        assert z.tolist() == [10.0] * 3 and y.tolist() == [12.0] * 3
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
            x.sum().item()


@torch.no_grad()
def test_the_decode_step_says_no_word_to_the_host(kind):
    # on a real GPU the capture itself refuses; here it is seen without one
    with pretended() as device:
        policy = make_policy(kind, device=NAME)
        decoder = Decoder(policy.sampler, 4, 12, 16)
        decoder.prefill(PROMPTS)
        decoder.choose()  # the first call may set something up
        decoder.advance()
        device.words.clear()
        decoder.choose()
        decoder.advance()
        assert device.words == []


def test_a_step_that_cannot_be_captured_is_drawn_without_a_graph(capsys, monkeypatch):
    with pretended():
        policy = make_policy(device=NAME)
        with_graph, _ = drawn(policy)
        choose = Decoder.choose
        monkeypatch.setattr(Decoder, "choose", lambda self: (choose(self), self.alive.any().item()))
        policy.sampler.decoder = None
        without, _ = drawn(policy)
        assert torch.equal(without, with_graph)
        assert not policy.sampler.cuda_graph and "cannot be captured" in capsys.readouterr().out


def test_another_length_or_a_longer_prompt_takes_another_graph(gpu):
    policy = make_policy(device=gpu)
    policy.sample(PROMPTS, UNIFORMS)
    longer = [p * 6 for p in PROMPTS]  # up to 72 tokens, beyond the first bucket
    for prompts, uniforms in ((PROMPTS, UNIFORMS[:, :9]), (longer, UNIFORMS)):
        before = policy.sampler.decoder
        batch = policy.sample(prompts, uniforms)
        assert policy.sampler.decoder is not before and captured(policy)
        assert (policy.logprobs(batch)[0] - batch.sampled_logp).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_adapter_off_the_captured_step_is_left_alone(gpu, dtype):
    policy = make_policy(device=gpu, dtype=dtype)
    trained = policy.sample(PROMPTS, UNIFORMS)
    with policy.adapter.disabled():
        base = policy.sample(PROMPTS, UNIFORMS)
        assert (policy.logprobs(base)[0] - base.sampled_logp).abs().max() <= 0.1
    assert not torch.equal(base.responses, trained.responses)
    assert torch.equal(policy.sample(PROMPTS, UNIFORMS).responses, trained.responses)


METHODS = (FIRM, MORLHF, FSMGDA, fedcmoo(), FEDMOA)
OTHERS = {"gram": "cross", "optimizer": "adam-keep", "max_grad_norm": 0.1}
TRAINED = [(method, {}) for method in METHODS] + [(replace(FIRM, learner=Groups), {"group_size": 2})]
TRAINED += [(method, OTHERS) for method in (METHODS if torch.cuda.is_available() else (FIRM,))]  # the pretended is slow


@pytest.mark.parametrize(("method", "settings"), TRAINED, ids=lambda part: getattr(part, "name", None))
def test_a_federation_trains_as_on_the_cpu(gpu, method, settings):
    small = {"method": method, "clients": 2, "batch_size": 4, "ppo": {"epochs": 1}, **settings}
    here, there = federation(**small), federation(device=gpu, **small)
    for _ in range(2 if settings or torch.cuda.is_available() else 1):  # the first round's steps, and what lasts
        expected, metrics = here.round(), there.round()
        for key in ("reward/even", "reward/low", "kl", "lambda/even", "adapter/norm", "adapter/averaging_residual"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("method", [FIRM, fedcmoo(iterations=50), FEDMOA], ids=lambda method: method.name)
def test_a_federation_goes_on_from_its_checkpoint(gpu, method):
    small = {"optimizer": "adam-keep", "clients": 2, "batch_size": 4, "ppo": {"epochs": 1}}
    whole, resumed = (federation(device=gpu, method=method, **small) for _ in range(2))
    whole.round()
    tensors, values = federation_state(whole)
    restore_federation(resumed, {name: tensor.cpu().clone() for name, tensor in tensors.items()}, values)
    whole.round(), resumed.round()
    assert (whole.theta - resumed.theta).abs().mean() <= 1e-5  # a step moves a number by 1e-2


@pytest.mark.parametrize("saved_on", ["gpu", "cpu"])
def test_what_the_server_remembers_comes_back_to_where_it_is_used(gpu, saved_on):
    whole, resumed = federation(device=gpu if saved_on == "gpu" else "cpu"), federation(device=gpu)
    whole.server_state = {"momentum": torch.ones_like(whole.theta), "lambda": torch.ones(2)}
    tensors, values = federation_state(whole)
    restore_federation(resumed, {name: tensor.cpu().clone() for name, tensor in tensors.items()}, values)
    devices = {name: tensor.device.type for name, tensor in resumed.server_state.items()}
    assert devices == {"momentum": resumed.theta.device.type, "lambda": "cpu"}


def test_switching_clients_copies_no_adapter_through_the_cpu():
    with pretended() as device:
        trained = federation(device=NAME, diagnostics=False)
        cohort, d = trained.clients[:2], trained.policy.adapter.size
        responses = trained.respond(cohort, clients.TRAINING)
        batches = trained.prepare(cohort, responses)
        device.words.clear()
        for client, batch in zip(cohort, batches, strict=True):
            firm.local_update(client.trainings[0], trained.policy, trained.theta, batch, FIRM, trained.config)
        assert max(size for _, _, size in device.words) < 4 * d / 10  # never anything of θ's size, d float32 numbers


def test_a_preset_runs_whole_from_local_checkpoints(tmp_path, gpu):
    small = bench.Bench(bench.SHAPES["tiny"], "cpu", "float32", 2)
    rounds = "2" if gpu == "cuda" else "1"
    flags = ["--preset", "tinyllama-12gb", *small.stand_ins(tmp_path), "--clients", "2", "--rounds", rounds,
             "--batch_size", "4", "--held_out", "3", "--lr", "5e-3", "--gradient_checkpointing", "True"]  # fmt: skip
    runs = []
    for device in ("cpu", gpu):
        config, *_ = parse([*flags, "--out", str(tmp_path / device)])
        config.run.device = device
        runs.append(run.train(config, progress=False))
    expected, summary = runs
    assert summary["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=0.02)
    for name in ("helpful", "harmless"):
        after, before = (s["objectives"][name]["after"]["mean"] for s in (summary, expected))
        assert after == pytest.approx(before, abs=1e-3)


def test_the_predictor_trains_and_is_scored_where_its_embeddings_are(gpu):
    from test_pluralllm import SETTINGS, survey
    from test_pluralllm import federation as predictors

    there = survey()
    there = pluralllm.Survey(there.questions, there.embeddings.to(gpu), there.answers)
    built = {device: predictors(data) for device, data in (("cpu", survey()), (gpu, there))}
    for client in built[gpu].clients:  # the pretend device has no fused kernel
        client.optimizer = torch.optim.Adam([client.theta])
    losses = [built[device].round()["loss"] for device in built]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert built[gpu].theta.device.type == gpu
    scores = pluralllm.alignment(there, built[gpu].model, ["g0"], SETTINGS, 0)
    assert scores.device.type == "cpu"
