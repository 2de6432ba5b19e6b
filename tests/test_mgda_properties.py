"""The simplex QP on random problems: well- and ill-conditioned, singular, badly scaled."""

import numpy as np
import pytest
import torch

import mgda

hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis (requirements-dev.txt)")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile("firm", deadline=None, derandomize=True)
settings.load_profile("firm")


@st.composite
def problems(draw, least=2, most=8):
    """(Ĝ, β, p): well- and ill-conditioned, singular, with twins, over twelve decades of scale, p with a zero."""
    M = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    J = rng.standard_normal((M, draw(st.integers(1, 12))))
    shape = draw(st.sampled_from(["plain", "scaled", "twins", "one zero", "scaled and opposed"]))
    if shape == "scaled and opposed":
        J[-1] = -J[0]
    if shape in ("scaled", "scaled and opposed"):
        J *= 10.0 ** rng.uniform(-6, 6, (M, 1))
    if shape == "twins":
        J[-1] = J[0] * (1 + 10.0 ** -rng.uniform(0, 14))
    if shape == "one zero":
        J[-1] = 0.0
    beta = draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.01, 0.1, 1.0, 10.0]))
    p = rng.dirichlet(np.ones(M))
    p[draw(st.integers(0, M - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return mgda.normalise(mgda.gram(torch.from_numpy(J))), beta, torch.from_numpy(p / p.sum())


@given(problems())
@settings(max_examples=400)
def test_the_solution_lies_on_the_simplex_and_its_residual_is_below_1e_8(problem):
    G, beta, p = problem
    lam = mgda.solve(G, beta, p)
    assert lam.min() >= 0.0 and abs(float(lam.sum()) - 1.0) < 1e-12
    assert mgda.residual(G, lam, beta, p) <= 1e-8


@given(problems())
@settings(max_examples=400)
def test_no_gradient_however_short_pulls_by_more_than_rounding_of_its_own_length(problem):
    G, beta, p = problem
    lam = mgda.solve(G, beta, p)
    slope, length = mgda.gradient(G, lam, beta, p), (2 * G.diagonal() + beta).sqrt()
    assert bool((lam @ slope - slope <= 1e-7 * length * (length @ lam) + 1e-30).all())


@given(problems())
@settings(max_examples=100)
def test_a_huge_beta_gives_the_preference(problem):
    G, _, p = problem
    assert (mgda.solve(G, 1e8, p) - p).abs().max() < 1e-6


@given(problems(least=3))
@settings(max_examples=100)
def test_at_beta_zero_no_other_minimiser_is_nearer_to_the_preference(problem):
    G, _, p = problem
    limit, near = mgda.solve(G, 0.0, p), mgda.solve(G, 1e-7, p)
    # If a nearer minimiser existed, β > 0 would find it: f(λ_β) ≤ f(λ) for both, so ‖λ_0 − p‖ ≥ ‖λ_β − p‖ always.
    tied = float(near @ G @ near) - float(limit @ G @ limit) <= 1e-15
    assert not tied or (limit - p).norm() <= (near - p).norm() + 1e-4


@given(problems(), st.floats(-150, 150))
@settings(max_examples=100)
def test_normalisation_makes_the_weights_independent_of_the_gradients_scale(problem, exponent):
    G, beta, p = problem
    again = mgda.normalise(G * 10.0**exponent)
    assert (again - G).abs().max() < 1e-12
    assert (mgda.solve(again, max(beta, 1e-3), p) - mgda.solve(G, max(beta, 1e-3), p)).abs().max() < 1e-8


@given(problems(least=3), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_permuting_the_objectives_permutes_the_weights(problem, random):
    G, beta, p = problem
    beta = max(beta, 1e-3)
    order = list(range(len(p)))
    random.shuffle(order)
    assert (mgda.solve(G[order][:, order], beta, p[order]) - mgda.solve(G, beta, p)[order]).abs().max() < 1e-9


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=10))
@settings(max_examples=200)
def test_the_projection_satisfies_its_optimality_conditions(values):
    v = torch.tensor(values, dtype=torch.float64)
    x = mgda.project_simplex(v)
    scale = float(v.abs().max()) + 1.0
    assert x.min() >= 0 and abs(float(x.sum()) - 1) < 1e-9 * scale
    threshold = (v - x)[x > 0]  # KKT: v − x is one constant where x > 0, and v lies below it elsewhere
    assert float(threshold.max() - threshold.min()) < 1e-9 * scale
    assert bool((v[x == 0] <= threshold.max() + 1e-9 * scale).all())
