"""The other methods, against hand calculations and plain NumPy with whole matrices in float64."""

import numpy as np
import pytest
import torch
from test_firm import fedcmoo, federation, score

import baselines
import mgda
from app.checkpoint import federation_state, restore_federation
from baselines import FSMGDA, MORLHF, FedCMOOConfig
from fedavg import Ledger, Server, Upload
from firm import FIRM
from rewards import Calibration
from settings import parse

EQUAL = torch.ones(4, dtype=torch.float64)


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def estimate(A, e, seed=0):
    return baselines.estimate_gram(A, e, Ledger(), np.random.default_rng(seed))


def exact_gram(A):
    """Gram [M, M] of the mean of A [C, M, d]."""
    mean = A.numpy().mean(0)
    return torch.from_numpy(mean @ mean.T)


def relative_error(estimated, exact):
    return float((estimated - exact).norm() / exact.norm())


def server_lambda(J, prompts_held=EQUAL, state=None, seed=0, **settings):
    method = fedcmoo(**settings)
    server = Server(1.0, {} if state is None else state, np.random.default_rng(seed), method.settings)
    return method.server_weights(J, prompts_held, server)


# MORLHF, soups


def test_morlhf_trains_on_the_preferred_sum_of_the_scores():
    (columns,) = MORLHF.trainings(torch.tensor([0.25, 0.25, 0.5]))
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, -4.0]])
    assert (scores @ columns).tolist() == [[2.25], [-1.0]]


def test_a_soup_is_the_weighted_sum_of_the_specialists():
    specialists = torch.tensor([[1.0, 0.0], [3.0, 8.0]])
    assert baselines.interpolate(specialists, [3, 1]).tolist() == [1.5, 2.0]


def test_a_soup_at_a_corner_is_that_specialist_bit_for_bit():
    specialists = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(baselines.interpolate(specialists, [0, 1, 0]), specialists[1])


# FSMGDA


def test_fsmgda_trains_on_each_objective_alone():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    trainings = FSMGDA.trainings(torch.full((3,), 1 / 3))
    assert [(scores @ columns).tolist() for columns in trainings] == [[[1.0]], [[2.0]], [[3.0]]]


def fsmgda_server(theta, thetas, held, lr=1.0):
    """FSMGDA's server on uploads thetas [C, M, d]: the next θ and λ."""
    server = Server(lr, {}, np.random.default_rng(0))
    uploads = [Upload(of_client, n, 0.0) for of_client, n in zip(thetas, held, strict=True)]
    server.weights = FSMGDA.client_weights(uploads, server)
    server.mixing = FSMGDA.server_mixing(thetas - theta, server.weights, server)
    return FSMGDA.aggregate(theta, uploads, server), server.mixing


def test_fsmgda_moves_along_the_min_norm_point_of_the_averaged_updates():
    theta = torch.tensor([1.0, 1.0])
    uploads = theta + torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.5]]])
    # averaged updates (2, 0) and (0, 1): λ₁ = 1 / (1 + 2²)
    moved, mixing = fsmgda_server(theta, uploads, [1, 2], lr=0.5)
    assert mixing.tolist() == pytest.approx([0.2, 0.8])
    assert moved.tolist() == pytest.approx([1.2, 1.4])


def test_fsmgdas_step_gains_as_much_for_every_objective_as_its_squared_length():
    theta, uploads = gaussian(30), gaussian(5, 4, 30, seed=1) + 0.5
    moved, mixing = fsmgda_server(theta, uploads, [1] * 5)
    updates, step = uploads.mean(0) - theta, moved - theta
    assert (updates @ step >= step @ step * (1 - 1e-9)).all()  # what singles out the min-norm point
    assert (mixing @ updates - step).abs().max() < 1e-9


def test_an_objective_given_twice_moves_fsmgda_no_further():
    theta, uploads = torch.zeros(20, dtype=torch.float64), gaussian(3, 2, 20)
    twice = uploads[:, [0, 1, 1]]
    moved, mixing = fsmgda_server(theta, uploads, [1] * 3)
    again, mixing_again = fsmgda_server(theta, twice, [1] * 3)
    assert (moved - again).abs().max() < 1e-9
    assert mixing_again.tolist() == pytest.approx((mixing[[0, 1, 1]] / torch.tensor([1, 2, 2])).tolist())


def test_fsmgda_stays_where_no_client_moved():
    theta = torch.randn(6)
    moved, mixing = fsmgda_server(theta, theta.expand(2, 3, 6), [1] * 2)
    assert torch.equal(moved, theta) and mixing.tolist() == pytest.approx([1 / 3] * 3)


# FedCMOO: compression


@pytest.mark.parametrize("M, d", [(2, 200), (3, 101), (5, 7), (1, 1)])
def test_without_loss_the_factors_give_back_the_gradients(M, d):
    A = gaussian(M, d)
    factors = baselines.compress(A, 2.0 * M, np.random.default_rng(0))
    assert (baselines.expand(factors, M, d) - A).abs().max() < 1e-12


@pytest.mark.parametrize("e", [0.5, 1.0, 2.0])
def test_a_compressed_message_has_e_times_d_numbers(e):
    factors = baselines.compress(gaussian(2, 17408), e, np.random.default_rng(0))
    assert sum(factor.numel() for factor in factors.values()) == pytest.approx(e * 17408, rel=0.02)


def test_the_randomised_svd_is_nearly_as_good_as_any_of_its_rank():
    X = gaussian(94, 90)  # a flat spectrum, the hardest
    factors = baselines.factorise(X, 20, np.random.default_rng(0))
    best = np.sqrt((np.linalg.svd(X.numpy(), compute_uv=False)[20:] ** 2).sum())
    assert factors["left"].shape == (94, 20) and factors["right"].shape == (20, 90)
    assert best <= float((X - factors["left"] @ factors["right"]).norm()) < 1.05 * best


def test_what_is_left_out_is_orthogonal_to_what_is_sent():
    X = gaussian(40, 38)
    factors = baselines.factorise(X, 9, np.random.default_rng(0))
    assert ((X - factors["left"] @ factors["right"]) @ factors["right"].T).abs().max() < 1e-12


# FedCMOO: the estimate


@pytest.mark.parametrize("M, d", [(2, 300), (3, 101)])
def test_without_loss_the_estimate_is_the_gram_of_the_mean_gradient(M, d):
    A = gaussian(4, M, d)
    assert relative_error(estimate(A, 2.0 * M), exact_gram(A)) < 1e-9


def test_gradients_of_low_rank_in_a_shared_subspace_are_estimated_exactly():
    M, d = 2, 722  # folded to 38 × 38
    A = torch.stack([(gaussian(38, 5, seed=c) @ gaussian(5, 38, seed=9)).reshape(M, d) for c in range(4)])
    assert relative_error(estimate(A, 1.0), exact_gram(A)) < 1e-9


def matrices(C=4, M=3, d=30, residual=1.0):
    """Any A_c, C_c [C, M, d] and S [M, d]: the formula asks nothing of them."""
    low_rank = gaussian(C, M, d)
    return low_rank + residual * gaussian(C, M, d, seed=1), low_rank, gaussian(M, d, seed=2)


def combined(A, low_rank, S):
    terms = [baselines.gram_terms(*pair, S) for pair in zip(A, low_rank, strict=True)]
    known, residual = (torch.stack(parts) for parts in zip(*terms, strict=True))
    return baselines.mean_gram(known, residual, float(low_rank.square().sum()))


def test_with_nothing_left_out_the_clients_terms_add_up_to_the_exact_gram():
    A, _, _ = matrices()
    assert relative_error(combined(A, A, A.sum(0)), exact_gram(A)) < 1e-12


def test_with_s_exact_the_terms_miss_the_products_of_different_clients_residuals():
    A, low_rank, _ = matrices(residual=0.1)
    D = A - low_rank
    missed = sum(D[c] @ D[b].T for c in range(4) for b in range(4) if b != c) / 16
    assert relative_error(combined(A, low_rank, low_rank.sum(0)) + missed, exact_gram(A)) < 1e-12


def test_large_residuals_are_taken_for_equal_which_is_exact_where_they_are():
    _, low_rank, _ = matrices()
    A = low_rank + gaussian(3, 30, seed=1)
    assert relative_error(combined(A, low_rank, low_rank.sum(0)), exact_gram(A)) < 1e-12


@pytest.mark.parametrize("ratio, extra", [(1.49, True), (1.51, False)])
def test_the_estimate_is_the_papers_formula_on_both_sides_of_the_threshold(ratio, extra):
    A, low_rank, S = matrices()
    D = A - low_rank
    D = D * low_rank.norm() / D.norm() / ratio
    A = low_rank + D
    a, c, r, s = A.transpose(1, 2).numpy(), low_rank.transpose(1, 2).numpy(), D.transpose(1, 2).numpy(), S.T.numpy()
    G = np.zeros((3, 3))  # with one column per objective, as in the paper
    for i in range(4):
        bracket = r[i].T @ (s - c[i])
        middle = c[i].T @ (s - c[i])
        G += a[i].T @ a[i] + (middle + middle.T) / 2 + bracket + bracket.T
        G += 3 * r[i].T @ r[i] if extra else 0.0
    assert np.abs(combined(A, low_rank, S).numpy() - G / 16).max() < 1e-12 * np.abs(G).max()


def test_the_whole_estimate_is_the_formula_with_truncated_svds():
    # Nine directions that all clients share stand far above the rest: there the randomised SVD finds what any SVD does.
    M, d, rank = 2, 722, 9  # folded to 38 × 38
    shared = np.linalg.qr(gaussian(38, rank, seed=9).numpy())[0].T
    a = [gaussian(38, rank, seed=c).numpy() @ shared + 0.01 * gaussian(38, 38, seed=10 + c).numpy() for c in range(4)]

    def truncated(X):
        U, s, V = np.linalg.svd(X.reshape(38, 38))
        return ((U[:, :rank] * s[:rank]) @ V[:rank]).reshape(M, d)

    a = [X.reshape(M, d) for X in a]
    low_rank = [truncated(X) for X in a]
    S, G = truncated(sum(low_rank)), 0.0
    for X, c in zip(a, low_rank, strict=True):
        bracket = (X - c) @ (S - c).T
        G = G + X @ X.T + c @ (S - c).T + bracket + bracket.T
    A = torch.from_numpy(np.stack(a))
    assert relative_error(estimate(A, 1.0), torch.from_numpy(G + G.T) / 2 / 16) < 1e-8


def test_equal_clients_are_estimated_well_though_a_third_of_their_gradients_stays_at_home():
    A = gaussian(1, 2, 17408).expand(8, -1, -1)  # ‖C‖ / ‖D‖ = 1.4: residuals are taken for equal, and they are
    assert relative_error(estimate(A, 1.0), exact_gram(A)) < 0.02


@pytest.mark.parametrize("e, low, high", [(1.0, 2.0, 3.0), (2.0, 0.05, 0.15)])
def test_independent_noise_is_overestimated_up_to_the_threshold_and_hardly_above_it(e, low, high):
    A = gaussian(8, 2, 17408)  # ‖C‖ / ‖D‖ is 1.2 at e = 1 and 2.8 at e = 2
    assert low < relative_error(estimate(A, e), exact_gram(A)) < high


def test_the_estimate_repeats_given_its_random_stream():
    A = gaussian(4, 2, 722)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(estimate(A, 1.0, seed=1), estimate(A, 1.0, seed=1))
    assert not torch.equal(estimate(A, 1.0, seed=1), estimate(A, 1.0, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("C", [2, 4])
def test_the_exchange_is_counted_per_client(C):
    A, server = gaussian(C, 3, 1000).float(), Server(1.0, {}, np.random.default_rng(0), FedCMOOConfig())
    baselines.fedcmoo_weights(A, torch.ones(C), server)
    ledger = server.ledger
    factors = baselines.compress(A[0], 1.0, np.random.default_rng(0))
    payload = 4 * sum(factor.numel() for factor in factors.values())
    assert ledger.bytes["upload/payload"] == ledger.bytes["download/payload"] == payload
    assert ledger.bytes["upload/scalars"] == 8 * 3 * 4  # two symmetric 3 × 3 matrices
    assert ledger.bytes["download/scalars"] == 8 * (1 + 3)  # the client's weight, λ


# FedCMOO: the weights


@pytest.mark.parametrize("M", [2, 4])
def test_in_the_long_run_the_weights_are_the_min_norm_ones(M):
    J = gaussian(4, M, 40) + 0.3
    lam = server_lambda(J, compression=2.0 * M, step=0.1, iterations=5000)
    assert (lam - mgda.solve(mgda.normalise(exact_gram(J)))).abs().max() < 1e-6


def test_clients_count_by_the_prompts_they_hold():
    J, held = gaussian(4, 2, 40), torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    mean = torch.einsum("c,cmd->md", held / held.sum(), J)
    lam = server_lambda(J, held, compression=4.0, step=0.1, iterations=5000)
    assert (lam - mgda.solve(mgda.normalise(mean @ mean.T))).abs().max() < 1e-6


def test_the_codes_constants_go_two_thirds_of_the_way_for_orthogonal_gradients():
    lam = torch.tensor([0.9, 0.1], dtype=torch.float64)
    moved = baselines.descend(lam, 1e4 * torch.eye(2, dtype=torch.float64), FedCMOOConfig())
    assert float(moved[0]) == pytest.approx(0.5 + 0.4 * np.exp(-1), abs=1e-3)


def test_a_gram_is_scaled_by_its_mean_norm():
    G, lam = torch.tensor([[9.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([0.5, 0.5]).double()
    moved = baselines.descend(lam, G, FedCMOOConfig(fedcmoo_iterations=1, fedcmoo_step=0.04))
    # Mean norm (3 + 1)/2 = 2, so G̃λ = (5, 1)/4; on the simplex half the difference counts.
    assert float(moved[0]) == pytest.approx(0.5 - 0.04 * 0.5, abs=1e-5)


def test_the_weights_go_on_from_the_last_round():
    J, state = gaussian(4, 2, 40), {}
    for _ in range(2):
        twice = server_lambda(J, state=state, compression=4.0, iterations=100)
    assert torch.allclose(twice, server_lambda(J, compression=4.0, iterations=200), atol=1e-12)
    assert torch.equal(state["lambda"], twice)


def test_gradients_of_zero_leave_the_weights():
    lam = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert torch.allclose(server_lambda(torch.zeros(4, 2, 50), state={"lambda": lam}), lam, atol=1e-12)
    assert server_lambda(torch.zeros(4, 2, 50)).tolist() == [0.5, 0.5]


def test_a_diagonal_that_the_estimate_made_negative_gives_weights_all_the_same():
    lam = baselines.descend(
        torch.full((2,), 0.5).double(), torch.diag(torch.tensor([-1.0, 1.0])).double(), FedCMOOConfig()
    )
    assert torch.isfinite(lam).all() and float(lam.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_or_gram_that_is_not_finite_is_refused(bad):
    J = gaussian(4, 2, 50)
    J[1, 0, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        server_lambda(J)
    with pytest.raises(ValueError, match="not finite"):
        baselines.descend(torch.ones(1).double(), torch.full((1, 1), bad).double(), FedCMOOConfig())


@pytest.mark.parametrize("name, bad", [
    ("compression", 0.0), ("compression", float("nan")), ("step", -0.1), ("step", float("inf")), ("iterations", 0),
])  # fmt: skip
def test_a_bad_setting_is_refused_by_name(name, bad):
    with pytest.raises(ValueError, match=f"^fedcmoo_{name}: {bad} must be"):
        FedCMOOConfig(**{f"fedcmoo_{name}": bad})


# On the engine


def test_morlhf_uploads_one_adapter_and_fsmgda_one_per_objective():
    firm, morlhf, fsmgda = (federation(method=method).round()["upload/payload"] for method in (FIRM, MORLHF, FSMGDA))
    assert morlhf == firm and fsmgda == 2 * firm


def test_morlhf_at_a_corner_never_looks_at_the_other_objective():
    one, other = (federation(method=MORLHF, preference=[1.0, 0.0]) for _ in range(2))
    other.score = lambda prompts, rollout, holdings: score(prompts, rollout) * torch.tensor([1.0, -3.0])
    metrics = one.round()
    other.round()
    assert torch.equal(one.theta, other.theta)
    assert (metrics["lambda/even"], metrics["lambda/low"]) == (1.0, 0.0)


def test_fsmgda_on_one_objective_given_twice_is_training_on_that_objective():
    twice, once = federation(method=FSMGDA), federation(method=MORLHF, preference=[1.0, 0.0])
    twice.score = lambda prompts, rollout, holdings: score(prompts, rollout)[:, [0, 0]]
    metrics = twice.round()
    once.round()
    assert torch.allclose(twice.theta, once.theta, atol=1e-7)
    assert (metrics["lambda/even"], metrics["lambda/low"]) == (0.5, 0.5)


def test_all_clients_of_fedcmoo_use_one_lambda_in_the_whole_round():
    metrics = federation(method=fedcmoo(step=0.1)).round()
    assert metrics["lambda/disagreement"] < 1e-12
    assert metrics["lambda/even"] != metrics["lambda/low"]


def test_a_restored_fedcmoo_goes_on_bit_for_bit():
    method = fedcmoo(iterations=50)
    whole, resumed = federation(method=method), federation(method=method)
    whole.round()
    tensors, values = federation_state(whole)
    restore_federation(resumed, {name: tensor.clone() for name, tensor in tensors.items()}, values)
    whole.round(), resumed.round()
    assert torch.equal(whole.theta, resumed.theta)
    assert torch.equal(whole.server_state["lambda"], resumed.server_state["lambda"])


# one reward of several


def batch_of(scores):
    from dataclasses import dataclass

    @dataclass
    class Scored:
        scores: torch.Tensor

    return Scored(torch.tensor(scores))


@pytest.mark.parametrize(
    ("method", "expected"), [(baselines.MINIMUM, [[1.0], [-4.0]]), (baselines.MAXIMUM, [[3.0], [4.0]])]
)
def test_the_least_or_the_greatest_reward_of_a_response_is_its_one(method, expected):
    scored = batch_of([[1.0, 2.0, 3.0], [4.0, 0.0, -4.0]])
    assert method.combine(scored, None, {}).scores.tolist() == expected


def upload(held, **rewards):
    return Upload(torch.zeros(1, 3), held, 0.0, rewards)


def test_the_extremes_are_those_of_raw_rewards_on_one_scale():
    for method, extreme in ((baselines.MINIMUM, "amin"), (baselines.MAXIMUM, "amax")):
        built = federation(method=method)
        built.calibration = Calibration(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 10.0]), torch.zeros(2).bool())
        (batch,) = built.prepare(built.clients[:1], responses := built.respond(built.clients[:1], 2))
        combined = method.combine(batch, built.clients[0].trainings[0], {}).scores[:, 0]
        raw = getattr(responses.raw, extreme)(1)
        assert np.corrcoef(combined, raw)[0, 1] == pytest.approx(1, abs=1e-6)


def adapted(state, *uploads, **settings):
    server = Server(1.0, state, np.random.default_rng(0), baselines.AdaptiveConfig(**settings))
    server.weights = torch.tensor([float(u.prompts_held) for u in uploads])
    baselines.adapt_alpha(torch.zeros(3), uploads, server)
    return server


def test_alpha_is_the_softmax_of_how_badly_an_objective_was_served():
    server = adapted({}, upload(1, reward0=0.2, reward1=0.9), upload(3, reward0=0.6, reward1=0.1))
    h = np.array([0.25 * 0.2 + 0.75 * 0.6, 0.25 * 0.9 + 0.75 * 0.1])  # by prompts held
    expected = np.exp((1 - h) / 0.1)
    assert server.state["alpha"].tolist() == pytest.approx(expected / expected.sum())


def test_the_running_mean_takes_its_rate_of_every_round():
    state = {"mean_reward": torch.tensor([0.5, 0.5]).double(), "alpha": torch.tensor([0.5, 0.5]).double()}
    server = adapted(state, upload(1, reward0=0.9, reward1=0.1), adaptive_rate=0.25)
    assert server.state["mean_reward"].tolist() == pytest.approx([0.6, 0.4])


def test_the_adaptive_reward_is_weighed_by_the_servers_alpha_of_the_round_before():
    built = federation(method=baselines.ADAPTIVE)
    first = built.round()
    assert [first[f"lambda/{name}"] for name in built.names] == pytest.approx([0.5, 0.5])
    alpha = built.server_state["alpha"].tolist()
    second = built.round()
    assert [second[f"lambda/{name}"] for name in built.names] == pytest.approx(alpha)
    assert abs(alpha[0] - 0.5) > 1e-3


def test_the_adaptive_method_bills_a_number_per_objective_both_ways():
    plain, adaptive = (federation(method=method).round() for method in (MORLHF, baselines.ADAPTIVE))
    assert adaptive["upload/scalars"] - plain["upload/scalars"] == 8 * 2
    assert adaptive["download/scalars"] - plain["download/scalars"] == 8 * 2


def test_an_adaptive_federation_goes_on_from_its_checkpoint():
    whole, half, other = (federation(method=baselines.ADAPTIVE) for _ in range(3))
    for _ in range(3):
        whole.round()
    half.round()
    restore_federation(other, *federation_state(half))
    other.round(), other.round()
    assert torch.equal(other.theta, whole.theta)


def test_the_adaptive_rewards_are_billed_in_the_order_of_the_clients_objectives():
    one, other = (federation(method=baselines.ADAPTIVE, held=[held] * 3) for held in ([0, 1], [1, 0]))
    for built in (one, other):
        built.round()
    assert other.server_state["alpha"].tolist() == pytest.approx(one.server_state["alpha"].flip(0).tolist())
    lines = [built.round() for built in (one, other)]
    for name in one.names:
        assert lines[1][f"lambda/{name}"] == pytest.approx(lines[0][f"lambda/{name}"])


def test_the_adaptive_method_takes_no_other_aggregation():
    with pytest.raises(ValueError, match="aggregation: adaptive has a server of its own for that"):
        _ = parse(["--method", "adaptive", "--aggregation", "accuracy"])[0].method
