"""The simplex QP: which weights λ make one step good for every objective at once.

Stack the M objective gradients as rows, J [M, d]. Their Gram matrix G = J Jᵀ holds every inner product
⟨g_i, g_j⟩ and is all that the weights depend on. FIRM solves, on every client and before every step,

    λ* = argmin_{λ ∈ simplex}  λᵀ Ĝ λ + (β/2) ‖λ − p‖²,        Ĝ = G / tr(G).

β = 0 is MGDA: Jᵀλ* is then the shortest vector in the convex hull of the gradients. Its negative descends every
objective to first order, or it is zero, and then no direction does: θ is Pareto-stationary (Désidéri 2012). β → ∞ is
fixed weights p. In between, β > 0 makes λ* a Lipschitz function of the normalised Gram,
‖λ*(G) − λ*(G′)‖ ≤ (2/β) ‖Ĝ − Ĝ′‖₂, so clients that see almost the same gradients choose almost the same weights:
that is the paper's cure for "client disagreement drift".

[paper] the Gram, the trace normalisation, the regularised QP.
[ours]  the factor ½, the preference p as the centre of the regulariser (uniform p is exactly plain ‖λ‖², since
        ‖λ − 1/M‖² = ‖λ‖² − 1/M on the simplex), β = 0 as the limit β → 0⁺ (the minimiser nearest p), the solver
        (a primal active-set method, exact after finitely many steps; projected gradient stalls on
        ill-conditioned Grams).

What the guarantee is not: it is Euclidean and first-order. Adam preconditions the step, so common descent is not
assured; `diagnostics.first_order_gain` measures what really happened. And β = 0.01 is small: with
D = ‖g₁ − g₂‖² / tr G, M = 2 and away from the clip, β moves λ by the share β/(D + β) of its way to p. That is half the
way at D = 0.01, gradients that nearly coincide, and 1 % of it at D = 1, orthogonal ones.

Everything is float64, and on the CPU but for the products in `gram`; M is small, so that a QP costs far less than one
row of J.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 2**20  # of J, as float64 at once
LIMIT_BETA = 1e-9  # stands for "β → 0⁺" while the active face is being found
LIMIT_RESIDUAL = 1e-10  # the limit itself is then taken on that face if its residual is no larger


def gram(J: Tensor | Sequence[Tensor]) -> Tensor:
    """Gram matrix of the objective gradients.

    J [M, d], any float type and device, or several such below each other, which are never put together in memory.
    Returns G [M, M] in float64 on the CPU, G_ij = ⟨g_i, g_j⟩, summed in float64. [paper]
    """
    pieces = [J] if isinstance(J, Tensor) else list(J)
    if any(piece.dim() != 2 for piece in pieces):
        raise ValueError(f"gram: J must be [M, d], got shape {[tuple(piece.shape) for piece in pieces]}")
    M = sum(len(piece) for piece in pieces)
    G = torch.zeros(M, M, dtype=torch.float64, device=pieces[0].device)
    for parts in zip(*(piece.detach().split(COLUMNS, 1) for piece in pieces), strict=True):
        columns = torch.cat([part.double() for part in parts])  # [M, at most COLUMNS]
        G += columns @ columns.T
    return G.cpu()


def cross_gram(halves: Tensor) -> Tensor:
    """The Gram matrix from two independent half-batches: 2 (J_a J_bᵀ + J_b J_aᵀ), its negative eigenvalues cut off.

    halves [2, M, d] add up to J, so each is about ½J, and J_a J_bᵀ about ¼G. The diagonal of `gram` counts the squared
    noise of a batch as if it were gradient; products across independent halves do not. They may be indefinite, though,
    and the QP must be convex. [ours]
    """
    a, b = halves
    both = gram(torch.cat([a, b]))[: len(a), len(a) :]  # J_a J_bᵀ [M, M]
    return positive_part(2.0 * (both + both.T))


def positive_part(G: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix to a symmetric G [M, M]: negative eigenvalues become 0."""
    values, vectors = torch.linalg.eigh(G)
    return (vectors * values.clamp_min(0.0)) @ vectors.T


def normalise(G: Tensor) -> Tensor:
    """Ĝ = G / tr(G) [M, M]: β then means the same for large and for small gradients. [paper]

    tr(G) = 0 (every gradient is zero) gives the zero matrix, for which λ* = p. [ours]
    Raises ValueError where G is not finite.
    """
    G = G.double()
    if not torch.isfinite(G).all():
        raise ValueError("normalise: the Gram matrix is not finite; a gradient has overflowed or is NaN")
    largest = G.diagonal().max()
    if largest <= 0:
        return torch.zeros_like(G)
    G = G / largest  # first by the largest entry: the trace of huge gradients must not overflow
    return G / G.trace()


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of v [M] onto {λ : λ ≥ 0, Σλ = 1}, by sorting (Held et al. 1974; Duchi et al. 2008)."""
    u = v.sort(descending=True).values
    excess = (u.cumsum(0) - 1.0) / torch.arange(1, v.numel() + 1, dtype=v.dtype)  # threshold if k survive
    threshold = excess[int((u > excess).sum()) - 1]
    return (v - threshold).clamp_min(0.0)


def preference_vector(preference: Sequence[float] | Tensor | None, M: int) -> Tensor:
    """p [M] in float64, normalised to sum 1; None is uniform.

    Raises ValueError for a wrong length, a negative or non-finite entry, or a sum of zero.
    """
    if preference is None:
        return torch.full((M,), 1.0 / M, dtype=torch.float64)
    p = torch.as_tensor(preference, dtype=torch.float64).flatten()
    if p.numel() != M:
        raise ValueError(f"preference: {p.numel()} values for {M} objectives; give one per objective")
    if not torch.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise ValueError(f"preference: {p.tolist()} must be non-negative numbers that are not all zero")
    return p / p.sum()


def solve(Ghat: Tensor, beta: float = 0.0, preference: Sequence[float] | Tensor | None = None) -> Tensor:
    """λ* = argmin over the simplex of λᵀĜλ + (β/2)‖λ − p‖².

    Ghat [M, M] symmetric positive semidefinite (normally from `normalise`), β ≥ 0, preference [M] or None for
    uniform. Returns λ [M] in float64 with `residual` ≤ 1e-8 at Gram entries of order one. β = 0 is the limit
    from above: of all minimisers the one nearest p.
    Raises ValueError for β < 0 or non-finite, a non-finite or non-square Gram, or a bad preference.
    """
    Ghat = torch.as_tensor(Ghat, dtype=torch.float64)
    if Ghat.dim() != 2 or Ghat.shape[0] != Ghat.shape[1] or not all(map(math.isfinite, Ghat.flatten().tolist())):
        raise ValueError(f"solve: the Gram matrix must be square and finite, got {Ghat.tolist()}")
    if not 0.0 <= beta < float("inf"):
        raise ValueError(f"beta: {beta} must be a finite number >= 0")
    p = preference_vector(preference, Ghat.shape[0])
    if Ghat.shape[0] == 2:
        return _solve_two(Ghat, beta, p)
    return _solve_any(Ghat, beta, p)


def _solve_two(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """M = 2 by hand [ours]: λ₁ = clip((c − b + β p₁) / (a − 2b + c + β), 0, 1) and p₁ where the denominator is 0."""
    (a, b), (_, c) = Ghat.tolist()
    numerator = c - b + beta * p[0].item()  # ⟨g₂, g₂ − g₁⟩ + β p₁ in normalised units
    denominator = a - 2.0 * b + c + beta  # ‖g₁ − g₂‖² + β
    rounding = 1e-15 * (a + c)  # below it the denominator is noise, and the numerator alone decides
    if denominator <= rounding:
        # A slope below 1e-12 is noise as well: equal gradients, β = 0, every λ is optimal, and p the nearest.
        if abs(numerator) <= 1e3 * rounding:
            return p.clone()
        first = float(numerator > 0.0)
    else:
        first = min(max(numerator / denominator, 0.0), 1.0)
    return torch.tensor([first, 1.0 - first], dtype=torch.float64)


def gradient(Ghat: Tensor, lam: Tensor, beta: float, p: Tensor) -> Tensor:
    """∇f(λ) = 2Ĝλ + β(λ − p), [M]."""
    return 2.0 * (Ghat @ lam) + beta * (lam - p)


def residual(Ghat: Tensor, lam: Tensor, beta: float = 0.0, preference: Sequence[float] | Tensor | None = None) -> float:
    """How far λ [M] is from optimal: λᵀ∇f − min_j ∇_j f ≥ 0, and 0 exactly at the minimiser.

    It is the Frank–Wolfe gap, an upper bound on f(λ) − f(λ*), in the units of Ĝ. [ours]
    """
    p = preference_vector(preference, Ghat.shape[0])
    slope = gradient(Ghat.double(), lam, beta, p)
    return float(lam @ slope - slope.min())


def _solve_any(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """Any M: an active-set method from p; for β = 0 on the strictly convex problem first, then in the limit."""
    strict = max(beta, LIMIT_BETA)
    lam = _active_set(Ghat, strict, p, p)
    if beta < strict:
        limit = _minimise_on_face(Ghat, beta, p, lam > 0)
        if limit.min() < -1e-9:  # at LIMIT_BETA a coordinate was still free that the limit drops
            limit = _active_set(Ghat, beta, p, lam)
        limit = limit.clamp_min(0.0) / limit.clamp_min(0.0).sum()
        if residual(Ghat, limit, beta, p) <= max(LIMIT_RESIDUAL, residual(Ghat, lam, beta, p)):
            return limit
    return lam


def _active_set(Ghat: Tensor, beta: float, p: Tensor, lam: Tensor) -> Tensor:
    """Primal active-set method from a feasible λ (Nocedal and Wright 2006, algorithm 16.3).

    On the current face {λ_j > 0} the QP is a linear system. Walk to its solution; if a coordinate would turn
    negative stop there and drop it; once on the face's minimiser, let in the coordinate with the most negative
    slope, until none is left. Strict convexity makes it finite; the bound on the loop is only a guard.
    """
    M = p.numel()
    free = lam > 1e-9
    lam = torch.where(free, lam, 0.0)
    lam = lam / lam.sum()
    best, best_gap = lam, residual(Ghat, lam, beta, p)
    for _ in range(20 * M):
        direction = _minimise_on_face(Ghat, beta, p, free) - lam
        blocking = free & (direction < 0) & (lam + direction < 0)
        if blocking.any():
            lengths = torch.where(blocking, lam / direction.abs().clamp_min(1e-300), torch.inf)
            j = int(lengths.argmin())
            lam = (lam + lengths[j] * direction).clamp_min(0.0)
            free = free.clone()
            free[j] = False
            lam[j] = 0.0
            continue
        lam = (lam + direction).clamp_min(0.0)
        lam = lam / lam.sum()
        gap = residual(Ghat, lam, beta, p)
        if gap < best_gap:
            best, best_gap = lam, gap
        slope = gradient(Ghat, lam, beta, p)
        outside = torch.where(free, torch.inf, slope)
        entering = int(outside.argmin())
        if outside[entering] >= lam @ slope - 1e-15:
            break
        free = free.clone()
        free[entering] = True
    return best


def _minimise_on_face(Ghat: Tensor, beta: float, p: Tensor, free: Tensor) -> Tensor:
    """Minimiser over the affine hull of a face, {λ : Σλ = 1, λ_j = 0 where not free}; entries may be negative.

    With λ = λ⁰ + Zy, λ⁰ the point of the hull nearest p and Z [F, F−1] an orthonormal basis of {v : Σv = 0}, the
    regulariser is (β/2)‖y‖² plus a constant, so (2ZᵀĜZ + βI) y = −2ZᵀĜλ⁰. At β = 0 directions in which
    Ĝ is flat keep y = 0: the pseudo-inverse picks the minimiser nearest p, which is the limit β → 0⁺.
    """
    index = free.nonzero().flatten()
    F = index.numel()
    lam = torch.zeros_like(p)
    start = p[index] + (1.0 - p[index].sum()) / F  # λ⁰ [F]
    if F > 1:
        ones = torch.ones(F, 1, dtype=torch.float64)
        Z = torch.linalg.qr(ones, mode="complete").Q[:, 1:]  # [F, F-1]
        G = Ghat[index][:, index]
        values, vectors = torch.linalg.eigh(Z.T @ G @ Z)
        values = values.clamp_min(0.0)
        flat = (
            values <= 1e-15 * F * Ghat.diagonal().sum() if beta == 0.0 else torch.zeros_like(values, dtype=torch.bool)
        )
        inverse = torch.where(flat, 0.0, 2.0 / (2.0 * values + beta).clamp_min(1e-300))
        start = start - Z @ (vectors @ (inverse * (vectors.T @ (Z.T @ (G @ start)))))
    lam[index] = start
    return lam


def pareto_stationarity(Ghat: Tensor) -> float:
    """min over the simplex of λᵀĜλ = ‖Jᵀλ‖² / Σ‖g_j‖² ∈ [0, 1/M]; 0 exactly where no common descent exists.

    Ghat [M, M] trace-normalised. On noisy gradients this is biased upward, since it minimises over the noise as
    well; read it as an upper bound. [ours]
    """
    lam = solve(Ghat, 0.0)
    return float(lam @ Ghat.double() @ lam)
