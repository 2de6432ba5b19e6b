"""PPO with M objectives: M advantages, M clipped losses, one forward pass.

For every objective j, on the tokens t of one response (Schulman et al. 2017; Ziegler et al. 2019):

    r_{j,t} = −κ (log π_old − log π_ref)_t + R_j [t is the last token]          token reward, k1 KL
    A_{j,t} = Σ_l (γ μ)^l δ_{j,t+l},   δ_{j,t} = r_{j,t} + γ V_j(t+1) − V_j(t)    GAE, μ is `gae_lambda`
    Â_j     = (A_j − mean) / max(σ_j, 0.1 σ_j⁰)                                  whitening per objective
    L_j(θ)  = −mean_t min(ρ_t Â_{j,t}, clip(ρ_t, 1 − ε, 1 + ε) Â_{j,t}),         ρ_t = π_θ / π_old
    g_j     = ∇_θ L_j                                                          row j of J [M, d]

(with an entropy bonus, − entropy_coef · mean_t H_t joins every L_j).

[paper] PPO per objective, the KL watched against a target.
[code: RiC] adaptive κ: initial 0.2, target 3 per sequence.
[ours] the KL in every objective's reward; whitening and its floor (σ_j⁰ = 1, the scale of a calibrated score on the
base policy, stands for that of its advantages: a near-constant objective must not be blown up into noise); the critic,
one linear layer with M outputs on detached hidden states, zero at the start, with its own optimizer.

Means over tokens are over the tokens of the whole client batch, whatever the micro-batches.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evidence import diagnostics
from rollout import Policy, Rollout, together

SCALE_FLOOR = 0.1  # of σ_j⁰, in calibrated units: an advantage is never divided by less


@dataclass
class PPOConfig:
    """The local update of one client."""

    epochs: int = field(default=3, metadata={"help": "K, optimizer steps on each batch [paper: 3]"})
    clip_range: float = field(default=0.2, metadata={"help": "epsilon of the clipped surrogate [ours: the usual 0.2]"})
    value_clip: float = field(
        default=0.2, metadata={"help": "how far a value may move in one round before its gradient is cut off [ours]"}
    )
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    gae_lambda: float = field(
        default=0.95, metadata={"help": "GAE: 0 trusts the critic, 1 the sampled return [ours: the usual 0.95]"}
    )
    critic_lr: float = field(default=1e-3, metadata={"help": "Adam rate of the critic [ours]"})
    kl_coef: float = field(
        default=0.2, metadata={"help": "kappa, weight of the KL in the reward, at the start [code: RiC, 0.2]"}
    )
    kl_target: float = field(
        default=3.0,
        metadata={"help": "KL per sequence, in nats, that kappa adapts to; 0 keeps kappa fixed [code: RiC, 3]"},
    )
    kl_horizon: int = field(default=1000, metadata={"help": "cohort samples over which kappa adapts"})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "taken off every calibrated score of a response that never ends"}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "rows per forward pass; the whole client batch where not given"}
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "kl_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("clip_range", "value_clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be a positive number")
        for name in ("critic_lr", "kl_coef", "kl_target", "missing_eos_penalty", "entropy_coef"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be a finite number >= 0")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} must lie between 0 and 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: {self.micro_batch_size} must be at least 1")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens. x [B, L, ...], mask [B, L] -> [...]."""
    return torch.einsum("bl...,bl->...", x, mask.to(x.dtype)) / mask.sum()


def token_rewards(scores: Tensor, logp: Tensor, logp_ref: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r [B, L, M]: the KL of every token, and the score on the last one.

    scores [B, M] calibrated; logp, logp_ref, mask [B, L].
    """
    rewards = (-kl_coef * (logp - logp_ref) * mask)[..., None].repeat(1, 1, scores.shape[1])  # [B, L, M]
    last = mask.sum(1) - 1  # [B]
    rewards[torch.arange(len(scores)), last] += scores.to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), per objective.

    rewards, values [B, L, M], mask [B, L], 1 on a prefix of each row; the value after the last real token is 0.
    Returns advantages and returns (their sum with the values), [B, L, M], 0 where masked.
    """
    m = mask[..., None].to(values.dtype)  # [B, L, 1]
    values = values * m
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])  # A_{t+1}  [B, M]
    next_value = torch.zeros_like(ahead)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = (delta + gamma * gae_lambda * ahead) * m[:, t]
        advantages[:, t] = ahead
        next_value = values[:, t]
    return advantages, advantages + values


def masked_std(advantages: Tensor, mask: Tensor) -> Tensor:
    """σ [M], the standard deviation of each objective's advantages over the real tokens."""
    mean = masked_mean(advantages, mask)
    return masked_mean((advantages - mean).square(), mask).sqrt()


def whiten(advantages: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Â [B, L, M]: mean 0 and deviation 1 per objective over the real tokens; divides by max(σ, floor)."""
    centred = (advantages - masked_mean(advantages, mask)) * mask[..., None]
    return centred / masked_std(advantages, mask).clamp_min(floor)


def surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped objective per token, negated. ratio [B, L], advantages [B, L, M] -> [B, L, M]."""
    ratio = ratio[..., None]
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def jacobian(losses: Tensor, leaves: list[Tensor]) -> Tensor:
    """J [M, d] from losses [M] that share one graph: M backward passes, no second forward. In the leaves' type."""
    rows = []
    for j, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, leaves, retain_graph=j + 1 < len(losses))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


class Critic(nn.Linear):
    """V_j(t), j = 1..M: one linear layer on the policy's detached hidden states, zero at the start, float32."""

    def __init__(self, hidden_size: int, M: int, device: torch.device | str = "cpu") -> None:
        super().__init__(hidden_size, M, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, L, H] of any type -> values [B, L, M]."""
        return super().forward(hidden.float())


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²), mean over tokens, summed over objectives: a scalar.

    values, old, returns [B, L, M], mask [B, L].
    """
    cut = old + (values - old).clamp(-clip, clip)
    worst = torch.maximum((values - returns).square(), (cut - returns).square())
    return 0.5 * masked_mean(worst, mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R), [M]; 0 for a critic that knows nothing, NaN where the returns do not vary."""
    return 1.0 - (masked_std(returns - values, mask) / masked_std(returns, mask)).square()


def adapt_kl(kl_coef: float, kl: float, samples: int, config: PPOConfig) -> float:
    """The next κ (Ziegler et al. 2019): κ (1 + clip(kl / target − 1, ±0.2) · min(samples / horizon, 1)).

    kl is per sequence, in nats; the minimum [ours] keeps κ positive for cohorts far larger than the horizon. A
    target of 0 keeps κ as it is.
    """
    if config.kl_target == 0.0:
        return kl_coef
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(samples / config.kl_horizon, 1.0))


@dataclass
class Advantages:
    """What one client batch is worth: k columns, one per loss (k = M for PPO with M objectives)."""

    whitened: Tensor  # [B, L, k]
    returns: Tensor  # [B, L, k] what the critic fits
    values: Tensor  # [B, L, k] what the critic said before the update
    scale: Tensor  # [k] σ before whitening


def ppo_advantages(
    critic: Critic, scores: Tensor, batch: Rollout, logp_old: Tensor, logp_ref: Tensor, hidden: Tensor, kl_coef: float,
    config: PPOConfig,
) -> Advantages:  # fmt: skip
    """Token rewards with KL, GAE on the client's critic, whitening: one column per objective.

    scores [B, M] calibrated; logp_old, logp_ref [B, L]; hidden [B, L, H]. Calibrated scores have unit scale on the base
    policy, so σ⁰ = 1 for every objective and the floor 0.1 σ⁰ is 0.1.
    """
    scores = scores - config.missing_eos_penalty * (~batch.ended)[:, None]
    rewards = token_rewards(scores, logp_old, logp_ref, batch.mask, kl_coef)  # [B, L, M]
    with torch.no_grad():
        values = critic(hidden)  # [B, L, M]
    advantages, returns = gae(rewards, values, batch.mask, config.gamma, config.gae_lambda)
    scale = masked_std(advantages, batch.mask)  # [M]
    return Advantages(whiten(advantages, batch.mask, SCALE_FLOOR), returns, values, scale)


def policy_gradients(
    policy: Policy, batch: Rollout, logp_old: Tensor, advantages: Tensor, config: PPOConfig, parts: int = 1
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """J, the gradients of the M losses: per micro-batch one forward pass, and M backward passes for each part in it.

    logp_old [B, L], advantages [B, L, M]. Returns J [parts, M, d], each loss restricted to one of `parts` equal parts
    of the batch's rows, so that J.sum(0) is the whole gradient; the detached hidden states [B, L, H]; scalars to log.
    Raises ValueError where a gradient is not finite.
    """
    J = policy.adapter.vector().new_zeros(parts, advantages.shape[-1], policy.adapter.size)
    hiddens, ratios, entropies = [], [], []
    tokens = batch.mask.sum()
    part_of = torch.arange(len(batch)) * parts // len(batch)  # [B]
    for rows, piece in batch.micro_batches(config.micro_batch_size):
        l = piece.mask.shape[1]
        logp, entropy, hidden = policy.logprobs(piece, config.entropy_coef > 0)  # [b, l], [b, l], [b, l, H]
        ratio = (logp - logp_old[rows, :l]).exp()  # [b, l]
        loss = surrogate(ratio, advantages[rows, :l], config.clip_range)  # [b, l, M]
        loss = loss - config.entropy_coef * entropy[..., None]  # Σ λ_j = 1, so a step has the bonus once
        present = part_of[rows].unique()
        member = (part_of[rows] == present[:, None]).to(loss)  # [p, b]
        losses = torch.einsum("blm,bl,pb->pm", loss, piece.mask.to(loss.dtype), member)  # [p, M], sums over tokens
        J[present] += jacobian(losses.flatten(), policy.adapter.leaves()).view(len(present), *J.shape[1:])
        hiddens.append((rows, hidden))
        ratios.append((rows, ratio.detach()))
        entropies.append((rows, entropy.detach()))
    J /= tokens  # only now: 16-bit weights pass back what a 16-bit number holds
    if not torch.isfinite(J).all():
        raise ValueError("lr: a policy gradient is not finite; lower lr, or use dtype float32")
    ratio = together(batch, ratios).masked_fill(batch.mask == 0, 1.0)
    log = {
        "entropy": float(together(batch, entropies).sum() / tokens),
        "clip_fraction": diagnostics.clip_fraction(ratio, batch.mask, config.clip_range),
        "approx_kl": diagnostics.approx_kl(ratio.log(), batch.mask),
    }
    return J, together(batch, hiddens), log


def fit_critic(
    critic: Critic, optimizer: torch.optim.Optimizer, hidden: Tensor, target: Advantages, mask: Tensor, clip: float
) -> None:
    """One step of the client's own critic towards its returns. hidden [B, L, H], mask [B, L]."""
    loss = value_loss(critic(hidden), target.values, target.returns, mask, clip)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
