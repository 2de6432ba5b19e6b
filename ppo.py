"""PPO with k rewards at once: k advantages, k clipped losses, one forward pass.

For every reward j, on the tokens t of one response (Schulman et al. 2017; Ziegler et al. 2019):

    r_{j,t} = −κ (log π_old − log π_ref)_t + R_j [t is the last token]          token reward, k1 KL
    A_{j,t} = Σ_l λ_GAE^l δ_{j,t+l},   δ_{j,t} = r_{j,t} + V_j(t+1) − V_j(t)      GAE
    Â_j     = (A_j − mean) / max(σ_j, 0.1)                                       whitening per reward
    L_j(θ)  = −mean_t min(ρ_t Â_{j,t}, clip(ρ_t, 1 − ε, 1 + ε) Â_{j,t}),         ρ_t = π_θ / π_old
    g_j     = ∇_θ L_j                                                          row j of J [k, d]

FIRM's rewards are its M objectives; methods that combine objectives before they train have fewer.

[paper] PPO per objective, the KL watched against a target.
[code: RiC] adaptive κ: initial 0.2, target 3 per sequence.
[VC-PPO, arXiv 2503.01491] the critic fits Monte Carlo returns Σ_{u ≥ t} r_{j,u}, as if its own λ_GAE were 1.
[ours]
- The KL is in every objective's reward: λ sums to 1, so the KL keeps its weight whatever λ is.
- Whitening divides by at least 0.1 calibrated units, because a near-constant objective would be blown up into noise.
- The critic is linear in detached hidden states and zero at the start. It is fitted once a round, after the advantages,
  by a few conjugate-gradient steps: there is no rate to choose, and stopping early regularises.

Means over tokens are over the whole client batch, whatever the micro-batches. `grpo.py` learns without a critic.
Left out on purpose: an entropy bonus, a discount, a clip of the value's movement (it kept the critic from learning).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollout import Policy, Rollout, assemble
from settings import UpdateSettings

SCALE_FLOOR = 0.1  # in calibrated units: an advantage is never divided by less
CRITIC_STEPS = 6  # of conjugate gradients, on each batch
KL_HORIZON = 1000  # cohort samples over which κ adapts
TINY = torch.finfo(torch.float64).tiny  # 0 / 0 is 0: a critic that fits exactly stays


class NotFinite(ValueError):  # noqa: N818
    """Something in a client's update is NaN or infinite. The message says what was so first, and a remedy."""


@dataclass
class Batch:
    """One client's responses, B rows of at most L tokens, and what is known of them at θ_t."""

    rollout: Rollout
    scores: Tensor  # [B, k] calibrated
    logp_old: Tensor  # [B, L] log π_θt of every token
    logp_ref: Tensor  # [B, L] log π_ref
    hidden: Tensor | None  # [B, L, H] the states that the tokens were predicted from, if a critic reads them
    kl_coef: float  # κ
    # for the first gradient, which takes it: logp and entropy [B, L] with their graph, and the adapter's version
    forward: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # one list, whatever replaces the batch


def prepare(
    policy: Policy, rollout: Rollout, scores: Tensor, kl_coef: float, micro_batch_size: int | None, hidden: bool
) -> Batch:
    """The batch at θ_t, at which the adapter must stand. scores [B, k] calibrated; hidden: whether to keep states.

    In the first epoch π_θ is π_old: if the batch is one micro-batch, one forward pass serves both.
    """
    with policy.adapter.disabled():
        logp_ref, _ = policy.logprobs_in_pieces(rollout, micro_batch_size)  # [B, L]
    forward = []
    if micro_batch_size is None or micro_batch_size >= len(rollout):
        logp, entropy, states = policy.logprobs(rollout)  # [B, L], [B, L], [B, L, H]
        forward, logp_old = [(logp, entropy, policy.adapter.version)], logp.detach()
    else:
        logp_old, states = policy.logprobs_in_pieces(rollout, micro_batch_size)
    scores = scores.to(policy.device, torch.float32)
    return Batch(rollout, scores, logp_old, logp_ref, states.contiguous() if hidden else None, kl_coef, forward)


# ---- advantages ----------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. x [B, L, ...], mask [B, L] -> [...]."""
    return torch.einsum("bl...,bl->...", x, mask.to(x.dtype)) / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """σ [k], the standard deviation of each column of x [B, L, k] over the real tokens."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask).sqrt()


def token_rewards(batch: Batch) -> Tensor:
    """r [B, L, k]: the KL of every token, and the score on the last one."""
    mask, scores = batch.rollout.mask, batch.scores
    penalty = -batch.kl_coef * (batch.logp_old - batch.logp_ref) * mask  # [B, L]
    rewards = penalty[..., None].repeat(1, 1, scores.shape[1])  # [B, L, k]
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores.to(rewards.dtype)
    return rewards


def to_go(rewards: Tensor) -> Tensor:
    """Σ_{u ≥ t} r_u, the sum of the rewards from each token to the end, a Monte Carlo return. [B, L, ...] -> alike."""
    return rewards.flip(1).cumsum(1).flip(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), undiscounted, per reward.

    rewards, values [B, L, k], mask [B, L], 1 on a prefix of each row. Returns advantages [B, L, k], 0 if masked.
    """
    m = mask[..., None].to(values.dtype)  # [B, L, 1]
    values = torch.nn.functional.pad(values * m, (0, 0, 0, 1))  # [B, L + 1, k], 0 after the last real token
    delta = (rewards + values[:, 1:] - values[:, :-1]) * m  # [B, L, k]
    advantages = torch.zeros_like(delta)
    ahead = torch.zeros_like(delta[:, 0])  # A_{t+1}  [B, k]
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = ahead = delta[:, t] + gae_lambda * ahead
    return advantages


def whiten(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Â [B, L, k], of mean 0 and deviation at most 1 per column over the real tokens, and σ [k]; see `SCALE_FLOOR`."""
    scale = masked_std(advantages, mask)
    centred = (advantages - masked_mean(advantages, mask)) * mask[..., None]
    return centred / scale.clamp_min(SCALE_FLOOR), scale


@dataclass
class Advantages:
    """What an estimator makes of a batch: one column per reward. Without a critic there are no returns and values."""

    normalised: Tensor  # [B, L, k] Â
    scale: Tensor  # [k] σ, what they and the KL in them were divided by (the floor aside; 1 with GRPO)
    returns: Tensor | None = None  # [B, L, k] what the critic fits
    values: Tensor | None = None  # [B, L, k] what the critic said before the update


@dataclass(frozen=True)
class Estimator:
    """How a client turns rewards into advantages (stage 1). `state` holds a training's tensors from earlier rounds."""

    name: str
    help: str
    advantages: Callable[[Batch, dict[str, Tensor], UpdateSettings], Advantages]
    fit: Callable[[Batch, Advantages, dict[str, Tensor]], dict[str, Tensor]] = lambda batch, advantages, state: {}
    group_size: int = 1  # responses to each prompt, if the settings leave it open
    reads_hidden: bool = False  # whether a batch keeps its hidden states
    settings: tuple[str, ...] = ()


# ---- the critic ----------------------------------------------------------------------------------------------


def least_squares(weight: Tensor, hidden: Tensor, returns: Tensor, steps: int = CRITIC_STEPS) -> Tensor:
    """Conjugate gradients on Σ_t (V_j(t) − G_j(t))², G_j the returns, each j by itself: weight [H + 1, k] -> alike.

    hidden [n, H], returns [n, k]. CGLS (Hestenes and Stiefel 1952), which never forms the normal equations, in
    float64, because hidden states are badly conditioned.
    """
    X = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1).double()  # [n, H + 1]
    weight = weight.double()
    residual = returns.double() - X @ weight
    s = X.T @ residual  # [H + 1, k], minus half the gradient
    direction, gamma = s, s.square().sum(0)
    for _ in range(steps):
        q = X @ direction  # [n, k]
        alpha = gamma / q.square().sum(0).clamp_min(TINY)
        weight = weight + alpha * direction
        residual = residual - alpha * q
        s, before = X.T @ residual, gamma
        gamma = s.square().sum(0)
        direction = s + gamma / before.clamp_min(TINY) * direction
    return weight.float()


def critic_weight(batch: Batch, state: dict[str, Tensor]) -> Tensor:
    """The critic that a training keeps [H + 1, k], w_j and then b_j in column j, or a new one, of zeros."""
    zeros = torch.zeros(batch.hidden.shape[-1] + 1, batch.scores.shape[1], device=batch.hidden.device)
    return state.get("critic", zeros).to(zeros)


def critic_advantages(batch: Batch, state: dict[str, Tensor], config: UpdateSettings) -> Advantages:
    """Token rewards with KL, GAE on the critic as it stands, whitening."""
    mask, rewards = batch.rollout.mask, token_rewards(batch)
    weight = critic_weight(batch, state)
    values = batch.hidden.float() @ weight[:-1] + weight[-1]  # [B, L, k], V_j(t) = w_jᵀ h_t + b_j
    advantages = gae(rewards, values, mask, config.gae_lambda)
    return Advantages(*whiten(advantages, mask), to_go(rewards), values)


def fit_critic(batch: Batch, advantages: Advantages, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Once a round, after its advantages: the critic towards the returns of all real tokens."""
    real = batch.rollout.mask.bool()
    weight = critic_weight(batch, state)
    return {"critic": least_squares(weight, batch.hidden[real], advantages.returns[real])}


CRITIC = Estimator(
    "critic", "a critic on the policy's hidden states", critic_advantages, fit_critic, reads_hidden=True,
    settings=("gae_lambda",),
)  # fmt: skip


# ---- the gradients -------------------------------------------------------------------------------------------


def surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped objective per token, negated. ratio [B, L], advantages [B, L, k] -> [B, L, k]."""
    ratio = ratio[..., None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages)


def jacobian(losses: Tensor, parameters: list[Tensor]) -> Tensor:
    """J [k, d] from losses [k] that share one graph: k backward passes, no second forward."""
    rows = []
    for j, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, parameters, retain_graph=j + 1 < len(losses))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@dataclass
class Gradients:
    """The k gradients of one optimizer step, and what their forward pass showed."""

    J: Tensor  # [k, d]
    entropy: float  # nats per token
    clip_fraction: float  # share of the tokens whose ratio left [1 − ε, 1 + ε]
    approx_kl: float  # KL(π_old ‖ π_θ) per token, the k3 estimate ρ − 1 − log ρ ≥ 0 (Schulman 2020)


def policy_gradients(policy: Policy, batch: Batch, advantages: Tensor, config: UpdateSettings) -> Gradients:
    """J: per micro-batch one forward pass, k backward ones. advantages [B, L, k], normalised. May raise NotFinite."""
    rollout, adapter = batch.rollout, policy.adapter
    J = adapter.vector().new_zeros(advantages.shape[-1], adapter.size)
    ratios, entropies = [], []
    for rows, piece in rollout.micro_batches(config.micro_batch_size):
        l = piece.mask.shape[1]
        *kept, version = batch.forward.pop() if batch.forward else (None,)
        logp, entropy = kept if version == adapter.version else policy.logprobs(piece)[:2]  # [b, l] each
        ratio = (logp - batch.logp_old[rows, :l]).exp()  # [b, l]
        losses = surrogate(ratio, advantages[rows, :l], config.clip_range) * piece.mask[..., None]  # [b, l, k]
        J += jacobian(losses.sum((0, 1)), adapter.parameters)
        ratios.append((rows, ratio.detach()))
        entropies.append((rows, entropy))
    tokens = rollout.mask.sum()
    J /= tokens
    inputs = {"log-probs": batch.logp_old, "rewards": batch.scores, "advantages": advantages}
    for what, x in (inputs | {"gradient": J}).items():
        if not x.isfinite().all():
            remedy = "scale them down" if what == "rewards" else "lower lr or kl_coef, or use dtype float32"
            raise NotFinite(f"not finite: its {what}; {remedy}")
    ratio = assemble(rollout, ratios).masked_fill(rollout.mask == 0, 1.0)  # [B, L]
    return Gradients(
        J,
        entropy=float(assemble(rollout, entropies).sum() / tokens),
        clip_fraction=float(((ratio - 1.0).abs() > config.clip_range).sum() / tokens),
        approx_kl=float((ratio - 1.0 - ratio.log()).sum() / tokens),
    )


# ---- the KL coefficient --------------------------------------------------------------------------------------


def sequence_kl(batch: Batch) -> Tensor:
    """KL(π ‖ π_ref) of each response, the k1 estimate Σ_t (log π − log π_ref)_t, in nats: [B]."""
    return ((batch.logp_old - batch.logp_ref) * batch.rollout.mask).sum(1)


def adapt_kl(kl_coef: float, kl: float, samples: int, target: float) -> float:
    """The next κ (Ziegler et al. 2019): κ (1 + clip(kl / target − 1, ±0.2) · min(samples / horizon, 1)).

    kl: nats per sequence. The minimum [ours] keeps κ positive for cohorts beyond the horizon; a target of 0 keeps κ.
    """
    if target == 0.0:
        return kl_coef
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(samples / KL_HORIZON, 1.0))
