"""What --diagnostics adds, on cases small enough to do by hand."""

import math

import pytest
import torch

from evidence import diagnostics

# Where clients go from one θ


def clients(C=3, M=3, d=40):
    """Gradients J_c [C, M, d] in float64, λ_c [C, M], and weights [C] of sum 8."""
    g = torch.Generator().manual_seed(0)
    lambdas = torch.rand(C, M, dtype=torch.float64, generator=g)
    J = torch.randn(C, M, d, dtype=torch.float64, generator=g)
    return J, lambdas / lambdas.sum(1, keepdim=True), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def products(vectors):
    """All inner products of vectors [..., d]: [..., ...]."""
    flat = vectors.flatten(0, -2)
    return (flat @ flat.T).view(*vectors.shape[:-1], *vectors.shape[:-1])


def explicit_drift(J, lambdas, weights):
    w = weights / weights.sum()
    mean = (w[:, None] * lambdas).sum(0)
    lost = sum(w[c] * (lambdas[c] - mean) @ J[c] for c in range(len(w)))
    step = sum(w[c] * lambdas[c] @ J[c] for c in range(len(w)))
    return float(lost.norm() / step.norm())


def test_drift_is_the_share_of_the_step_that_unequal_weights_make():
    J, lambdas, weights = clients()
    assert diagnostics.drift(products(J), lambdas, weights) == pytest.approx(explicit_drift(J, lambdas, weights))


def test_clients_with_equal_lambdas_do_not_drift():
    J, lambdas, weights = clients()
    assert diagnostics.drift(products(J), lambdas[:1].expand(3, 3), weights) == pytest.approx(0.0, abs=1e-12)


def test_equal_gradients_do_not_drift_however_unequal_the_lambdas():
    J, lambdas, weights = clients()
    assert diagnostics.drift(products(J[:1].expand(3, -1, -1)), lambdas, weights) == pytest.approx(0.0, abs=1e-7)


def test_drift_does_not_depend_on_the_scale_of_the_weights():
    J, lambdas, weights = clients()
    once, thrice = (diagnostics.drift(products(J), lambdas, factor * weights) for factor in (1, 3))
    assert once == pytest.approx(thrice, rel=1e-12)


def test_a_client_of_weight_zero_leaves_no_trace_in_the_drift():
    J, lambdas, _ = clients()
    without = diagnostics.drift(products(J[1:]), lambdas[1:], torch.tensor([2.0, 5.0]).double())
    assert diagnostics.drift(products(J), lambdas, torch.tensor([0.0, 2.0, 5.0]).double()) == pytest.approx(without)


def test_drift_has_no_value_where_the_step_is_zero():
    _, lambdas, weights = clients()
    assert math.isnan(diagnostics.drift(torch.zeros(3, 3, 3, 3, dtype=torch.float64), lambdas, weights))


def test_the_federated_gram_is_that_of_the_weighted_mean_gradients_of_the_halves():
    g = torch.Generator().manual_seed(0)
    halves = torch.randn(3, 2, 4, 30, dtype=torch.float64, generator=g)  # [C, 2, M, d]
    mean = (halves[0] + 2 * halves[1] + 5 * halves[2]) / 8
    G = diagnostics.federated_gram(products(halves), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    assert (G - products(mean)).abs().max() < 1e-12


def test_stationarity_is_four_times_the_mean_product_of_the_halves_directions():
    J, lambdas, _ = clients()
    a, b = J[:2]
    by_hand = 4 * (((lambdas[0] @ a) @ (lambdas[0] @ b)) + ((lambdas[1] @ a) @ (lambdas[1] @ b))) / 2
    assert diagnostics.half_batch_stationarity(products(J[:2]), lambdas[:2], 8, 8) == pytest.approx(float(by_hand))


def test_stationarity_on_equal_halves_is_the_squared_norm_of_the_direction():
    J, lambdas, _ = clients()
    both = J[:1].expand(2, -1, -1)
    direction = lambdas[0] @ (2 * J[0])
    ours = diagnostics.half_batch_stationarity(products(both), lambdas[:1].expand(2, -1), 8, 8)
    assert ours == pytest.approx(float(direction @ direction))


def test_noise_raises_the_squared_norm_on_one_batch_and_not_stationarity_on_halves():
    g, draws = torch.Generator().manual_seed(0), 2000
    J, lam = 3 * torch.eye(2, 50, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    halves = J / 2 + torch.randn(draws, 2, 2, 50, dtype=torch.float64, generator=g)
    on_halves = torch.tensor([diagnostics.half_batch_stationarity(products(h), lam.expand(2, 2), 8, 8) for h in halves])
    on_one_batch = (lam @ halves.sum(1)).square().sum(-1)
    true, noise = 9 * float(lam @ lam), 2 * 50 * float(lam @ lam)  # 5.2 and 58: two halves' noise adds up
    error = 4 * float(on_halves.std()) / math.sqrt(draws)
    assert float(on_halves.mean()) == pytest.approx(true, abs=error) and error < 2
    assert float(on_one_batch.mean()) == pytest.approx(true + noise, abs=error)


def test_stationarity_of_unequal_halves_of_one_gradient_is_its_squared_norm():
    # Five rows of equal gradients: three in one half, two in the other.
    J, lambdas, _ = clients()
    halves = torch.stack([0.6 * J[0], 0.4 * J[0]])
    ours = diagnostics.half_batch_stationarity(products(halves), lambdas[:1].expand(2, -1), 3, 2)
    assert ours == pytest.approx(float((lambdas[0] @ J[0]).square().sum()))


def test_a_single_row_has_no_halves():
    J, lambdas, _ = clients()
    assert math.isnan(diagnostics.half_batch_stationarity(products(J[:2]), lambdas[:2], 1, 0))


# Roughness of a curve


def test_a_straight_line_has_no_roughness():
    assert diagnostics.roughness([1.5 - 0.3 * t for t in range(20)]) == pytest.approx(0.0, abs=1e-12)


def test_the_roughness_of_white_noise_around_a_line_is_its_deviation():
    noise = 0.7 * torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert diagnostics.roughness((noise + 0.01 * torch.arange(20_000)).tolist()) == pytest.approx(0.7, rel=0.02)


def test_one_step_out_of_three_has_the_roughness_of_its_second_difference():
    assert diagnostics.roughness([0.0, 1.0, 0.0]) == pytest.approx(2 / math.sqrt(6))


@pytest.mark.parametrize("curve", [[], [1.0], [1.0, 2.0]])
def test_below_three_points_a_curve_has_no_roughness(curve):
    assert math.isnan(diagnostics.roughness(curve))
