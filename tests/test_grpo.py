"""Advantages from groups of responses: against plain definitions, and that no critic is left anywhere."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_composition import KL_COEF, rows_of, token_logprobs
from test_firm import NAMES, TRAINED, federation

import clients
import firm
import grpo
import mgda
import ppo
from app.checkpoint import federation_state, restore_federation
from clients import ClientConfig
from firm import FIRM, FIRMConfig, TrainingConfig
from grpo import GRPO, Groups
from ppo import SCALE_FLOOR, Batch, PPOConfig

G = torch.Generator().manual_seed(0)
GROUPS = replace(FIRM, learner=Groups)


def grouped(method=GROUPS, S=2, **settings):
    """A federation whose clients answer each of their prompts S times."""
    return federation(method=replace(method, learner=settings.pop("learner", Groups)), group_size=S, **settings)


def batch_of(scores, S, L=5, kl_coef=0.0):
    """Scores [B, k] of responses of L to 1 tokens, with random log-probs."""
    B = len(scores)
    mask = torch.ones(B, L, dtype=torch.long)
    for i in range(B):
        mask[i, L - i % L :] = 0
    logp, ref = torch.randn(2, B, L, generator=G) * mask
    return Batch(SimpleNamespace(mask=mask, group_size=S), scores, logp, ref, None, kl_coef)


def advantages(batch, learner=Groups):
    return learner(8, PPOConfig(), "cpu", batch.scores.shape[1]).advantages(batch)


@pytest.mark.parametrize("S", [2, 3, 5])
def test_a_score_is_compared_with_the_mean_of_the_others_of_its_group(S):
    scores = torch.randn(3 * S, 2, generator=G).double()
    ours = grpo.leave_one_out(scores, S)
    for i in range(3 * S):
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


@pytest.mark.parametrize("learner", [Groups, GRPO])
def test_a_group_of_equal_scores_has_advantages_of_exactly_zero(learner):
    scores = torch.randn(12, 3, generator=G)
    scores[3:6] = torch.tensor([0.1, 1 / 3, -7e3])
    made = advantages(batch_of(scores, 3), learner).normalised
    assert float(made[3:6].abs().max()) == 0.0 < float(made[6:].abs().max())


def test_where_all_groups_score_equally_and_kappa_is_zero_a_round_moves_nothing(monkeypatch):
    built = grouped(ppo={"kl_coef": 0.0})
    monkeypatch.setattr(
        built, "score", lambda prompts, *_: torch.tensor([[0.1 * len(p.token_ids), 0.3] for p in prompts])
    )
    before = built.theta.clone()
    built.round()
    assert torch.equal(built.theta, before)
    assert max(float(step.gram.abs().max()) for (update,) in built.record.updates for step in update.steps) == 0.0


def test_an_advantage_depends_on_differences_within_the_group_alone():
    scores, S = torch.randn(12, 2, generator=G).double(), 4
    batch = batch_of(scores, S)
    shifted = replace(batch, scores=scores + 100.0 * torch.arange(3).repeat_interleave(S)[:, None])
    assert (advantages(batch).normalised - advantages(shifted).normalised).abs().max() < 1e-10


def test_the_kl_to_come_enters_per_token_and_outside_the_baseline():
    scores = torch.randn(8, 2, generator=G).double()
    batch = batch_of(scores, 4, kl_coef=0.7)
    made, mask = advantages(batch), batch.rollout.mask
    plain = torch.zeros(*mask.shape, 2, dtype=torch.float64)
    for i, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            to_come = (batch.logp_old[i, t:n] - batch.logp_ref[i, t:n]).sum()
            plain[i, t] = grpo.leave_one_out(scores, 4)[i] - 0.7 * to_come
    real = plain[mask.bool()]
    sigma = real.std(0, correction=0)
    assert (made.scale - sigma).abs().max() < 1e-6 and sigma.min() > SCALE_FLOOR
    assert (made.normalised - plain / sigma).abs().max() < 1e-5  # not centred


def test_an_objective_that_hardly_varies_is_not_blown_up():
    made = advantages(batch_of(5.0 + 1e-4 * torch.randn(12, 1, generator=G), 4))
    assert made.scale < 1e-3 and made.normalised.abs().max() < 1e-2


def test_grpo_divides_a_group_by_its_own_deviation_and_the_kl_by_nothing():
    scores = torch.randn(8, 2, generator=G).double() * torch.tensor([1.0, 9.0]).repeat_interleave(4)[:, None]
    batch = batch_of(scores, 4, kl_coef=0.7)
    made, without = advantages(batch, GRPO).normalised, advantages(replace(batch, kl_coef=0.0), GRPO).normalised
    for i in range(8):
        group = scores[i // 4 * 4 : i // 4 * 4 + 4].numpy()
        expected = (scores[i].numpy() - group.mean(0)) / group.std(0, ddof=1)
        assert np.abs(without[i, 0].numpy() - expected).max() < 1e-6
    kl = ppo.to_go(batch.logp_old - batch.logp_ref)[..., None] * batch.rollout.mask[..., None]
    assert (made - (without - 0.7 * kl)).abs().max() < 1e-6


# In the engine


def test_each_prompt_is_answered_s_times_in_consecutive_rows_and_the_batch_counts_responses():
    built = grouped(S=3)
    responses = built.respond(built.clients, clients.TRAINING, built.group_size)
    assert len(responses.prompts) == len(responses.rollout) == 3 * 6
    for rows in responses.rows:
        drawn = responses.prompts[rows]
        assert [drawn[0]] * 3 == drawn[:3] and [drawn[3]] * 3 == drawn[3:] and drawn[0] != drawn[3]
    texts = responses.rollout.responses * responses.rollout.mask
    assert not torch.equal(texts[0], texts[1])  # each from uniforms of its own


@pytest.mark.parametrize("learner", [Groups, GRPO])
@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.name)
def test_every_method_learns_from_groups(method, learner):
    built = grouped(method, learner=learner)
    before = built.theta.clone()
    line = built.round()
    assert torch.isfinite(built.theta).all() and not torch.equal(built.theta, before)
    assert not any(key.startswith("explained_variance") for key in line)


def test_without_a_critic_nothing_of_one_is_in_the_checkpoint_or_kept_in_a_batch():
    built = grouped()
    built.round()
    tensors, _ = federation_state(built)
    assert set(tensors) == {"theta"}
    assert all(update.batch.hidden is None for (update,) in built.record.updates)


@pytest.mark.parametrize("learner", [ppo.PPO, Groups])
def test_a_restored_federation_goes_on_bit_for_bit_in_groups(learner):
    straight, stopped = (grouped(learner=learner) for _ in range(2))
    straight.round(), straight.round(), stopped.round()
    again = grouped(learner=learner)
    restore_federation(again, *federation_state(stopped))
    again.round()
    assert torch.equal(again.theta, straight.theta)


def test_a_critic_can_have_groups_too():
    built = grouped(learner=ppo.PPO, S=3)
    assert "explained_variance/even" in built.round()
    assert built.record.updates[0][0].batch.rollout.group_size == 3


def test_calibration_asks_as_many_prompts_with_groups_as_without():
    built, alone = grouped(S=3), federation()
    for each in (built, alone):
        each.calibrate()
    assert torch.equal(built.calibration.mean, alone.calibration.mean)


@pytest.mark.parametrize(("B", "S", "half"), [(6, 1, 3), (5, 1, 3), (12, 4, 8), (8, 4, 4), (4, 4, 4)])
def test_no_half_batch_cuts_a_group(B, S, half):
    built = federation(batch_size=B, clients=1)
    rollout = replace(built.respond(built.clients, clients.TRAINING).rollout, group_size=S)
    assert rollout.half == half
    sides = {all(rows < half) or all(rows >= half) for rows, _ in rollout.micro_batches(3)}
    assert sides == {True}
    assert sorted(torch.cat([rows for rows, _ in rollout.micro_batches(3)]).tolist()) == list(range(B))


def test_each_half_of_an_odd_number_of_groups_is_the_gradient_of_its_own_groups():
    built = grouped(S=2, clients=1)
    built.round()
    ((update,),) = built.record.updates
    batch, adapter = update.batch, built.policy.adapter
    adapter.assign(federation(clients=1).theta)
    first, tokens = update.halves[0], batch.rollout.mask.sum()
    losses = ppo.surrogate(
        (built.policy.logprobs(batch.rollout)[0] - batch.logp_old).exp(), update.advantages.normalised, 0.2
    )
    alone = (losses * batch.rollout.mask[..., None])[:4].sum((0, 1)) / tokens
    assert (ppo.jacobian(alone, adapter.leaves()) - first).abs().max() < 1e-5 * first.abs().max()


def test_a_single_group_has_no_second_half_and_no_stationarity():
    line = grouped(S=6).round()
    assert math.isnan(line["stationarity"]) and math.isfinite(line["drift"])


@pytest.mark.parametrize(
    ("settings", "learner", "message"),
    [({"group_size": 4}, Groups, "group_size: 4 does not divide batch_size, 6"),
     ({"group_size": 1}, Groups, "group_size: a group of 1"), ({}, Groups, "group_size: 4 does not divide"),
     ({"group_size": 6, "gram": "cross"}, Groups, "gram: cross .* at least 12"),
     ({"batch_size": 1, "gram": "cross"}, ppo.PPO, "gram: cross .* at least 2")],
)  # fmt: skip
def test_a_group_size_that_does_not_go_is_refused_by_name(settings, learner, message):
    with pytest.raises(ValueError, match=message):
        clients.responses_per_prompt(FIRMConfig(**{"batch_size": 6, **settings}), learner)


def test_if_left_open_a_group_has_four_and_a_critic_gets_one_response_to_a_prompt():
    assert [clients.responses_per_prompt(FIRMConfig(), learner) for learner in (Groups, GRPO, ppo.PPO)] == [4, 4, 1]


def test_a_local_update_from_groups_is_the_formulas_row_by_row():
    config = TrainingConfig(
        FIRMConfig(beta=0.3, preference=[0.3, 0.7], batch_size=6, group_size=3),
        ClientConfig(lr=0.05, optimizer="sgd"), PPOConfig(epochs=2, clip_range=0.1),
    )  # fmt: skip
    torch.manual_seed(0)
    built = grouped(S=3, preference=[0.3, 0.7])
    built.theta = built.theta + 0.2 * torch.randn(built.theta.shape)
    adapter, model, client = built.policy.adapter, built.policy.model, built.clients[1]
    adapter.assign(built.theta)
    rollout = built.respond([client], clients.TRAINING, 3).rollout
    scores = torch.randn(6, 2, generator=G)
    batch = ppo.prepare(built.policy, rollout, scores, KL_COEF, config.ppo)
    update = firm.local_update(client.trainings[0], built.policy, built.theta, batch, GROUPS, config)

    adapter.assign(built.theta)
    rows = list(rows_of(rollout))
    with torch.no_grad():
        old = [token_logprobs(model, *row) for row in rows]
        with adapter.disabled():
            ref = [token_logprobs(model, *row) for row in rows]
    advantages = []
    for i, (o, r) in enumerate(zip(old, ref, strict=True)):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        left = torch.stack([(o - r)[t:].sum() for t in range(len(o))])
        advantages.append(scores[i] - scores[others].mean(0) - KL_COEF * left[:, None])
    sigma = torch.cat(advantages).std(0, correction=0)
    for step in update.steps:
        losses = torch.zeros(2)
        for row, o, a in zip(rows, old, advantages, strict=True):
            ratio = (token_logprobs(model, *row) - o).exp()[:, None]
            losses = losses - torch.minimum(ratio * a / sigma, ratio.clamp(0.9, 1.1) * a / sigma).sum(0)
        J = ppo.jacobian(losses / sum(map(len, old)), adapter.parameters)
        Ghat = (J @ J.T).double() / (J @ J.T).double().trace()
        lam = mgda.solve(Ghat, 0.3, [0.3, 0.7])
        assert (step.lam - lam).abs().max() < 1e-4
        adapter.assign(adapter.vector() - 0.05 * lam.float() @ J)
    assert (update.theta - adapter.vector()).norm() < 1e-3 * (update.theta - built.theta).norm()
    assert built.names == NAMES[:2]
