"""The simplex QP, checked against exact rational arithmetic, closed forms, invariances and its own optimality."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import mgda

BETAS = [0.0, 0.01, 1.0, 10.0]


def solution(A, b):
    """The exact x of A x = b, for a regular matrix of fractions, by elimination."""
    rows = [[*row, value] for row, value in zip(A, b, strict=True)]
    for k in range(len(rows)):
        pivot = next(i for i in range(k, len(rows)) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in set(range(len(rows))) - {k}:
            rows[i] = [x - rows[i][k] * y for x, y in zip(rows[i], rows[k], strict=True)]
    return [row[-1] for row in rows]


def exact_weights(J, beta, preference):
    """λ from integers J [M][d], exactly: the best of the faces' own minimisers that are ≥ 0; β = 0 stands for 1e-40."""
    M, p = len(J), [Fraction(x, sum(preference)) for x in preference]
    trace = sum(dot(row, row) for row in J) or 1
    beta = Fraction(beta) or Fraction(1, 10**40)
    H = [[Fraction(2 * dot(J[i], J[j]), trace) + beta * (i == j) for j in range(M)] for i in range(M)]
    points = []
    for size in range(1, M + 1):
        for S in itertools.combinations(range(M), size):
            kkt = [[H[i][j] for j in S] + [1] for i in S] + [[Fraction(1)] * size + [0]]
            *of_face, _ = solution(kkt, [beta * p[i] for i in S] + [1])
            if min(of_face) >= 0:
                points.append([dict(zip(S, of_face, strict=True)).get(j, Fraction(0)) for j in range(M)])
    best = min(points, key=lambda x: dot(x, [dot(row, x) for row in H]) / 2 - beta * dot(p, x))
    return [float(x) for x in best]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def integer_problem(seed, M, decades):
    """Integers J [M][M + 1] of any rank, rows up to 10^decades times longer than others, twins, and p with zeros."""
    rng = np.random.default_rng([M, decades, seed])
    rank = 1 + seed % M
    J = rng.integers(-3, 4, (M, rank)) @ rng.integers(-2, 3, (rank, M + 1))
    exponents = rng.integers(0, decades + 1, M)
    exponents[rng.permutation(M)[:2]] = 0, decades
    J = (J * 10 ** exponents[:, None]).tolist()
    if seed % 3 == 0:
        J[-1] = min(J[:-1], key=lambda row: dot(row, row))  # a twin of the shortest
    p = rng.integers(0, 5, M)
    p[rng.integers(M)] += 1
    return J, p.tolist()


def integer_gram(J):
    return mgda.normalise(torch.tensor([[dot(a, b) for b in J] for a in J], dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("M", [2, 3, 4, 6])
def test_the_weights_are_the_exact_ones(M, decades, beta):
    preference_decides = 0
    for seed in range(4 if M == 6 else 24):
        J, p = integer_problem(seed, M, decades)
        lam = mgda.solve(integer_gram(J), beta, p)
        assert lam.tolist() == pytest.approx(exact_weights(J, beta, p), abs=1e-12)
        preference_decides += bool((lam - mgda.solve(integer_gram(J), beta, [*p[:-1], p[-1] + 3])).abs().max() > 1e-3)
    assert preference_decides >= 4 or M == 6  # at β = 0 too: several weights are minimal there


def residual(G, lam, beta, p):
    """How far λ [M] is from optimal: the Frank–Wolfe gap λᵀ∇f − min_j ∇_j f, which is at least f(λ) − f(λ*)."""
    slope = 2.0 * (G @ lam) + beta * (lam - mgda.preference_vector(p, len(lam)))  # ∇f [M]
    return float(lam @ slope - slope.min())


def random_gram(seed, M):
    """Ĝ of random gradients: plain, of lengths up to 1e4 apart, with twins, with a zero, of low rank."""
    rng = np.random.default_rng([M, seed])
    J = rng.standard_normal((M, 12))
    match seed % 5:
        case 1:
            J *= 10.0 ** rng.uniform(-2, 2, (M, 1))
        case 2:
            J[-1] = J[0] * (1 + 10.0 ** -rng.uniform(0, 6))
        case 3:
            J[-1] = 0.0
        case 4:
            J = rng.standard_normal((M, M // 2)) @ J[: M // 2]
    return mgda.normalise(mgda.gram(torch.from_numpy(J))), torch.from_numpy(rng.dirichlet(np.ones(M)))


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.01, 1.0])
@pytest.mark.parametrize("M", range(2, 9))
def test_the_weights_lie_on_the_simplex_and_are_optimal(M, beta):
    for seed in range(25):
        G, p = random_gram(seed, M)
        lam = mgda.solve(G, beta, p)
        assert lam.min() >= 0.0 and float(lam.sum()) == pytest.approx(1.0, abs=1e-12)
        assert residual(G, lam, beta, p) <= 1e-12


def test_the_residual_is_at_least_the_loss_against_any_other_weights():
    G, p = random_gram(0, 4)
    f = lambda lam: float(lam @ G @ lam + 0.05 * (lam - p).square().sum())  # noqa: E731
    least = f(mgda.solve(G, 0.1, p))
    for lam in torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((50,)):
        assert residual(G, lam, 0.1, p) >= f(lam) - least > 0.0


@pytest.mark.parametrize("beta", BETAS)
def test_permuting_the_objectives_permutes_the_weights(beta):
    for seed in range(30):
        G, p = random_gram(seed, M := 2 + seed % 4)
        order = np.random.default_rng(seed).permutation(M)
        assert torch.allclose(mgda.solve(G[order][:, order], beta, p[order]), mgda.solve(G, beta, p)[order], atol=1e-7)


@pytest.mark.parametrize("largest", [1e-300, 1e-8, 1e8, 1e308])
def test_the_gradients_scale_does_not_matter(largest):
    for seed in range(10):
        G, _ = random_gram(seed, 3)
        assert (mgda.normalise(G / G.max() * largest) - G).abs().max() < 1e-15


@pytest.mark.parametrize("beta", BETAS)
def test_the_closed_form_for_two_objectives_is_the_general_solver(beta):
    for seed in range(50):
        G, p = random_gram(seed, 2)
        assert torch.allclose(mgda._solve_two(G, beta, p), mgda._solve_faces(G, beta, p), atol=1e-9)


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_orthogonal_gradients_of_equal_norm_give_the_hand_computed_weight(beta):
    lam = mgda.solve(torch.eye(2) / 2, beta, [0.8, 0.2])
    assert float(lam[0]) == pytest.approx((0.5 + beta * 0.8) / (1 + beta), abs=1e-12)


@pytest.mark.parametrize("M", [2, 3, 4])
def test_a_huge_beta_gives_the_preference_and_a_tiny_one_the_weights_of_beta_zero(M):
    for seed in range(10):
        G, p = random_gram(5 * seed, M)
        assert torch.allclose(mgda.solve(G, 1e8, p), p, atol=1e-7)
        assert torch.allclose(mgda.solve(G, 1e-8, p), mgda.solve(G, 0.0, p), atol=1e-6)


def test_of_two_gradients_that_nearly_coincide_mgda_takes_the_shorter():
    J = torch.tensor([[1.0 + 1e-8], [1.0]], dtype=torch.float64)
    assert mgda.solve(mgda.normalise(mgda.gram(J))).tolist() == [0.0, 1.0]


def test_at_beta_zero_twins_keep_the_difference_of_their_preferences():
    g, h = torch.tensor([1.0, 0.0, 0.2]), torch.tensor([-0.3, 1.0, 0.0])
    lam = mgda.solve(mgda.normalise(mgda.gram(torch.stack([g, h, g]))), 0.0, [0.5, 0.2, 0.3])
    assert float(lam[0] - lam[2]) == pytest.approx(0.2, abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("M", [1, 2, 3, 8])
def test_gradients_that_are_equal_or_zero_give_the_preference(M, beta):
    p = mgda.preference_vector(range(1, M + 1), M)
    for J in (torch.zeros(M, 7), torch.ones(M, 7)):
        assert torch.allclose(mgda.solve(mgda.normalise(mgda.gram(J)), beta, p), p, atol=1e-12)


@pytest.mark.parametrize("M", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_weights_move_at_most_two_over_beta_times_the_gram(M, beta):
    for seed in range(200):
        rng = np.random.default_rng([M, seed])
        J = torch.from_numpy(rng.standard_normal((M, 6)))
        if seed % 2:
            J[1] = J[0] * (1 + rng.uniform(0, 0.1) * beta)
        moved = J + torch.from_numpy(rng.standard_normal(J.shape)) * 0.01 * beta * rng.uniform()
        G, H = (mgda.normalise(mgda.gram(j)) for j in (J, moved))
        change = float((mgda.solve(G, beta) - mgda.solve(H, beta)).norm())
        assert change <= 2 / beta * float(torch.linalg.matrix_norm(G - H, 2))


def test_the_lipschitz_bound_is_nearly_tight_for_parallel_gradients():
    beta, epsilon, g = 0.01, 1e-4, torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    G, H = (mgda.normalise(mgda.gram(torch.cat([g, (1 + e) * g]))) for e in (0.0, epsilon))
    share = float((mgda.solve(G, beta) - mgda.solve(H, beta)).norm() / (2 / beta * torch.linalg.matrix_norm(G - H, 2)))
    assert 0.65 < share < 0.75


def test_with_a_preference_beta_can_part_clients_that_agree_without_it():
    # Equal norms, so MGDA says ½ to both; then β moves each by its own share β / (D + β), here of D = 1 and D = 0.2.
    far, near = torch.tensor([[0.5, 0.0], [0.0, 0.5]]), torch.tensor([[0.5, 0.4], [0.4, 0.5]])
    assert [float(mgda.solve(G, 0.0, [0, 1])[0]) for G in (far, near)] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [float(mgda.solve(G, 0.5, [0, 1])[0]) for G in (far, near)] == pytest.approx([1 / 3, 1 / 7], abs=1e-6)


def test_mgdas_direction_descends_every_objective_or_is_zero():
    J = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = mgda.solve(mgda.normalise(mgda.gram(J))) @ J
    assert (J @ direction >= float(direction @ direction) - 1e-9).all() and float(direction @ direction) > 0.1
    opposed = torch.tensor([[2.0, 1.0], [-4.0, -2.0]]).double()
    assert (mgda.solve(mgda.normalise(mgda.gram(opposed))) @ opposed).norm() < 1e-12


@pytest.mark.parametrize("columns", [1, 7, 1000, 10**6])
def test_the_gram_of_float32_gradients_is_summed_in_float64(monkeypatch, columns):
    monkeypatch.setattr(mgda, "COLUMNS", columns)
    J = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 1e3
    rows = J.double().tolist()
    exact = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    assert (mgda.gram(J) - torch.tensor(exact, dtype=torch.float64)).abs().max() <= 1e-12 * max(map(max, exact))


def test_the_projection_on_the_simplex_satisfies_its_optimality_conditions():
    for seed in range(100):
        v = torch.from_numpy(np.random.default_rng(seed).standard_normal(1 + seed % 10) * 10.0 ** (seed % 4))
        x = mgda.project_simplex(v)
        assert x.min() >= 0 and float(x.sum()) == pytest.approx(1.0, abs=1e-9)
        threshold = (v - x)[x > 0]  # KKT: v − x is one constant if x > 0, and v lies below it elsewhere
        assert float(threshold.max() - threshold.min()) < 1e-9 and (v[x == 0] <= threshold.max() + 1e-9).all()


@pytest.mark.parametrize("bad", [[1.0], [0.5, -0.5], [0.0, 0.0], [float("nan"), 1.0], [1e308, 1e308]])
def test_a_bad_preference_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="preference"):
        mgda.solve(torch.eye(2) / 2, 0.01, bad)


@pytest.mark.parametrize(
    "beta, M, name", [(-0.1, 2, "beta"), (math.nan, 2, "beta"), (math.inf, 2, "beta"), (0.1, 9, "9")]
)
def test_a_bad_beta_and_too_many_objectives_are_refused(beta, M, name):
    with pytest.raises(ValueError, match=name):
        mgda.solve(torch.eye(M) / M, beta)


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        mgda.normalise(mgda.gram(torch.tensor([[1.0, float("inf")], [0.0, 1.0]])))
