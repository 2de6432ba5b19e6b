"""What --diagnostics adds: drift against explicit float64 sums, inner products against a client's own gradients."""

import numpy as np
import pytest
import torch
from conftest import make_policy

import ppo
from app.options import method_of
from data import Prompt
from experiments import diagnostics
from firm import Federation
from settings import Config


def federation(**settings):
    """Three clients on random weights; a reward is the share of tokens that 2, or 3, divides."""
    rng = np.random.default_rng(0)
    prompts = [Prompt("", (), tuple(rng.integers(3, 50, rng.integers(2, 8))), "", {}) for _ in range(15)]

    def score(prompts, rollout, holdings):
        shares = [((rollout.responses % j == 0) * rollout.mask).sum(1) / rollout.mask.sum(1) for j in (2, 3)]
        return torch.stack(shares, 1).double()

    config = Config(**{"clients": 3, "batch_size": 8, "epochs": 2, "lr": 1e-2, "kl_coef": 0.01} | settings)
    shares = [prompts[:4], prompts[4:9], prompts[9:]]
    return Federation(make_policy(max_new_tokens=6), shares, ["even", "threes"], score, method_of(config), config)


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


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 3}, {"advantages": "group", "group_size": 4}], ids=str)
def test_figures_of_a_round_are_those_of_the_gradients_that_it_began_with(settings):
    trained = federation(**settings)
    policy, config, record = trained.policy, trained.config, trained.round()
    after = policy.adapter.vector()
    figures, grams = diagnostics.observe(policy, record, config)
    assert torch.equal(policy.adapter.vector(), after)
    policy.adapter.assign(record.message["theta"])
    parts = [part.updates[0] for part in record.arrived.values()]
    gradients = [ppo.policy_gradients(policy, u.batch, u.advantages.normalised, config).J for u in parts]
    J, lam = torch.stack(gradients).double(), torch.stack([part.steps[0].lam for part in parts])
    assert figures["drift"] == pytest.approx(explicit_drift(J, lam, record.shares), rel=1e-6)
    for c, part in enumerate(parts):  # the first step starts at θ_t
        assert torch.allclose(grams["start"][c, :, c], part.steps[0].gram, rtol=1e-4)
        assert torch.equal(grams["steps"][c, 0], torch.stack([step.gram for step in part.steps]))
