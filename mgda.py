"""The simplex QP: which weights λ a step gives its objectives.

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

The guarantee is Euclidean and first-order. Adam preconditions the step, so common descent is not assured; the log's
`first_order_gain` is what the steps as taken promise. And β = 0.01 is small: with D = ‖g₁ − g₂‖² / tr G, M = 2 and no
weight clipped, β moves λ by the share β/(D + β) of its way to p: half the way at D = 0.01, gradients that nearly
coincide, and 1 % of it at D = 1, orthogonal ones.

If gradients differ in length by at most 1e4, λ is exact up to the rounding of the Gram, which moves λ by less than
1e-13 if β ≥ 0.01, and by up to 1e-7 at β = 0: a Gram holds squares, so an angle below 1e-7 is zero to it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 2**20  # of J, as float64 at once: never all of them
ROUNDING = 1e-14  # smaller curvatures and errors are zero, with every gradient scaled to length one


def gram(J: Tensor) -> Tensor:
    """Gram matrix G [M, M], float64 on the CPU, G_ij = ⟨g_i, g_j⟩, of J [M, d] of any float type and device. [paper]"""
    G = torch.zeros(len(J), len(J), dtype=torch.float64, device=J.device)
    for block in J.detach().split(COLUMNS, dim=1):
        columns = block.double().contiguous()  # [M, at most COLUMNS]
        G += columns @ columns.T
    return G.cpu()


def normalise(G: Tensor) -> Tensor:
    """Ĝ = G / tr(G) [M, M]: β then means the same for large and for small gradients. [paper]

    tr(G) = 0 (every gradient is zero) gives the zero matrix, for which λ* = p [ours]. Raises ValueError for inf or NaN.
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
    """p [M] in float64, normalised to sum 1; None is uniform. Raises ValueError for a wrong length or a bad entry."""
    if preference is None:
        return torch.full((M,), 1.0 / M, dtype=torch.float64)
    p = torch.as_tensor(preference, dtype=torch.float64)
    if p.shape != (M,):
        raise ValueError(f"preference: {p.numel()} values for {M} objectives; give one per objective")
    if (p < 0).any() or not 0.0 < p.sum() < math.inf:
        raise ValueError(f"preference: {p.tolist()} must be non-negative numbers that are not all zero")
    return p / p.sum()


def solve(Ghat: Tensor, beta: float = 0.0, p: Sequence[float] | Tensor | None = None) -> Tensor:
    """λ* = argmin over the simplex of λᵀĜλ + (β/2)‖λ − p‖².

    Ghat [M, M] from `normalise`, M ≤ 8, β ≥ 0, p [M] of any sum or None for uniform. Returns λ [M] in float64.
    β = 0 is the limit from above: of all minimisers the one nearest p. Raises ValueError for a bad M, β or p.
    """
    M = len(Ghat)
    if M > 8:
        raise ValueError(f"solve: {M} objectives have 2^{M} faces to try; use at most 8")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta: {beta} must be a finite number >= 0")
    p = preference_vector(p, M)
    return _solve_two(Ghat.double(), beta, p) if M == 2 else _solve_faces(Ghat.double(), beta, p)


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of v [M] onto {λ : λ ≥ 0, Σλ = 1}, by sorting (Held et al. 1974; Duchi et al. 2008)."""
    u = v.sort(descending=True).values
    thresholds = (u.cumsum(0) - 1.0) / torch.arange(1, len(v) + 1)  # if the k largest were all that stays positive
    return (v - thresholds.max()).clamp_min(0.0)


def _solve_two(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """M = 2 by hand [ours]: λ₁ = clip((c − b + β p₁) / (a − 2b + c + β), 0, 1), and p₁ if the denominator is 0."""
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


def _solve_faces(Ghat: Tensor, beta: float, p: Tensor) -> Tensor:
    """Any M, exactly [ours]: minimise f on the plane of each of the F = 2^M − 1 faces, then take the point that is λ*.

    A face is a set of objectives that share the weight. Its points are its corner, the shortest gradient, plus moves
    towards the others, each scaled by the other's length, or a long gradient would hide a short one. If f is flat along
    some moves, they lead to the point nearest p. λ* is the point with λ_j ≥ 0 and no ∇_j f below their mean λᵀ∇f.
    """
    M = len(p)
    unit = torch.eye(M, dtype=torch.float64)
    H = 2.0 * Ghat + beta * unit  # ∇f = Hλ − βp
    length = H.diagonal().sqrt().clamp_min(1e-6)  # of gradients that are zero too
    faces = (torch.arange(1, 2**M)[:, None] >> torch.arange(M)) & 1  # [F, M], 1 for its objectives
    corner = unit[torch.where(faces == 1, length, torch.inf).argmin(1)]  # [F, M]
    moves = (unit - corner[:, :, None]) * (faces / length)[:, None]  # [F, M, M], column j from the corner towards j
    curvature = moves.mT @ H @ moves + torch.diag_embed(1.0 - faces + corner)  # 1 for columns that do not move
    values, vectors = torch.linalg.eigh(curvature)
    flat = (values <= ROUNDING)[:, None]  # [F, 1, M]
    steep = moves @ (vectors * torch.where(flat, 0.0, values[:, None].rsqrt()))  # [F, M, M]
    still = moves @ (vectors * flat)
    nearest = still @ torch.linalg.pinv(still)
    lam = corner[:, :, None]  # [F, M, 1]
    for _ in range(2):  # the second time against rounding
        lam = lam - steep @ (steep.mT @ (H @ lam - beta * p[:, None]))  # Newton's step
        lam = lam + nearest @ (p[:, None] - lam)
    lam = lam[:, :, 0]
    slope = lam @ H - beta * p  # [F, M], ∇f
    below = (lam * slope).sum(1, keepdim=True) - slope
    scale = (lam.abs() @ length)[:, None]  # both errors as shares of the lengths that λ adds up
    error = torch.maximum(-lam * length, below / torch.maximum(length, scale)).amax(1) / scale[:, 0]
    optimal = error <= max(ROUNDING, float(error.min()))
    best = lam[torch.where(optimal, (lam - p).norm(dim=1), torch.inf).argmin()].clamp_min(0.0)
    return best / best.sum()
