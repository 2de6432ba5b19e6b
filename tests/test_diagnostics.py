"""What --diagnostics adds: formulas against explicit float64 sums, halves against the whole batch's gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_firm import federation

import ppo
from app import diagnostics
from baselines import FSMGDA
from firm import FIRM
from grpo import GROUP


def products(vectors):
    """All inner products of vectors [..., d]: [..., ...]."""
    flat = vectors.flatten(0, -2)
    return (flat @ flat.T).view(*vectors.shape[:-1], *vectors.shape[:-1])


def explicit_drift(J, lambdas, weights):
    w = weights / weights.sum()
    mean = (w[:, None] * lambdas).sum(0)
    lost = sum(w[c] * (lambdas[c] - mean) @ J[c] for c in range(len(w)))
    return float(lost.norm() / sum(w[c] * lambdas[c] @ J[c] for c in range(len(w))).norm())


def test_drift_is_the_share_of_the_step_that_unequal_weights_make():
    g, weights = torch.Generator().manual_seed(0), torch.tensor([1.0, 2.0, 5.0]).double()
    J, lambdas = (torch.randn(3, 3, n, dtype=torch.float64, generator=g) for n in (40, 1))
    lambdas = lambdas[..., 0].softmax(1)
    assert diagnostics.drift(products(J), lambdas, weights) == pytest.approx(explicit_drift(J, lambdas, weights))
    assert diagnostics.drift(products(J), lambdas[:1].expand(3, 3), weights) == pytest.approx(0.0, abs=1e-12)


def test_noise_raises_the_squared_norm_on_one_batch_and_not_stationarity_on_halves():
    g, draws = torch.Generator().manual_seed(0), 2000
    J, lam = 3 * torch.eye(2, 50, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    shares = torch.tensor([0.6, 0.4]).double()[:, None, None]  # three rows of five, and two
    halves = shares * J + torch.randn(draws, 2, 2, 50, dtype=torch.float64, generator=g)
    on_halves = torch.tensor([diagnostics.stationarity(products(h), lam.expand(2, 2), (3, 2)) for h in halves])
    on_one_batch = (lam @ halves.sum(1)).square().sum(-1)
    true, noise = 9 * float(lam @ lam), 2 * 50 * float(lam @ lam)  # 5.2 and 58: two halves' noise adds up
    error = 4 * float(on_halves.std()) / np.sqrt(draws)
    means = [float(on_halves.mean()), float(on_one_batch.mean())]
    assert means == pytest.approx([true, true + noise], abs=error) and error < 2


@pytest.mark.parametrize("settings", [
    {}, {"micro_batch_size": 3}, {"method": replace(FIRM, estimator=GROUP), "group_size": 4}, {"method": FSMGDA},
], ids=["firm", "pieces", "groups", "fsmgda"])  # fmt: skip
def test_halves_of_whole_groups_add_up_to_the_gradient_of_the_batch_and_the_adapter_stays(settings):
    trained = federation(batch_size=8, **settings)
    trained.round()  # away from the base policy
    policy, config, record = trained.policy, trained.config, trained.round()
    after = policy.adapter.vector()
    diagnostics.observe(policy, record, config)
    assert torch.equal(policy.adapter.vector(), after)
    policy.adapter.assign(record.message["theta"])
    for update in (update for part in record.arrived.values() for update in part.updates):
        whole = ppo.policy_gradients(policy, update.batch, update.advantages.normalised, config).J
        first, second = diagnostics.half_gradients(policy, update, config)
        assert torch.allclose(first + second, whole, rtol=1e-3, atol=1e-6) and first.norm() > 0 < second.norm()
        assert [(rows.start, rows.stop) for rows in diagnostics.halves(update.batch.rollout)] == [(0, 4), (4, 8)]


def test_figures_of_a_round_are_those_of_the_gradients_that_it_began_with():
    trained = federation(batch_size=8, beta=1.0)  # at which every client's λ is another
    trained.round()
    record = trained.round()
    figures, grams = diagnostics.observe(trained.policy, record, trained.config)
    trained.policy.adapter.assign(record.message["theta"])
    parts, w = [part.updates[0] for part in record.arrived.values()], record.shares
    lam = torch.stack([part.steps[0].lam for part in parts])
    halves = torch.stack([diagnostics.half_gradients(trained.policy, part, trained.config) for part in parts]).double()
    assert figures["drift"] == pytest.approx(explicit_drift(halves.sum(1), lam, w), rel=1e-6)
    J = (w[:, None, None, None] * halves).sum(0)  # of the federation, [2, M, d]
    t = torch.linspace(0, 1, 100_001).double()[:, None]
    estimates = []
    for own, other in (J, J.flip(0)):
        points = torch.cat([t, 1 - t], 1)  # λ of the shortest λ₁ g₁ + λ₂ g₂, by brute force
        shortest = points[torch.einsum("ti,ij,tj->t", points, own @ own.T, points).argmin()]
        estimates.append(float((shortest @ own) @ (shortest @ other)) * 4)
    assert figures["stationarity"] == pytest.approx(np.mean(estimates), rel=1e-3)
    assert torch.equal(grams["steps"][0, 0], torch.stack([step.gram for step in parts[0].steps]))
