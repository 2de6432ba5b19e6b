"""The simplex QP, checked against SciPy, TorchJD, exact rational arithmetic, closed forms and its own optimality."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import mgda


@pytest.mark.parametrize("M", [2, 3, 5, 8])
@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
def test_the_solution_is_as_good_as_scipys_slsqp(M, beta):
    optimize = pytest.importorskip("scipy.optimize", reason="parity needs scipy (requirements-dev.txt)")
    for seed in range(10):
        rng = np.random.default_rng([M, seed])
        G = mgda.normalise(mgda.gram(torch.from_numpy(rng.standard_normal((M, 20)) + 0.3))).numpy()
        p = rng.dirichlet(np.ones(M))

        def objective(lam, G=G, p=p):
            return lam @ G @ lam + beta / 2 * ((lam - p) ** 2).sum()

        found = optimize.minimize(
            objective, p, method="SLSQP", bounds=[(0, 1)] * M, options={"ftol": 1e-15, "maxiter": 500},
            jac=lambda lam, G=G, p=p: 2 * G @ lam + beta * (lam - p),
            constraints={"type": "eq", "fun": lambda lam: lam.sum() - 1, "jac": lambda lam: np.ones_like(lam)},
        )  # fmt: skip
        ours = mgda.solve(torch.from_numpy(G), beta, p).numpy()
        assert objective(ours) <= found.fun + 1e-12
        assert np.abs(ours - found.x).max() < 1e-5


@pytest.mark.parametrize("M", [2, 3, 4])
def test_mgda_gives_torchjds_combined_gradient(M):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="parity needs torchjd (requirements-dev.txt)")
    J = torch.randn(M, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(M)) + 0.2
    theirs = aggregation.MGDA(epsilon=1e-12, max_iters=200_000)(J)
    ours = mgda.solve(mgda.normalise(mgda.gram(J)), 0.0) @ J
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def solution(A, b):
    """One exact solution x of A x = b, by elimination over the rationals; None where there is none."""
    rows, pivots = [[*row, value] for row, value in zip(A, b, strict=True)], []
    for column in range(len(A[0])):
        k = next((i for i in range(len(pivots), len(rows)) if rows[i][column]), None)
        if k is None:
            continue
        rows[k], rows[len(pivots)] = rows[len(pivots)], rows[k]
        pivot = [x / rows[len(pivots)][column] for x in rows[len(pivots)]]
        rows = [[x - row[column] * y for x, y in zip(row, pivot, strict=True)] if row[column] else row for row in rows]
        rows[len(pivots)] = pivot
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    x = [Fraction(0)] * len(A[0])
    for row, column in zip(rows, pivots, strict=False):
        x[column] = row[-1]
    return x


def best_of_all_faces(Q, c, E, e):
    """The exact minimiser of ½xᵀQx − cᵀx over x ≥ 0, E x = e: the best of the faces' own minimisers that are ≥ 0.

    Where a face has many, a smaller face has one of them that is ≥ 0, if there is any.
    """
    M, best = len(c), None
    for size in range(1, M + 1):
        for S in itertools.combinations(range(M), size):
            kkt = [[Q[i][j] for j in S] + [row[i] for row in E] for i in S]
            kkt += [[row[j] for j in S] + [Fraction(0)] * len(E) for row in E]
            found = solution(kkt, [c[i] for i in S] + e)
            if found is None or min(found[:size]) < 0:
                continue
            x = [dict(zip(S, found[:size], strict=True)).get(j, Fraction(0)) for j in range(M)]
            value = dot(x, [dot(row, x) for row in Q]) / 2 - dot(c, x)
            if best is None or value < best[0]:
                best = (value, x)
    return best[1]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def exact_weights(J, beta, preference):
    """(Ĝ, λ), both exact, from integers J [M][d]; at β = 0 of all minimisers the one nearest p."""
    M, p = len(J), [Fraction(x, sum(preference)) for x in preference]
    trace = sum(dot(row, row) for row in J) or 1
    G = [[Fraction(dot(a, b), trace) for b in J] for a in J]
    unit, beta = [[Fraction(i == j) for j in range(M)] for i in range(M)], Fraction(beta)
    H = [[2 * G[i][j] + beta * unit[i][j] for j in range(M)] for i in range(M)]
    lam = best_of_all_faces(H, [beta * x for x in p], [[Fraction(1)] * M], [Fraction(1)])
    if beta == 0:  # every minimiser has this Ĝλ
        same = [*G, [Fraction(1)] * M]
        lam = best_of_all_faces(unit, p, same, [dot(row, lam) for row in same])
    return G, lam


def integer_problem(seed, M, decades, rank=None):
    """Integers J [M][M + 1] of at most that rank, rows up to 10^decades times longer than others, and p with zeros."""
    rng = np.random.default_rng([M, decades, seed])
    rank = int(rng.integers(1, M + 1)) if rank is None else rank
    J = rng.integers(-3, 4, (M, rank)) @ rng.integers(-2, 3, (rank, M + 1))
    exponents = rng.integers(0, decades + 1, M)
    exponents[rng.permutation(M)[:2]] = 0, decades
    J = [[int(x) * 10 ** int(k) for x in row] for row, k in zip(J, exponents, strict=True)]
    if seed % 3 == 0:
        J[-1] = min(J[:-1], key=lambda row: dot(row, row))  # a twin of the shortest
    p = rng.integers(0, 5, M)
    p[rng.integers(M)] += 1
    return J, [int(x) for x in p]


def float_gram(J):
    return mgda.normalise(torch.tensor([[dot(a, b) for b in J] for a in J], dtype=torch.float64))


def excess(G, lam, best):
    """How far λᵀĜλ lies above its minimum, as a share of the minimum unless that is zero."""
    lam = [Fraction(x) for x in lam.tolist()]
    value, least = (dot(x, [dot(row, x) for row in G]) for x in ([x / sum(lam) for x in lam], best))
    return float((value - least) / (least or 1))


def test_a_long_gradient_does_not_hide_the_short_ones():
    J = [[0, -1, 0], [2, 2, 1], [100_000, 300_000, 100_000]]
    G, best = exact_weights(J, 0, [1, 1, 1])
    lam = mgda.solve(float_gram(J), 0.0)
    assert excess(G, lam, best) < 1e-9
    assert lam.tolist() == pytest.approx([0.9999973, 0.0, 2.7e-6], abs=1e-7)


@pytest.mark.parametrize("decades", [0, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("M", [3, 4])
def test_mgda_finds_the_exact_minimum_however_unequal_the_gradients(M, decades):
    for seed in range(60 // M):
        J, p = integer_problem(seed, M, decades)
        G, best = exact_weights(J, 0, p)
        assert excess(G, mgda.solve(float_gram(J), 0.0, p), best) < 1e-10


@pytest.mark.parametrize("decades", [0, 2, 4, 6])
@pytest.mark.parametrize("M", [3, 4])
def test_at_beta_zero_the_minimiser_nearest_the_preference_is_found_exactly(M, decades):
    several = 0
    for seed in range(60 // M):
        J, p = integer_problem(seed, M, decades, rank=1 + seed % (M - 1))
        _, best = exact_weights(J, 0, p)
        G = float_gram(J)
        lam = mgda.solve(G, 0.0, p)
        assert lam.tolist() == pytest.approx([float(x) for x in best], abs=1e-6)
        several += bool((lam - mgda.solve(G, 0.0, [*p[:-1], p[-1] + 3])).abs().max() > 1e-3)
    assert several >= 4  # else nearness decided nothing


@pytest.mark.parametrize("beta", [1e-6, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("M", [3, 4])
def test_with_beta_the_weights_are_the_exact_ones(M, beta):
    for decades, seed in itertools.product([0, 2, 4, 6], range(5)):
        J, p = integer_problem(seed, M, decades)
        _, best = exact_weights(J, beta, p)
        assert mgda.solve(float_gram(J), beta, p).tolist() == pytest.approx([float(x) for x in best], abs=1e-8)


@pytest.mark.parametrize("M, beta", [(6, 0.0), (6, 0.01), (8, 0.01)])
def test_more_objectives_are_solved_exactly_too(M, beta):
    for seed, decades in enumerate([0, 6]):
        J, p = integer_problem(seed, M, decades, rank=M)
        _, best = exact_weights(J, beta, p)
        assert mgda.solve(float_gram(J), beta, p).tolist() == pytest.approx([float(x) for x in best], abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("decades", [0, 2, 4, 6])
def test_for_two_objectives_both_solvers_give_the_exact_weights(decades, beta):
    for seed in range(20):
        J, preference = integer_problem(seed, 2, decades)
        _, best = exact_weights(J, beta, preference)
        G, p = float_gram(J), mgda.preference_vector(preference, 2)
        for solver in (mgda._solve_two, mgda._solve_any):
            assert solver(G, beta, p).tolist() == pytest.approx([float(x) for x in best], abs=1e-9)


def test_projected_gradient_alone_reaches_the_minimiser_of_an_ordinary_gram(monkeypatch):
    monkeypatch.setattr(mgda, "STEPS", 500)
    for M in (3, 4, 8):
        J = torch.randn(M, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(M))
        G, p = mgda.normalise(mgda.gram(J)), mgda.preference_vector(None, M)
        for beta in (0.0, 0.01, 1.0):
            assert mgda.residual(G, mgda._projected_gradient(G, beta, p), beta, p) < 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
def test_the_closed_form_for_two_objectives_is_the_general_solver(beta):
    for seed in range(20):
        J = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        G, p = mgda.normalise(mgda.gram(J)), torch.tensor([0.3, 0.7], dtype=torch.float64)
        assert (mgda._solve_two(G, beta, p) - mgda._solve_any(G, beta, p)).abs().max() < 1e-9


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_orthogonal_gradients_of_equal_norm_give_the_hand_computed_weight(beta):
    lam = mgda.solve(torch.eye(2) / 2, beta, [0.8, 0.2])
    assert float(lam[0]) == pytest.approx((0.5 + beta * 0.8) / (1 + beta), abs=1e-12)


def test_beta_zero_is_the_limit_from_above_where_gradients_coincide():
    g, h = torch.tensor([1.0, 0.0, 0.2]), torch.tensor([-0.3, 1.0, 0.0])
    G, p = (mgda.normalise(mgda.gram(torch.stack([g, h, g]))), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64))
    limit = mgda.solve(G, 0.0, p)
    near = mgda.solve(G, 1e-6, p)
    assert (limit - near).abs().max() < 1e-5
    assert float(limit[0] - limit[2]) == pytest.approx(0.2, abs=1e-9)  # the twins keep p's difference


def test_equal_gradients_without_regularisation_leave_the_preference():
    assert torch.equal(mgda.solve(torch.ones(2, 2) / 2, 0.0, [0.25, 0.75]), torch.tensor([0.25, 0.75]).double())


@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_gradients_of_zero_give_the_preference(M, beta):
    p = torch.arange(1.0, M + 1).double() / sum(range(1, M + 1))
    G = mgda.normalise(mgda.gram(torch.zeros(M, 7)))
    assert torch.allclose(mgda.solve(G, beta, p), p, atol=1e-12)


@pytest.mark.parametrize("M", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_weights_move_at_most_two_over_beta_times_the_gram(M, beta):
    largest = 0.0
    for seed in range(200):
        rng = np.random.default_rng([M, seed])
        J = torch.from_numpy(rng.standard_normal((M, 6)))
        if seed % 2:
            J[1] = J[0] * (1 + rng.uniform(0, 0.1) * beta)
        moved = J + torch.from_numpy(rng.standard_normal(J.shape)) * 0.01 * beta * rng.uniform()
        G, H = (mgda.normalise(mgda.gram(j)) for j in (J, moved))
        distance = float(torch.linalg.matrix_norm(G - H, 2))
        assert distance < 0.05 * beta or seed % 2 == 0  # where the bound says something
        change = float((mgda.solve(G, beta) - mgda.solve(H, beta)).norm())
        largest = max(largest, change / (2 / beta * distance))
    assert 0.0 < largest <= 1.0


def test_with_a_preference_beta_can_part_clients_that_agree_without_it():
    # Equal norms, so MGDA says ½ to both; then β moves each by its own share β / (D + β), here of D = 1 and D = 0.2.
    far, near = torch.tensor([[0.5, 0.0], [0.0, 0.5]]), torch.tensor([[0.5, 0.4], [0.4, 0.5]])
    assert [float(mgda.solve(G, 0.0, [0, 1])[0]) for G in (far, near)] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [float(mgda.solve(G, 0.5, [0, 1])[0]) for G in (far, near)] == pytest.approx([1 / 3, 1 / 7], abs=1e-6)


def test_the_lipschitz_bound_is_nearly_tight_for_parallel_gradients():
    beta, epsilon = 0.01, 1e-4
    g = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    G, H = (mgda.normalise(mgda.gram(torch.cat([g, (1 + e) * g]))) for e in (0.0, epsilon))
    share = float((mgda.solve(G, beta) - mgda.solve(H, beta)).norm() / (2 / beta * torch.linalg.matrix_norm(G - H, 2)))
    assert 0.65 < share < 0.75


def test_mgdas_direction_descends_every_objective():
    J = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = mgda.solve(mgda.normalise(mgda.gram(J)), 0.0) @ J
    assert bool((J @ direction >= float(direction @ direction) - 1e-9).all())


def stationarity(J):
    """‖Jᵀλ‖² / Σ‖g_j‖² at MGDA's λ: 0 exactly where no step is good for every objective."""
    Ghat = mgda.normalise(mgda.gram(J))
    lam = mgda.solve(Ghat)
    return float(lam @ Ghat @ lam)


def test_opposed_gradients_are_pareto_stationary():
    J = torch.tensor([[2.0, 1.0], [-4.0, -2.0]])
    assert stationarity(J) < 1e-12


def test_orthogonal_gradients_are_as_far_from_stationary_as_two_can_be():
    assert stationarity(torch.eye(2).double()) == pytest.approx(0.25)


def test_the_gram_of_float32_gradients_is_summed_in_float64():
    J = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 1e3
    rows = J.double().tolist()
    exact = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    assert (mgda.gram(J) - torch.tensor(exact, dtype=torch.float64)).abs().max() <= 1e-12 * max(map(max, exact))


def halves_of(signal, noise, rng):
    """Two half-batch gradients [2, M, d] that add up to `signal` plus independent noise of that deviation in each."""
    return signal / 2 + noise * torch.from_numpy(rng.standard_normal((2, *signal.shape)))


def naive_cross(halves):
    a, b = halves.numpy()
    return torch.from_numpy(2 * (np.einsum("id,jd->ij", a, b) + np.einsum("id,jd->ij", b, a)))


@pytest.mark.parametrize("M", [1, 2, 3])
def test_the_cross_gram_is_the_symmetrised_product_of_the_halves_where_that_is_semidefinite(M):
    halves = halves_of(3 * torch.eye(M, 20, dtype=torch.float64), 0.1, np.random.default_rng(M))
    naive = naive_cross(halves)
    assert np.linalg.eigvalsh(naive.numpy()).min() > 1
    assert (mgda.cross_gram(halves) - naive).abs().max() < 1e-12


def test_halves_that_see_the_same_gradient_have_the_gram_of_their_sum():
    half = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 20)))
    assert (mgda.cross_gram(torch.stack([half, half])) - mgda.gram(2 * half)).abs().max() < 1e-12


@pytest.mark.parametrize("M", [1, 2, 3])
def test_the_cross_gram_is_the_semidefinite_matrix_nearest_to_the_product(M):
    rng, cut = np.random.default_rng(M), 0
    for _ in range(50):
        halves = halves_of(torch.zeros(M, 20, dtype=torch.float64), 1.0, rng)  # nothing but noise
        naive, ours = naive_cross(halves), mgda.cross_gram(halves)
        added = ours - naive
        assert torch.equal(ours, ours.T) or (ours - ours.T).abs().max() < 1e-12
        # Moreau: a point and its projection on a cone. Both parts are semidefinite, and they are orthogonal.
        assert min(np.linalg.eigvalsh(ours.numpy()).min(), np.linalg.eigvalsh(added.numpy()).min()) > -1e-11
        assert abs(float((ours * added).sum())) < 1e-9
        cut += bool(added.abs().max() > 1e-6)
    assert cut > 10  # else nothing was cut


def test_noise_raises_the_diagonal_of_the_gram_and_not_that_of_the_cross_gram():
    M, d, noise, draws, rng = 2, 50, 1.0, 1000, np.random.default_rng(0)
    signal = 20 * torch.eye(M, d, dtype=torch.float64)
    one, two = [], []
    for _ in range(draws):
        halves = halves_of(signal, noise, rng)
        assert np.linalg.eigvalsh(naive_cross(halves).numpy()).min() > 0  # so no eigenvalue is cut
        one.append(mgda.gram(halves.sum(0)))
        two.append(mgda.cross_gram(halves))
    one, two = torch.stack(one), torch.stack(two)
    error = 4 * two.std(0).max() / math.sqrt(draws)  # four standard errors of the mean, about 8
    assert (two.mean(0) - signal @ signal.T).abs().max() < error < 10
    # The squared norm of the sum of two noises is 2 d σ² = 100.
    assert (one.mean(0) - signal @ signal.T - 2 * d * noise**2 * torch.eye(M)).abs().max() < error


def test_the_products_of_float32_halves_are_summed_in_float64():
    halves = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)) * 1e3
    halves[1] += 2 * halves[0]  # far from where eigenvalues are cut
    naive = naive_cross(halves.double())
    assert (mgda.cross_gram(halves) - naive).abs().max() <= 1e-12 * naive.abs().max()


@pytest.mark.parametrize("bad", [[1.0], [0.5, -0.5], [0.0, 0.0], [float("nan"), 1.0]])
def test_a_bad_preference_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="preference"):
        mgda.solve(torch.eye(2) / 2, 0.01, bad)


def test_a_preference_is_normalised():
    assert torch.equal(mgda.preference_vector([1, 3], 2), torch.tensor([0.25, 0.75]).double())


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_a_bad_beta_is_refused_by_name(beta):
    with pytest.raises(ValueError, match="beta"):
        mgda.solve(torch.eye(2) / 2, beta)


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        mgda.normalise(mgda.gram(torch.tensor([[1.0, float("inf")], [0.0, 1.0]])))


@pytest.mark.parametrize("columns", [1, 7, 50, 10**6])
def test_a_gram_summed_over_pieces_of_columns_and_rows_is_the_whole_one(monkeypatch, columns):
    monkeypatch.setattr(mgda, "COLUMNS", columns)
    J = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    expected = J.double() @ J.double().T
    assert (mgda.gram(J) - expected).abs().max() < 1e-12
    assert (mgda.gram([J[:2], J[2:3], J[3:]]) - expected).abs().max() < 1e-12
