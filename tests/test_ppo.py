"""PPO with M objectives, against plain definitions in float64 and finite differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_policy, make_tokenizer

import ppo
from lora import LoRAConfig
from ppo import PPO, Batch, PPOConfig
from rollout import Policy, RolloutConfig

G = torch.Generator().manual_seed(0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def example(M=3, dtype=torch.float32):
    """Rewards and values [3, 5, M] with rows of 5, 3 and 1 real tokens; garbage where masked."""
    return torch.randn(3, 5, M, generator=G).to(dtype), torch.randn(3, 5, M, generator=G).to(dtype)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, lam):
    rewards, values = example(dtype=torch.float64)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for b, n in enumerate(MASK.sum(1).tolist()):
        for j in range(3):
            v = values[b, :n, j].tolist() + [0.0]
            delta = [float(rewards[b, t, j]) + gamma * v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                direct = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
                assert float(advantages[b, t, j]) == pytest.approx(direct, abs=1e-12)
                assert float(returns[b, t, j]) == pytest.approx(direct + v[t], abs=1e-12)


def test_with_lambda_one_the_return_is_the_sum_of_rewards_to_come():
    rewards, values = example(dtype=torch.float64)
    _, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
    to_come = (rewards * MASK[..., None]).flip(1).cumsum(1).flip(1)
    assert ((returns - to_come) * MASK[..., None]).abs().max() < 1e-12


def test_nothing_after_the_end_reaches_an_advantage():
    rewards, values = example()
    advantages, returns = ppo.gae(rewards, values, MASK, 1.0, 0.95)
    junk = 1e6 * (1 - MASK[..., None])
    again = ppo.gae(rewards + junk, values + junk, MASK, 1.0, 0.95)
    assert torch.equal(advantages, again[0]) and torch.equal(returns, again[1])
    assert float((advantages * (1 - MASK[..., None])).abs().max()) == 0.0


def test_the_score_sits_on_the_last_real_token_and_the_kl_on_every_token():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    logp, ref = torch.randn(3, 5, generator=G) * MASK, torch.randn(3, 5, generator=G) * MASK
    rewards = ppo.token_rewards(Batch(SimpleNamespace(mask=MASK), scores, logp, ref, None, kl_coef=0.3))
    expected = (-0.3 * (logp - ref))[..., None].repeat(1, 1, 2)
    for b, n in enumerate((5, 3, 1)):
        expected[b, n - 1] += scores[b]
    assert torch.allclose(rewards, expected)


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_real_tokens():
    advantages = torch.randn(3, 5, 2, generator=G) * torch.tensor([1.0, 50.0]) + 7.0
    real = ppo.whiten(advantages, MASK, 0.1)[MASK.bool()]
    assert real.mean(0).abs().max() < 1e-5
    assert (real.std(0, correction=0) - 1.0).abs().max() < 1e-5


def test_a_near_constant_objective_is_not_blown_up():
    advantages = 5.0 + 1e-4 * torch.randn(3, 5, 1, generator=G)
    assert ppo.whiten(advantages, MASK, ppo.SCALE_FLOOR).abs().max() < 1e-2


def test_at_ratio_one_the_surrogates_gradient_is_minus_the_advantage():
    ratio = torch.ones(3, 5, requires_grad=True)
    advantages = torch.randn(3, 5, 1, generator=G)
    ppo.surrogate(ratio, advantages, 0.2).sum().backward()
    assert torch.equal(ratio.grad, -advantages[..., 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.3, 1.0, 0.0), (0.7, 1.0, -1.0), (1.3, -1.0, 1.0), (0.7, -1.0, 0.0), (1.1, 2.0, -2.0)],
)
def test_the_clip_stops_only_steps_that_would_go_further_the_same_way(ratio, advantage, slope):
    r = torch.tensor([[ratio]], requires_grad=True)
    ppo.surrogate(r, torch.tensor([[[advantage]]]), 0.2).sum().backward()
    assert float(r.grad) == slope


def test_the_critic_starts_at_zero_and_has_one_head_per_objective():
    assert torch.equal(ppo.Critic(8, 3)(torch.randn(2, 5, 8)), torch.zeros(2, 5, 3))


def test_the_critic_learns_the_returns_and_explains_them():
    hidden, weight = torch.randn(40, 5, 8, generator=G), torch.randn(8, 2, generator=G)
    mask = torch.ones(40, 5, dtype=torch.long)
    target = ppo.Advantages(None, None, returns=hidden @ weight, values=torch.zeros(40, 5, 2))
    learner = PPO(8, PPOConfig(critic_lr=0.1, value_clip=1e9), "cpu", 2)
    for _ in range(200):
        learner.fit(hidden, target, mask)
    assert ppo.explained_variance(learner.critic(hidden), target.returns, mask).min() > 0.99


def test_a_value_beyond_its_clip_in_the_right_direction_gets_no_gradient():
    values = torch.tensor([[[0.5]]], requires_grad=True)
    ppo.value_loss(values, torch.zeros(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.ones(1, 1), 0.2).backward()
    assert float(values.grad) == 0.0


def test_the_value_loss_is_half_the_squared_error_summed_over_objectives():
    values, returns = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    loss = ppo.value_loss(values, values, returns, torch.tensor([[1, 0]]), 0.2)
    assert float(loss) == 0.5 * (1 + 4)


def test_a_critic_that_knows_nothing_explains_nothing():
    _, returns = example()
    assert ppo.explained_variance(torch.zeros_like(returns), returns, MASK).abs().max() < 1e-6


def batch_of(policy, n=6, L=8):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, k).tolist() for k in rng.integers(1, 9, n)]
    batch = policy.sample(prompts, rng.random((n, L)))
    logp, hidden = policy.logprobs_in_pieces(batch, None)
    return batch, logp, hidden


def everything(policy, rollout, logp, advantages, halves=False, **settings):
    """What `policy_gradients` gives for these log π_old [B, L] and advantages [B, L, k]."""
    k = advantages.shape[-1]
    batch = Batch(rollout, torch.zeros(len(rollout), k), logp, logp, None, 0.0)
    return ppo.policy_gradients(policy, batch, advantages, PPO(8, PPOConfig(**settings), "cpu", k), halves)


def gradients(policy, rollout, logp, advantages, **settings):
    return everything(policy, rollout, logp, advantages, **settings).J


def figures(found):
    return [found.entropy, found.clip_fraction, found.approx_kl]


def test_before_the_first_step_every_ratio_is_exactly_one(policy):
    batch, logp, _ = batch_of(policy)
    found = everything(policy, batch, logp, torch.ones(*logp.shape, 2))
    assert found.approx_kl == 0.0 and found.clip_fraction == 0.0
    assert torch.equal(policy.logprobs(batch)[0].detach(), logp)


def test_lambda_times_j_is_the_gradient_of_the_weighted_loss(policy):
    batch, logp, _ = batch_of(policy)
    old = logp + 0.1 * torch.randn(logp.shape, generator=G)
    advantages = torch.randn(*logp.shape, 3, generator=G)
    lam = torch.tensor([0.2, 0.5, 0.3])
    J = gradients(policy, batch, old, advantages)
    ratio = (policy.logprobs(batch)[0] - old).exp()
    token = torch.minimum(ratio[..., None] * advantages, ratio.clamp(0.8, 1.2)[..., None] * advantages)
    loss = -((token @ lam) * batch.mask).sum() / batch.mask.sum()
    direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.adapter.parameters)])
    assert (lam @ J - direct).abs().max() < 1e-5 * direct.abs().max()


def test_each_row_of_j_is_the_finite_difference_of_its_loss():
    policy = make_policy("llama")
    policy.model.double()
    batch, logp, _ = batch_of(policy)
    advantages = torch.randn(*logp.shape, 2, generator=G).double()
    # The float32 log-softmax is the only single-precision step; a wide difference keeps its rounding small.
    theta, direction = policy.adapter.vector(), torch.randn(policy.adapter.size, generator=G).double()
    J = gradients(policy, batch, logp, advantages, clip_range=10.0)

    def losses(step):
        policy.adapter.assign(theta + step * direction)
        ratio = (policy.logprobs(batch)[0].detach() - logp).exp()
        return -(ratio[..., None] * advantages * batch.mask[..., None]).sum((0, 1)) / batch.mask.sum()

    numeric = (losses(1e-3) - losses(-1e-3)) / 2e-3
    assert ((J @ direction) - numeric).abs().max() < 2e-2 * numeric.abs().max()


def test_micro_batches_give_the_same_jacobian(policy):
    batch, logp, _ = batch_of(policy)
    advantages = torch.randn(*logp.shape, 2, generator=G)
    whole, pieces = (gradients(policy, batch, logp, advantages, micro_batch_size=s) for s in (None, 4))
    assert (whole - pieces).abs().max() < 1e-4 * whole.abs().max()


def halved(policy, B, **settings):
    """A batch of B rows with ratios away from one, and what `policy_gradients` gives for its two halves."""
    batch, logp, _ = batch_of(policy, n=B)
    generator = torch.Generator().manual_seed(B)
    old = logp + 0.2 * torch.randn(logp.shape, generator=generator)  # some ratios are clipped
    advantages = torch.randn(*logp.shape, 3, generator=generator)
    return batch, old, advantages, everything(policy, batch, old, advantages, halves=True, **settings)


@pytest.mark.parametrize(("B", "size"), [(6, None), (5, None), (1, None), (5, 2)])
def test_asking_for_halves_changes_not_one_bit_of_the_rest(policy, B, size):
    batch, old, advantages, found = halved(policy, B, micro_batch_size=size)
    whole = everything(policy, batch, old, advantages, micro_batch_size=size)
    assert torch.equal(found.J, whole.J) and torch.equal(found.hidden, whole.hidden)
    assert figures(found) == figures(whole) and whole.first_half is None


@pytest.mark.parametrize(("B", "first", "second"), [(6, [0, 1, 2], [3, 4, 5]), (5, [0, 1, 2], [3, 4]), (1, [0], [])])
def test_each_half_is_the_gradient_of_the_loss_of_its_own_rows(B, first, second):
    policy = make_policy()
    batch, old, advantages, found = halved(policy, B)
    for J, rows in zip(found.halves, (first, second), strict=True):
        ratio = (policy.logprobs(batch)[0] - old).exp()[..., None]
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        for j in range(3):
            loss = -sum(gain[b, : int(batch.mask[b].sum()), j].sum() for b in rows) / float(batch.mask.sum())
            direct = torch.zeros(policy.adapter.size)
            if rows:
                grads = torch.autograd.grad(loss, policy.adapter.parameters, retain_graph=True)
                direct = torch.cat([g.flatten() for g in grads])
            assert (J[j] - direct).abs().max() <= 1e-4 * max(direct.abs().max(), found.J.abs().max())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_that_straddle_the_halves_give_the_same_halves(policy, size):
    whole, pieces = (halved(policy, 6, micro_batch_size=rows)[-1].halves for rows in (None, size))
    assert (whole - pieces).abs().amax(-1).max() < 1e-4 * whole.abs().amax(-1).min()


def test_recomputing_activations_changes_no_gradient(kind):
    plain = make_policy(kind)
    saving = Policy(
        make_model(kind), make_tokenizer(), LoRAConfig(lora_rank=4), RolloutConfig(gradient_checkpointing=True)
    )
    saving.adapter.assign(plain.adapter.vector())
    batch, logp, _ = batch_of(plain)
    advantages = torch.randn(*logp.shape, 2, generator=G)
    kept, recomputed = (gradients(policy, batch, logp, advantages) for policy in (plain, saving))
    assert (kept - recomputed).abs().max() <= 1e-6 * kept.abs().max()
    layers = [module for module in saving.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers and saving.model.training  # it really was the checkpointed path


def test_over_16_bit_weights_the_gradients_are_float32_and_those_of_float32_to_rounding(kind):
    exact, rounded = make_policy(kind), make_policy(kind)
    batch, logp, _ = batch_of(exact)
    advantages = torch.randn(*logp.shape, 2, generator=G)
    expected = gradients(exact, batch, logp, advantages)
    for module in rounded.model.modules():  # the frozen weights alone
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    old, _ = rounded.logprobs_in_pieces(batch, None)
    J = gradients(rounded, batch, old, advantages)
    assert J.dtype == torch.float32
    assert torch.cosine_similarity(J, expected, dim=1).min() > 0.97


def test_micro_batches_are_cut_to_length_within_each_half_and_lose_no_row_and_no_figure(policy):
    batch, logp, _ = batch_of(policy)
    advantages = torch.randn(*logp.shape, 2, generator=G)
    B, half = len(batch), (len(batch) + 1) // 2
    pieces = list(batch.micro_batches(2))
    assert sorted(torch.cat([rows for rows, _ in pieces]).tolist()) == list(range(B))
    for rows, piece in pieces:
        assert len({int(row) >= half for row in rows}) == 1  # no piece straddles the halves
        assert [piece.prompts.shape[1], piece.mask.shape[1]] == batch.lengths[rows].amax(0).tolist()
    old, _ = policy.logprobs_in_pieces(batch, 2)
    whole = everything(policy, batch, logp, advantages)
    cut = everything(policy, batch, old, advantages, micro_batch_size=2)
    assert figures(cut) == pytest.approx(figures(whole), abs=1e-5)  # entropy, clip fraction, KL: finite, and the same


def test_a_response_that_never_ends_pays_the_penalty_on_every_objective():
    policy = make_policy()
    rollout, _, _ = batch_of(policy, n=60)
    assert 0 < int(rollout.ended.sum()) < 60
    scores = torch.randn(60, 2, generator=G)
    fined = ppo.prepare(policy, rollout, scores, 0.0, PPOConfig(missing_eos_penalty=1.5)).scores
    assert torch.equal(fined, scores - 1.5 * (~rollout.ended)[:, None].float())


def test_a_gradient_that_is_not_finite_is_refused_with_a_remedy():
    policy = make_policy()
    batch, logp, _ = batch_of(policy)
    with pytest.raises(ValueError, match="lower lr"):
        gradients(policy, batch, logp, torch.full((*logp.shape, 2), math.inf))


@pytest.mark.parametrize(
    ("kl", "factor"), [(3.0, 1.0), (3.3, 1 + 0.1 * 0.128), (30.0, 1 + 0.2 * 0.128), (0.0, 1 - 0.2 * 0.128)]
)
def test_the_kl_coefficient_moves_by_the_clipped_relative_error(kl, factor):
    assert ppo.adapt_kl(0.5, kl, 128, PPOConfig()) == pytest.approx(0.5 * factor)


def test_the_kl_coefficient_stays_positive_however_large_the_cohort():
    assert ppo.adapt_kl(0.2, 0.0, 100_000, PPOConfig()) > 0.0


def test_without_a_target_the_kl_coefficient_stays():
    assert ppo.adapt_kl(0.5, 100.0, 128, PPOConfig(kl_target=0.0)) == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("clip_range", 0.0), ("gamma", 1.5), ("gae_lambda", -0.1), ("kl_coef", -1.0),
     ("critic_lr", math.nan), ("micro_batch_size", 0), ("kl_horizon", 0), ("kl_target", -1.0)],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        PPOConfig(**{field: value})
