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
        ‖λ − 1/M‖² = ‖λ‖² − 1/M on the simplex), β = 0 as the limit β → 0⁺ (the minimiser nearest p), the solver.

What the guarantee is not: it is Euclidean and first-order. Adam preconditions the step, so common descent is not
assured; the log has `first_order_gain`, what steps as taken promise. And β = 0.01 is small: with
D = ‖g₁ − g₂‖² / tr G, M = 2 and away from the clip, β moves λ by the share β/(D + β) of its way to p. That is half the
way at D = 0.01, gradients that nearly coincide, and 1 % of it at D = 1, orthogonal ones.

Everything is float64, and on the CPU but for the products in `gram`; M is small, so that a QP costs far less than one
row of J. A Gram holds squares, so that an angle below 1e-7 is zero to it. Where lengths differ by up to 1e12, λᵀĜλ is
within 1e-10 (relative) of its minimum; up to 1e6, of several minimisers λ is also the one nearest p.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 2**20  # of J, as float64 at once
STEPS = 12  # of projected gradient
ROUNDING = 2.0**-52  # a sum that is no larger than this share of its terms is zero
FLAT = 1e-14  # a curvature below this is zero, with every gradient scaled to length one


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
    if not torch.isfinite(p.sum()):
        p = p / p.max()
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
    return _solve_two(Ghat, beta, p) if len(p) == 2 else _solve_any(Ghat, beta, p)


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


def _solve_two(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """M = 2 by hand [ours]: λ₁ = clip((c − b + β p₁) / (a − 2b + c + β), 0, 1) and p₁ where the denominator is 0."""
    (a, b), (_, c) = Ghat.tolist()
    numerator = c - b + beta * p[0].item()  # ⟨g₂, g₂ − g₁⟩ + β p₁ in normalised units
    denominator = a - 2.0 * b + c + beta  # ‖g₁ − g₂‖² + β
    rounding = 1e-15 * (a + c)  # below it the denominator is noise, and the numerator alone decides
    if denominator > rounding:
        first = min(max(numerator / denominator, 0.0), 1.0)
    elif abs(numerator) > 1e3 * rounding:
        first = float(numerator > 0.0)
    else:  # a slope below 1e-12 is noise as well: equal gradients, β = 0, every λ is optimal, and p the nearest
        first = p[0].item()
    return torch.tensor([first, 1.0 - first], dtype=torch.float64)


def _solve_any(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """Any M: some projected-gradient steps, from there the exact minimiser; at β = 0 the limit β → 0⁺. [ours]"""
    H = 2.0 * Ghat + beta * torch.eye(len(p), dtype=torch.float64)
    length = H.diagonal().clamp_min(0.0).sqrt()  # of the gradients, [M]
    length[length == 0.0] = length.where(length > 0.0, 1.0).min()  # any will do for a gradient of zero
    lam = _projected_gradient(Ghat, beta, p)
    lam = _active_set(H, beta * p, lam, _edges(length, torch.arange(len(p))))
    return lam if beta > 0.0 else _limit(Ghat, p, lam, length)


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of v [M] onto {λ : λ ≥ 0, Σλ = 1}, by sorting (Held et al. 1974; Duchi et al. 2008)."""
    u = v.sort(descending=True).values
    thresholds = (u.cumsum(0) - 1.0) / torch.arange(1, len(v) + 1)  # if the k largest were all that stays positive
    return (v - thresholds.max()).clamp_min(0.0)


def _projected_gradient(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """Accelerated projected gradient from p (Nesterov 1983; Beck and Teboulle 2009).

    Step downhill from a point a little ahead on λ's way, then back onto the simplex. The residual is about 1e-3 after
    12 steps, 1e-8 after 200, but still 1e-6 to 1e-4 where lengths differ by 1e4.
    """
    step = 1.0 / max(2.0 * float(Ghat.trace()) + beta, 1e-300)  # f curves by at most 2 tr(Ĝ) + β; if that is 0, ∇f = 0
    lam = ahead = p
    for k in range(STEPS):
        last, lam = lam, project_simplex(ahead - step * gradient(Ghat, ahead, beta, p))
        ahead = lam + k / (k + 3) * (lam - last)
    return lam


def _edges(length: Tensor, among: Tensor) -> Tensor:
    """Moves of λ [M, F − 1]: from the shortest gradient `among` [F] to each other one, per length of the other."""
    order = among[length[among].argsort()]
    unit = torch.eye(len(length), dtype=torch.float64)[:, order]
    return (unit[:, 1:] - unit[:, :1]) / length[order[1:]]  # scaled so, no long gradient hides a short one [ours]


def _active_set(H: Tensor, h: Tensor, lam: Tensor, B: Tensor) -> Tensor:
    """Minimise ½λᵀHλ − hᵀλ over λ + span(B), λ ≥ 0, from a feasible λ (Nocedal and Wright 2006, algorithm 16.3).

    H [M, M], h [M], λ [M], directions B [M, k]. Walk to the minimiser; where a coordinate would turn negative stop,
    hold it at zero, and walk to the minimiser of the face that is left. There release the one that f most wants
    positive; end where there is none.
    """
    scale, curvature = B.norm(dim=1), B.T @ H @ B
    active = torch.zeros(len(lam), dtype=torch.bool)  # the coordinates held at zero
    for _ in range(10 * len(lam)):  # a guard, where rounding would hold and release one coordinate for ever
        slope = B.T @ (H @ lam - h)  # [k]
        noise = ROUNDING * float((B.abs().T @ (H.abs() @ lam + h.abs())).norm())
        free = torch.linalg.qr(B[active].T, mode="complete").Q[:, int(active.sum()) :]  # moves that keep them at zero
        downhill = -free.T @ slope
        if float(downhill.norm()) <= noise:
            force = torch.linalg.pinv(B[active].T) @ slope * scale[active]  # the multipliers of λ_j ≥ 0
            if not active.any() or force.min() >= -noise:
                break
            active[active.nonzero()[force.argmin()]] = False
            continue
        values, vectors = torch.linalg.eigh(free.T @ curvature @ free)
        move = free @ (vectors @ (vectors.T @ downhill / values.clamp_min(FLAT)))  # Newton's, [k]
        change = B @ move
        falling = ~active & (change < -1e-10 * scale * move.norm())  # not where the change is rounding
        shares = torch.where(falling, -lam / change, torch.inf)  # of the way, until λ_j is 0
        first = int(shares.argmin())
        lam = (lam + min(1.0, float(shares[first])) * change).clamp_min(0.0)
        active[first] |= bool(shares[first] <= 1.0)
        lam[active] = 0.0
    return lam / lam.sum()


def _limit(Ghat: Tensor, p: Tensor, lam: Tensor, length: Tensor) -> Tensor:
    """β → 0⁺: of all weights with the Jᵀλ of this minimiser λ [M], the one nearest to p. [ours]

    Weights with the same Jᵀλ have the same λᵀĜλ, so for every β > 0 the minimiser is the nearest to p among them;
    hence so is the limit. It moves λ only where Ĝ is flat: nowhere, unless gradients depend on each other.
    """
    among = torch.arange(len(p))
    for _ in range(2):  # the second time without those that nothing but rounding moved
        edges = _edges(length, among)
        values, vectors = torch.linalg.eigh(2.0 * edges.T @ Ghat @ edges)
        flat = edges @ vectors[:, values <= FLAT]  # [M, k]
        among = ((flat * length[:, None]).norm(dim=1) > 1e-8).nonzero().flatten()
    nearest = _active_set(torch.eye(len(p)).double(), p, lam, torch.linalg.qr(flat).Q)  # minimises ½‖λ − p‖²
    nearest[nearest <= FLAT] = 0.0
    rise = nearest @ Ghat @ nearest - lam @ Ghat @ lam  # Ĝ looks flat between near twins; the shorter is better still
    return nearest if rise <= 1e-12 * (length @ nearest) ** 2 else lam
