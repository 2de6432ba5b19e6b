"""Advantages from groups of responses, against plain definitions; the local update is in test_composition.py."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_firm import TRAINED, federation, logged

import firm
import grpo
import ppo
from clients import Purpose
from firm import FIRM
from grpo import GROUP, GRPO
from ppo import CRITIC, SCALE_FLOOR, Batch
from settings import Config

G = torch.Generator().manual_seed(0)


def grouped(method=FIRM, estimator=GROUP, S=2, **settings):
    """A federation whose clients answer each of their prompts S times."""
    return federation(method=replace(method, estimator=estimator), group_size=S, **settings)


def batch_of(scores, S, L=5, kl_coef=0.0):
    """Scores [B, k] of responses of L to 1 tokens, with random log-probs."""
    B = len(scores)
    mask = torch.ones(B, L, dtype=torch.long)
    for i in range(B):
        mask[i, L - i % L :] = 0
    logp, ref = torch.randn(2, B, L, generator=G) * mask
    return Batch(SimpleNamespace(mask=mask, group_size=S), scores, logp, ref, None, kl_coef)


def advantages(batch, estimator=GROUP):
    return estimator.advantages(batch, {}, Config())


def test_a_score_is_compared_with_the_mean_of_the_others_of_its_group():
    S, scores = 5, torch.randn(15, 2, generator=G).double()
    ours = grpo.leave_one_out(scores, S)
    for i in range(15):
        start = i // S * S
        others = [j for j in range(start, start + S) if j != i]
        assert (ours[i] - (scores[i] - scores[others].mean(0))).abs().max() < 1e-12


def test_leave_one_out_leaves_the_gradient_of_the_expected_reward_unbiased():
    # All pairs of draws from three arms, by their probabilities: Σ P(a, b) (D_a ∇log π_a + D_b ∇log π_b) / 2 = ∇ E[R].
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rewards, logp = torch.tensor([1.0, 4.0, -2.0]).double(), logits.log_softmax(0)
    slopes = [torch.autograd.grad(logp[a], logits, retain_graph=True)[0] for a in range(3)]
    estimate = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        D = grpo.leave_one_out(rewards[[a, b], None], 2)[:, 0]
        estimate += (logp[a] + logp[b]).exp().item() * (D[0] * slopes[a] + D[1] * slopes[b]) / 2
    (exact,) = torch.autograd.grad((logp.exp() * rewards).sum(), logits)
    assert (estimate - exact).abs().max() < 1e-12


@pytest.mark.parametrize("estimator", [GROUP, GRPO])
def test_a_group_of_equal_scores_has_advantages_of_exactly_zero(estimator):
    scores = torch.randn(12, 3, generator=G)
    scores[3:6] = torch.tensor([0.1, 1 / 3, -7e3])
    normalised = advantages(batch_of(scores, 3), estimator).normalised
    assert float(normalised[3:6].abs().max()) == 0.0 < float(normalised[6:].abs().max())


def test_if_all_groups_score_equally_and_kappa_is_zero_a_round_moves_nothing():
    built = grouped(kl_coef=0.0)
    built.score = lambda prompts, *_: torch.tensor([[0.1 * len(p.token_ids), 0.3] for p in prompts])
    before = built.theta.clone()
    record = built.round()
    assert torch.equal(built.theta, before)
    assert not any(step.gram.any() for part in record.arrived.values() for step in part.updates[0].steps)


def test_the_kl_that_is_still_to_come_enters_per_token_and_outside_the_baseline():
    scores = torch.randn(8, 2, generator=G).double()
    batch = batch_of(scores, 4, kl_coef=0.7)
    ours, mask = advantages(batch), batch.rollout.mask
    plain = torch.zeros(*mask.shape, 2, dtype=torch.float64)
    for i, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            left = (batch.logp_old[i, t:n] - batch.logp_ref[i, t:n]).sum()
            plain[i, t] = grpo.leave_one_out(scores, 4)[i] - 0.7 * left
    sigma = plain[mask.bool()].std(0, correction=0)
    assert (ours.scale - sigma).abs().max() < 1e-6 and sigma.min() > SCALE_FLOOR
    assert (ours.normalised - plain / sigma).abs().max() < 1e-5  # not centred


@pytest.mark.parametrize("estimator", [GROUP, GRPO])
def test_an_objective_that_hardly_varies_is_not_blown_up(estimator):
    batch = batch_of(5.0 + 1e-4 * torch.randn(12, 1, generator=G), 4)
    assert 0 < advantages(batch, estimator).normalised.abs().max() < 1e-2


def test_grpo_divides_a_group_by_its_own_deviation_and_the_kl_by_nothing():
    scores = torch.randn(8, 2, generator=G).double() * torch.tensor([1.0, 9.0]).repeat_interleave(4)[:, None]
    batch = batch_of(scores, 4, kl_coef=0.7)
    ours, without = (advantages(replace(batch, kl_coef=kappa), GRPO).normalised for kappa in (0.7, 0.0))
    for i in range(8):
        group = scores[i // 4 * 4 : i // 4 * 4 + 4].numpy()
        expected = (scores[i].numpy() - group.mean(0)) / group.std(0, ddof=1)
        assert np.abs(without[i, 0].numpy() - expected).max() < 1e-6
    kl = ppo.to_go(batch.logp_old - batch.logp_ref)[..., None] * batch.rollout.mask[..., None]
    assert (ours - (without - 0.7 * kl)).abs().max() < 1e-6


# In the engine


def test_each_prompt_is_answered_s_times_in_consecutive_rows_and_the_batch_counts_responses():
    built = grouped(S=3)
    for client in built.clients:
        rollout, _ = built.respond(client, Purpose.TRAINING, built.group_size)
        assert len(rollout) == 6 and rollout.group_size == 3
        asked = [row[mask == 1].tolist() for row, mask in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
        assert asked == [asked[0]] * 3 + [asked[3]] * 3 and asked[0] != asked[3]
        answers = rollout.responses * rollout.mask
        assert not torch.equal(answers[0], answers[1])  # each from uniforms of its own


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_every_method_learns_from_groups_without_a_critic_anywhere(method):
    built = grouped(method, clients=2)
    before, line = built.theta.clone(), logged(built)
    assert torch.isfinite(built.theta).all() and not torch.equal(built.theta, before)
    assert not any(key.startswith("explained_variance") for key in line)
    assert not any("critic" in kept for client in built.clients for kept in client.state)
    ((_, batch, _),) = built.batches(built.clients[:1])
    assert batch.hidden is None


def test_a_critic_can_have_groups_too():
    built = grouped(estimator=CRITIC, S=3)
    assert built.round().arrived[0].updates[0].batch.rollout.group_size == 3
    assert all("critic" in client.state[0] for client in built.clients)


def test_calibration_asks_as_many_prompts_with_groups_as_without():
    built, alone = grouped(S=3), federation()
    for each in (built, alone):
        each.calibrate()
    assert torch.equal(built.calibration.mean, alone.calibration.mean)


def test_if_left_open_a_group_has_four_and_a_critic_gets_one_response_to_a_prompt():
    assert [firm.responses_per_prompt(Config(), each) for each in (GROUP, GRPO, CRITIC)] == [4, 4, 1]
