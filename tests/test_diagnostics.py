"""The numbers we watch, on cases small enough to do by hand."""

import math

import pytest
import torch

from evidence import diagnostics


def test_disagreement_is_the_mean_distance_to_the_mean():
    assert diagnostics.disagreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(math.sqrt(0.5))


def test_clients_that_agree_do_not_disagree():
    assert diagnostics.disagreement(torch.tensor([[0.3, 0.7]] * 4)) == pytest.approx(0.0, abs=1e-7)


def test_dispersion_is_the_mean_distance_of_the_adapters():
    assert diagnostics.dispersion(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])) == 5.0


def test_cosine_of_opposed_gradients_is_minus_one():
    J = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    assert diagnostics.mean_cosine(J @ J.T) == pytest.approx(-1.0)


def test_cosine_with_a_zero_gradient_is_zero():
    assert diagnostics.mean_cosine(torch.diag(torch.tensor([1.0, 0.0]))) == 0.0


def test_first_order_gain_is_that_of_the_worst_served_objective():
    J = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert diagnostics.first_order_gain(J, torch.tensor([-2.0, 0.5])) == -0.5


def test_clip_fraction_counts_real_tokens_only():
    ratio, mask = torch.tensor([[1.0, 1.5, 9.0]]), torch.tensor([[1, 1, 0]])
    assert diagnostics.clip_fraction(ratio, mask, 0.2) == 0.5


def test_approx_kl_estimates_the_kl_between_two_distributions():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    sample = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    estimate = diagnostics.approx_kl((q / p).log()[sample], torch.ones_like(sample))
    assert estimate == pytest.approx(float((p * (p / q).log()).sum()), rel=0.05)


def test_sequence_kl_sums_over_real_tokens():
    logp, ref = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -2.5, 0.0]])
    assert diagnostics.sequence_kl(logp, ref, torch.tensor([[1, 1, 0]])).tolist() == [1.0]


def test_logp_gap_is_the_largest_over_real_tokens():
    assert diagnostics.logp_gap(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[1, 0]])) == 0.5


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
    ours = diagnostics.averaging_residual(thetas, weights, 1.7)
    assert ours == pytest.approx(with_whole_matrices(thetas, weights, 1.7), rel=1e-12)


def test_equal_clients_lose_nothing_by_averaging():
    thetas, _ = adapters(C=1)
    residual, norm = diagnostics.averaging_residual(thetas * 3, torch.tensor([1.0, 2.0, 4.0]).double(), 1.7)
    assert residual == pytest.approx(0.0, abs=1e-12)
    assert norm == pytest.approx(with_whole_matrices(thetas, torch.ones(1), 1.7)[1], rel=1e-12)


@pytest.mark.parametrize("shared", [0, 1])
def test_clients_with_one_factor_in_common_lose_nothing_by_averaging(shared):
    thetas, weights = adapters()
    for theta in thetas[1:]:
        theta[shared::2] = thetas[0][shared::2]
    residual, norm = diagnostics.averaging_residual(thetas, weights, 1.7)
    assert residual == pytest.approx(0.0, abs=1e-12) and norm > 1


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
    assert diagnostics.half_batch_stationarity(products(J[:2]), lambdas[:2], 16) == pytest.approx(float(by_hand))


def test_stationarity_on_equal_halves_is_the_squared_norm_of_the_direction():
    J, lambdas, _ = clients()
    both = J[:1].expand(2, -1, -1)
    direction = lambdas[0] @ (2 * J[0])
    ours = diagnostics.half_batch_stationarity(products(both), lambdas[:1].expand(2, -1), 16)
    assert ours == pytest.approx(float(direction @ direction))


def test_noise_raises_the_squared_norm_on_one_batch_and_not_stationarity_on_halves():
    g, draws = torch.Generator().manual_seed(0), 2000
    J, lam = 3 * torch.eye(2, 50, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    halves = J / 2 + torch.randn(draws, 2, 2, 50, dtype=torch.float64, generator=g)
    on_halves = torch.tensor([diagnostics.half_batch_stationarity(products(h), lam.expand(2, 2), 16) for h in halves])
    on_one_batch = (lam @ halves.sum(1)).square().sum(-1)
    true, noise = 9 * float(lam @ lam), 2 * 50 * float(lam @ lam)  # 5.2 and 58: two halves' noise adds up
    error = 4 * float(on_halves.std()) / math.sqrt(draws)
    assert float(on_halves.mean()) == pytest.approx(true, abs=error) and error < 2
    assert float(on_one_batch.mean()) == pytest.approx(true + noise, abs=error)


def test_stationarity_of_unequal_halves_of_one_gradient_is_its_squared_norm():
    # Five rows of equal gradients: three in one half, two in the other.
    J, lambdas, _ = clients()
    halves = torch.stack([0.6 * J[0], 0.4 * J[0]])
    ours = diagnostics.half_batch_stationarity(products(halves), lambdas[:1].expand(2, -1), 5)
    assert ours == pytest.approx(float((lambdas[0] @ J[0]).square().sum()))


def test_a_single_row_has_no_halves():
    J, lambdas, _ = clients()
    assert math.isnan(diagnostics.half_batch_stationarity(products(J[:2]), lambdas[:2], 1))


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
