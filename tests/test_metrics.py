"""What a round leaves in the log, on cases small enough to do by hand."""

import math
import re

import numpy as np
import pytest
import torch
from test_firm import NAMES, federation

from app import metrics
from baselines import MORLHF
from rewards import parse_spec


def test_disagreement_is_the_mean_distance_to_the_mean():
    assert metrics.disagreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(math.sqrt(0.5))


def test_clients_that_agree_do_not_disagree():
    assert metrics.disagreement(torch.tensor([[0.3, 0.7]] * 4)) == pytest.approx(0.0, abs=1e-7)


def test_an_objective_that_a_client_does_not_hold_counts_neither_in_the_mean_nor_in_the_distance():
    nan = float("nan")
    lambdas = torch.tensor([[1.0, nan], [0.5, 0.5], [0.0, 1.0]])  # means (½, ¾), distances ½, ¼, √(¼ + 1/16)
    assert metrics.disagreement(lambdas) == pytest.approx((0.5 + 0.25 + math.sqrt(0.3125)) / 3)


def test_dispersion_is_the_mean_distance_of_the_adapters():
    assert metrics.disagreement(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])) == 5.0


def test_cosine_of_opposed_gradients_is_minus_one():
    J = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    assert float(metrics.pair_cosines(J @ J.T)) == pytest.approx(-1.0)


def test_cosine_with_a_zero_gradient_is_zero():
    assert metrics.pair_cosines(torch.diag(torch.tensor([1.0, 0.0]))).tolist() == [0.0]


def test_no_objective_can_have_a_name_that_another_metric_has():
    # Every column of a round with one-letter objectives, with that name put in for the letter.
    line = federation(M=2).round()
    kinds = {key.split("/")[0] for key in line if key.endswith(f"/{NAMES[0]}")}
    taken = {key.split("/")[1] for key in line if key.split("/")[0] in kinds} - set(NAMES)
    assert taken == {"disagreement"}
    with pytest.raises(ValueError, match="disagreement"):
        parse_spec("disagreement=rule:length")


@pytest.mark.parametrize("name", ["drift", "movement"])
def test_an_objective_called_like_a_figure_keeps_its_own_column(name):
    built = federation()
    built.names = [name, "low"]
    line = built.round()
    assert line[f"lambda/{name}"] + line["lambda/low"] == pytest.approx(1.0)


def test_the_column_of_a_loss_on_several_objectives_is_no_name_that_an_objective_may_have():
    line = federation(method=MORLHF).round()
    (column,) = (key for key in line if key.startswith("advantage_scale/"))
    assert not re.fullmatch(r"[A-Za-z0-9_-]+", column.split("/")[1])


def test_rewards_are_means_over_the_clients_that_hold_the_objective():
    built = federation(held=[[0], [0, 1], [1]])
    line = built.round()
    raw = torch.cat(built.record.raw)
    assert line["reward/even"] == pytest.approx(float(raw[:12, 0].mean()))
    assert line["reward_sd/low"] == pytest.approx(float(np.std(raw[6:, 1].numpy())))


def test_lambda_is_the_mean_over_the_clients_that_hold_the_objective():
    built = federation(held=[[0], [0, 1], [1]], beta=0.3)
    line = built.round()
    own = torch.stack([step.lam for step in built.record.updates[1][0].steps]).mean(0)
    assert line["lambda/even"] == pytest.approx((1.0 + float(own[0])) / 2)
    assert line["lambda/low"] == pytest.approx((1.0 + float(own[1])) / 2)


def test_every_client_has_its_own_figures_of_what_it_holds():
    built = federation(held=[[0], [0, 1], [1]], beta=0.3)
    line = built.round()
    for c, (held, raw) in enumerate(zip(([0], [0, 1], [1]), built.record.raw, strict=True)):
        for j, name in enumerate(("even", "low")):
            assert (f"reward/{name}/client{c}" in line) == (f"lambda/{name}/client{c}" in line) == (j in held)
            if j in held:
                assert line[f"reward/{name}/client{c}"] == pytest.approx(float(raw[:, j].mean()))
        lam = torch.stack([step.lam for step in built.record.updates[c][0].steps]).mean(0)
        assert [line[f"lambda/{('even', 'low')[j]}/client{c}"] for j in held] == pytest.approx(lam.tolist())
        assert line[f"kl/client{c}"] == built.record.uploads[c].kl
        assert line[f"share/client{c}"] == pytest.approx((4 + c) / 15)


# Averaging A and B apart


def adapters(C=4):
    """Each client's [A₀, B₀, A₁, B₁], two layers of different shapes in float64, and weights of sum 15."""
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 7), (5, 3), (3, 4), (9, 3)]
    thetas = [[torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes] for _ in range(C)]
    return thetas, 2.0 ** torch.arange(C, dtype=torch.float64)


def with_whole_matrices(thetas, weights, scale):
    """‖mean(ΔW) − scale · mean(B) mean(A)‖ and ‖mean(ΔW)‖, every ΔW written out."""
    w = (weights / weights.sum()).tolist()
    lost = kept = 0.0
    for i in range(0, len(thetas[0]), 2):
        A, B = (sum(share * theta[i + k] for share, theta in zip(w, thetas, strict=True)) for k in (0, 1))
        mean = sum(share * scale * theta[i + 1] @ theta[i] for share, theta in zip(w, thetas, strict=True))
        lost += float((mean - scale * B @ A).square().sum())
        kept += float(mean.square().sum())
    return math.sqrt(lost), math.sqrt(kept)


def test_the_averaging_residual_is_that_of_the_whole_matrices():
    thetas, weights = adapters()
    ours = metrics.averaging_residual(thetas, weights, 1.7)
    assert ours == pytest.approx(with_whole_matrices(thetas, weights, 1.7), rel=1e-12)


def test_equal_clients_lose_nothing_by_averaging():
    thetas, _ = adapters(C=1)
    residual, norm = metrics.averaging_residual(thetas * 3, torch.tensor([1.0, 2.0, 4.0]).double(), 1.7)
    assert residual == pytest.approx(0.0, abs=1e-12)
    assert norm == pytest.approx(with_whole_matrices(thetas, torch.ones(1), 1.7)[1], rel=1e-12)


@pytest.mark.parametrize("shared", [0, 1])
def test_clients_with_one_factor_in_common_lose_nothing_by_averaging(shared):
    thetas, weights = adapters()
    for theta in thetas[1:]:
        theta[shared::2] = thetas[0][shared::2]
    residual, norm = metrics.averaging_residual(thetas, weights, 1.7)
    assert residual == pytest.approx(0.0, abs=1e-12) and norm > 1


def test_explained_variance_is_pooled_over_the_real_tokens_of_all_clients_objective_by_objective():
    built = federation()
    built.round()  # so that the critics know something
    line = built.round()
    batches = [update for (update,) in built.record.updates]
    for j, name in enumerate(NAMES[:2]):
        returns, values = [], []
        for update in batches:
            for row, n in enumerate(update.batch.rollout.mask.sum(1).tolist()):
                returns += update.advantages.returns[row, :n, j].tolist()
                values += update.advantages.values[row, :n, j].tolist()
        residual = np.array(returns) - np.array(values)
        assert line[f"explained_variance/{name}"] == pytest.approx(1 - residual.var() / np.var(returns), rel=1e-5)
