"""PPO with M objectives, against plain definitions in float64 and finite differences."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_policy, make_tokenizer

import ppo
from lora import LoRAConfig
from ppo import PPO, Batch, NotFinite, PPOConfig
from rollout import Policy, RolloutConfig

G = torch.Generator().manual_seed(0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def example(M=3, dtype=torch.float32):
    """Rewards and values [3, 5, M] with rows of 5, 3 and 1 real tokens; garbage where masked."""
    return torch.randn(3, 5, M, generator=G).to(dtype), torch.randn(3, 5, M, generator=G).to(dtype)


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0, 1.0])
def test_gae_is_the_decaying_sum_of_td_errors(lam):
    rewards, values = example(dtype=torch.float64)
    advantages = ppo.gae(rewards, values, MASK, lam)
    for b, n in enumerate(MASK.sum(1).tolist()):
        for j in range(3):
            v = values[b, :n, j].tolist() + [0.0]
            delta = [float(rewards[b, t, j]) + v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                direct = sum(lam ** (s - t) * delta[s] for s in range(t, n))
                assert float(advantages[b, t, j]) == pytest.approx(direct, abs=1e-12)


def test_with_lambda_one_the_advantage_is_the_return_less_the_value():
    rewards, values = example(dtype=torch.float64)
    to_come = ppo.to_go(rewards * MASK[..., None])
    assert ((ppo.gae(rewards, values, MASK, 1.0) - (to_come - values)) * MASK[..., None]).abs().max() < 1e-12


def test_the_return_of_a_token_is_the_sum_of_the_rewards_from_it_on():
    assert ppo.to_go(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[7.0, 6.0, 4.0]]


def test_nothing_after_the_end_reaches_an_advantage():
    rewards, values = example()
    advantages = ppo.gae(rewards, values, MASK, 0.95)
    junk = 1e6 * (1 - MASK[..., None])
    assert torch.equal(advantages, ppo.gae(rewards + junk, values + junk, MASK, 0.95))
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
    real = ppo.whiten(advantages, MASK)[0][MASK.bool()]
    assert real.mean(0).abs().max() < 1e-5
    assert (real.std(0, correction=0) - 1.0).abs().max() < 1e-5


def test_a_near_constant_objective_is_not_blown_up():
    advantages = 5.0 + 1e-4 * torch.randn(3, 5, 1, generator=G)
    assert ppo.whiten(advantages, MASK)[0].abs().max() < 1e-2


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


def batch_with(hidden, mask=None):
    """A batch of which a critic reads the hidden states [B, L, H]."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.long) if mask is None else mask
    return Batch(SimpleNamespace(mask=mask), None, None, None, hidden, 0.0)


def krylov_fit(hidden, returns, start, steps):
    """What `steps` conjugate gradients give: the least squares over start + span{s, Ns, N²s, …}, s = Xᵀ(R − X start).

    hidden [n, H], returns [n, k], start [H + 1, k]; in float64, each column by itself, N = XᵀX.
    """
    X = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    columns = []
    for w, R in zip(start.double().T, returns.double().T, strict=True):
        basis = [X.T @ (R - X @ w)]
        for _ in range(steps - 1):
            basis.append(X.T @ (X @ basis[-1]) / (X.T @ (X @ basis[-1])).norm())
        K = torch.linalg.qr(torch.stack(basis, 1)).Q
        columns.append(w + K @ torch.linalg.lstsq(X @ K, R - X @ w).solution)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_few_steps_of_the_critic_are_the_least_squares_over_its_krylov_space(steps):
    hidden, returns = torch.randn(60, 8, generator=G), torch.randn(60, 2, generator=G)
    critic = ppo.Critic(8, 2)
    critic.weight = torch.randn(9, 2, generator=G)
    expected = krylov_fit(hidden, returns, critic.weight, steps)
    critic.fit(hidden, returns, steps)
    assert (critic.weight - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_enough_steps_of_the_critic_reach_the_least_squares_whatever_the_scale_of_the_states(scale):
    hidden, weight = scale * torch.randn(200, 8, generator=G), torch.randn(8, 2, generator=G) / scale
    returns = hidden @ weight + 0.1 * torch.randn(200, 2, generator=G)
    critic = ppo.Critic(8, 2)
    critic.fit(hidden, returns, 30)
    X = torch.cat([hidden, torch.ones(200, 1)], 1).double()
    best = torch.linalg.lstsq(X, returns.double()).solution
    assert (X @ (critic.weight.double() - best)).abs().max() < 1e-3
    for j in range(2):
        assert ppo.explained_variance(critic(hidden)[:, j], returns[:, j]) > 0.98


def test_a_critic_that_has_nothing_to_learn_stays():
    hidden, critic = torch.randn(20, 8, generator=G), ppo.Critic(8, 2)
    critic.fit(hidden, torch.zeros(20, 2), 5)
    assert torch.equal(critic.weight, torch.zeros(9, 2))


def test_a_critic_of_no_steps_stays_at_zero_whatever_the_returns():
    critic = ppo.Critic(8, 2)
    critic.fit(torch.randn(20, 8, generator=G), torch.randn(20, 2, generator=G), PPOConfig(critic_steps=0).critic_steps)
    assert torch.equal(critic.weight, torch.zeros(9, 2))


def test_the_critic_is_fitted_to_real_tokens_only():
    hidden, returns = torch.randn(3, 5, 4, generator=G), torch.randn(3, 5, 2, generator=G)
    junk = 100.0 * (1 - MASK[..., None])
    critics = []
    for extra in (0.0, junk):
        learner = PPO(4, PPOConfig(), "cpu", 2)
        learner.fit(batch_with(hidden + extra, MASK), ppo.Advantages(None, None, returns=returns + extra))
        critics.append(learner.critic.weight)
    assert torch.equal(*critics)


def test_advantages_leave_no_trace_in_the_learner(policy):
    rollout, logp, hidden = batch_of(policy)
    learner = PPO(policy.hidden_size, PPOConfig(), "cpu", 2)
    batch = Batch(rollout, torch.randn(len(rollout), 2, generator=G), logp, logp - 0.1, hidden, 0.1)
    learner.fit(batch, learner.advantages(batch))
    before = {name: tensor.clone() for name, tensor in learner.state().items()}
    first, second = learner.advantages(batch), learner.advantages(batch)
    assert torch.equal(first.normalised, second.normalised)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state().items())


def test_the_critics_targets_are_monte_carlo_returns_whatever_gae_lambda(policy):
    rollout, logp, hidden = batch_of(policy)
    batch = Batch(rollout, torch.randn(len(rollout), 2, generator=G), logp, logp - 0.1, hidden, 0.3)
    for gae_lambda in (0.0, 1.0):
        learner = PPO(policy.hidden_size, PPOConfig(gae_lambda=gae_lambda), "cpu", 2)
        learner.critic.weight.normal_()
        assert torch.equal(learner.advantages(batch).returns, ppo.to_go(ppo.token_rewards(batch)))


def test_a_critic_that_knows_nothing_explains_nothing():
    returns = torch.randn(50, generator=G)
    assert ppo.explained_variance(torch.zeros(50), returns) == 0.0


def test_explained_variance_is_one_less_the_residuals_share():
    values, returns = torch.randn(2, 50, generator=G).double()
    residual = returns - values
    share = residual.numpy().var() / returns.numpy().var()
    assert ppo.explained_variance(values, returns) == pytest.approx(1.0 - share, rel=1e-12)


def test_of_returns_that_do_not_vary_no_share_is_explained():
    assert math.isnan(ppo.explained_variance(torch.zeros(5), torch.zeros(5)))


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
    return ppo.policy_gradients(policy, batch, advantages, PPOConfig(**settings), halves)


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
    assert torch.equal(found.J, whole.J)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": math.inf}, "its advantages are not finite; lower kl_coef"),
        (
            {"logp_ref": math.nan, "advantages": math.nan},
            "the base model's log-probs are not finite; raise temperature",
        ),
        ({"kl_coef": math.inf, "advantages": math.nan}, "the KL coefficient is not finite; lower kl_coef"),
        ({"scores": math.inf, "advantages": math.nan}, "its calibrated rewards are not finite; lower missing_eos"),
        ({"advantages": 1e38}, "a policy gradient is not finite; lower lr"),
    ],
)
def test_a_gradient_that_is_not_finite_is_refused_by_what_was_not_finite_first(change, message):
    advantages = torch.full((3, 4, 2), change.pop("advantages"))
    whole = Batch(None, torch.ones(3, 2), torch.zeros(3, 4), torch.zeros(3, 4), None, 0.1)
    changed = {n: v if n == "kl_coef" else torch.full_like(getattr(whole, n), v) for n, v in change.items()}
    assert re.match(message, ppo.first_not_finite(replace(whole, **changed), advantages))


def test_a_gradient_that_is_not_finite_is_refused():
    policy = make_policy()
    batch, logp, _ = batch_of(policy)
    with pytest.raises(NotFinite, match="its advantages are not finite"):
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
    [("epochs", 0), ("clip_range", 0.0), ("critic_steps", -1), ("gae_lambda", -0.1), ("kl_coef", -1.0),
     ("missing_eos_penalty", math.nan), ("micro_batch_size", 0), ("kl_horizon", 0), ("kl_target", -1.0)],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        PPOConfig(**{field: value})
