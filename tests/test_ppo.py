"""PPO with k rewards, against plain definitions in float64 and finite differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_policy

import ppo
from ppo import CRITIC, Batch, NotFinite
from settings import UpdateSettings

G = torch.Generator().manual_seed(0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


# Advantages


def test_gae_is_the_decaying_sum_of_td_errors_up_to_the_end():
    rewards, values = torch.randn(2, 3, 5, 3, generator=G).double()  # garbage where masked
    advantages = ppo.gae(rewards, values, MASK, 0.95)
    for b, n in enumerate(MASK.sum(1).tolist()):
        assert not advantages[b, n:].any()
        for j in range(3):
            v = values[b, :n, j].tolist() + [0.0]
            delta = [float(rewards[b, t, j]) + v[t + 1] - v[t] for t in range(n)]
            for t in range(n):
                direct = sum(0.95 ** (s - t) * delta[s] for s in range(t, n))
                assert float(advantages[b, t, j]) == pytest.approx(direct, abs=1e-12)


def test_the_return_of_a_token_is_the_sum_of_the_rewards_from_it_on():
    assert ppo.to_go(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[7.0, 6.0, 4.0]]


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


# The critic


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
    start = torch.randn(9, 2, generator=G)
    expected = krylov_fit(hidden, returns, start, steps)
    assert (ppo.least_squares(start, hidden, returns, steps) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_enough_steps_reach_the_least_squares_whatever_the_scale_of_the_states(scale):
    hidden, weight = scale * torch.randn(200, 8, generator=G), torch.randn(8, 2, generator=G) / scale
    returns = hidden @ weight + 0.1 * torch.randn(200, 2, generator=G)
    X = torch.cat([hidden, torch.ones(200, 1)], 1).double()
    best = torch.linalg.lstsq(X, returns.double()).solution
    assert (X @ (ppo.least_squares(torch.zeros(9, 2), hidden, returns, 30).double() - best)).abs().max() < 1e-3


def test_a_critic_that_has_nothing_to_learn_stays_at_zero():
    hidden = torch.randn(20, 8, generator=G)
    assert torch.equal(ppo.least_squares(torch.zeros(9, 2), hidden, torch.zeros(20, 2)), torch.zeros(9, 2))


def test_the_critic_is_fitted_to_real_tokens_only():
    hidden, returns = torch.randn(3, 5, 4, generator=G), torch.randn(3, 5, 2, generator=G)
    critics = []
    for junk in (0.0, 100.0 * (1 - MASK[..., None])):
        batch = Batch(SimpleNamespace(mask=MASK), torch.zeros(3, 2), None, None, hidden + junk, 0.0)
        critics.append(CRITIC.fit(batch, ppo.Advantages(None, None, returns=returns + junk), {})["critic"])
    assert torch.equal(*critics)


# The gradients


def batch_of(policy, n=6, L=8):
    """A rollout of n rows, and its log π [n, L]."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, k).tolist() for k in rng.integers(1, 9, n)]
    rollout = policy.sample(prompts, rng.random((n, L)))
    return rollout, policy.logprobs_in_pieces(rollout, None)[0]


def everything(policy, rollout, logp, advantages, **settings):
    """What `policy_gradients` gives for these log π_old [B, L] and advantages [B, L, k]."""
    batch = Batch(rollout, torch.zeros(len(rollout), advantages.shape[-1]), logp, logp, None, 0.0)
    return ppo.policy_gradients(policy, batch, advantages, UpdateSettings(**settings))


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.3, 1.0, 0.0), (0.7, 1.0, -1.0), (1.3, -1.0, 1.0), (0.7, -1.0, 0.0), (1.1, 2.0, -2.0), (1.0, 3.0, -3.0)],
)
def test_the_clip_stops_only_steps_that_would_go_further_the_same_way(ratio, advantage, slope):
    r = torch.tensor([[ratio]], requires_grad=True)
    ppo.surrogate(r, torch.tensor([[[advantage]]]), 0.2).sum().backward()
    assert float(r.grad) == slope


def test_before_the_first_step_every_ratio_is_exactly_one(policy):
    rollout, logp = batch_of(policy)
    gradients = everything(policy, rollout, logp, torch.ones(*logp.shape, 2))
    assert gradients.approx_kl == 0.0 and gradients.clip_fraction == 0.0
    assert torch.equal(policy.logprobs(rollout)[0].detach(), logp)


def test_lambda_times_j_is_the_gradient_of_the_weighted_loss(policy):
    rollout, logp = batch_of(policy)
    old = logp + 0.1 * torch.randn(logp.shape, generator=G)
    advantages = torch.randn(*logp.shape, 3, generator=G)
    lam = torch.tensor([0.2, 0.5, 0.3])
    J = everything(policy, rollout, old, advantages).J
    ratio = (policy.logprobs(rollout)[0] - old).exp()
    token = torch.minimum(ratio[..., None] * advantages, ratio.clamp(0.8, 1.2)[..., None] * advantages)
    loss = -((token @ lam) * rollout.mask).sum() / rollout.mask.sum()
    direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.adapter.parameters)])
    assert (lam @ J - direct).abs().max() < 1e-5 * direct.abs().max()


def test_each_row_of_j_is_the_finite_difference_of_its_loss():
    policy = make_policy("llama")
    policy.model.double()
    rollout, logp = batch_of(policy)
    advantages = torch.randn(*logp.shape, 2, generator=G).double()
    # The float32 log-softmax is the only single-precision step; a wide difference keeps its rounding small.
    theta, direction = policy.adapter.vector(), torch.randn(policy.adapter.size, generator=G).double()
    J = everything(policy, rollout, logp, advantages, clip_range=10.0).J

    def losses(step):
        policy.adapter.assign(theta + step * direction)
        ratio = (policy.logprobs(rollout)[0].detach() - logp).exp()
        return -(ratio[..., None] * advantages * rollout.mask[..., None]).sum((0, 1)) / rollout.mask.sum()

    numeric = (losses(1e-3) - losses(-1e-3)) / 2e-3
    assert ((J @ direction) - numeric).abs().max() < 2e-2 * numeric.abs().max()


def test_micro_batches_change_neither_the_gradients_nor_a_figure(policy):
    rollout, logp = batch_of(policy)
    old = logp + 0.2 * torch.randn(logp.shape, generator=G)  # some ratios are clipped
    advantages = torch.randn(*logp.shape, 2, generator=G)
    whole, cut = (everything(policy, rollout, old, advantages, micro_batch_size=size) for size in (None, 4))
    assert (whole.J - cut.J).abs().max() < 1e-4 * whole.J.abs().max()
    for figure in ("entropy", "clip_fraction", "approx_kl"):
        assert getattr(cut, figure) == pytest.approx(getattr(whole, figure), abs=1e-5) and getattr(whole, figure) > 0.0


def test_the_figures_of_a_step_are_their_definitions_over_real_tokens(policy):
    rollout, logp = batch_of(policy)
    old = logp + 0.2 * torch.randn(logp.shape, generator=G)
    gradients = everything(policy, rollout, old, torch.ones(*logp.shape, 1), clip_range=0.1)
    log_ratio = (logp - old)[rollout.mask.bool()].double().numpy()
    assert gradients.approx_kl == pytest.approx(np.mean(np.exp(log_ratio) - 1 - log_ratio), rel=1e-4)
    assert gradients.clip_fraction == pytest.approx(np.mean(np.abs(np.exp(log_ratio) - 1) > 0.1))


def test_over_16_bit_weights_the_gradients_are_float32_and_those_of_float32_to_rounding(kind):
    exact, rounded = make_policy(kind), make_policy(kind)
    rollout, logp = batch_of(exact)
    advantages = torch.randn(*logp.shape, 2, generator=G)
    expected = everything(exact, rollout, logp, advantages).J
    for module in rounded.model.modules():  # the frozen weights alone
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    old, _ = rounded.logprobs_in_pieces(rollout, None)
    J = everything(rounded, rollout, old, advantages).J
    assert J.dtype == torch.float32
    assert torch.cosine_similarity(J, expected, dim=1).min() > 0.97


@pytest.mark.parametrize("what", ["log-probs", "rewards", "advantages", "gradient"])
def test_an_update_that_is_not_finite_is_refused_by_what_was_so_first(what):
    policy = make_policy()
    rollout, logp = batch_of(policy)
    bad = {"log-probs": math.nan, "rewards": math.inf, "advantages": math.nan, "gradient": 1e38}[what]
    scores, advantages = torch.zeros(len(rollout), 2), torch.full((*logp.shape, 2), bad)  # whatever it was, it spreads
    if what == "log-probs":
        logp = torch.full_like(logp, bad)
    if what == "rewards":
        scores[0, 0] = bad
    with pytest.raises(NotFinite, match=f"not finite: its {what};"):
        ppo.policy_gradients(policy, Batch(rollout, scores, logp, logp, None, 0.0), advantages, UpdateSettings())


# The KL coefficient


@pytest.mark.parametrize(
    ("kl", "samples", "target", "factor"),
    [(3.0, 128, 3.0, 1.0), (3.3, 128, 3.0, 1 + 0.1 * 0.128), (30.0, 128, 3.0, 1 + 0.2 * 0.128),
     (0.0, 128, 3.0, 1 - 0.2 * 0.128), (0.0, 100_000, 3.0, 0.8), (100.0, 128, 0.0, 1.0)],
)  # fmt: skip
def test_the_kl_coefficient_moves_by_the_clipped_relative_error_and_stays_positive(kl, samples, target, factor):
    assert ppo.adapt_kl(0.5, kl, samples, target) == pytest.approx(0.5 * factor)
