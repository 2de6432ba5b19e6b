"""PPO with k rewards at once: k advantages, k clipped losses, one forward pass.

For every reward j, on the tokens t of one response (Schulman et al. 2017; Ziegler et al. 2019):

    r_{j,t} = −κ (log π_old − log π_ref)_t + R_j [t is the last token]          token reward, k1 KL
    A_{j,t} = Σ_l μ^l δ_{j,t+l},   δ_{j,t} = r_{j,t} + V_j(t+1) − V_j(t)          GAE, μ is `gae_lambda`
    Â_j     = (A_j − mean) / max(σ_j, 0.1)                                       whitening per reward
    L_j(θ)  = −mean_t min(ρ_t Â_{j,t}, clip(ρ_t, 1 − ε, 1 + ε) Â_{j,t}),         ρ_t = π_θ / π_old
    g_j     = ∇_θ L_j                                                          row j of J [k, d]

FIRM's rewards are its M objectives; methods that combine objectives before they train have fewer.

[paper] PPO per objective, the KL watched against a target.
[code: RiC] adaptive κ: initial 0.2, target 3 per sequence.
[VC-PPO, arXiv 2503.01491] the critic's targets have a λ of their own, 1: it fits the returns Σ_{u ≥ t} r_{j,u} as they
were, so that the reward at the end reaches the first token undiminished.
[ours] the KL in every objective's reward; whitening and its floor, a tenth of the deviation that calibrated scores have
on the base policy, so that a near-constant objective is not blown up into noise; the critic, linear in detached hidden
states, zero at the start, fitted once a round, after the advantages have been taken, by a few conjugate gradients: no
rate to choose whatever the scale of the states, and stopping early is its regulariser.

`grpo.py` learns without a critic. Means over tokens are over the tokens of the whole client batch, whatever the
micro-batches. Left out on purpose: an entropy bonus, a discount per token, a clip of the value's movement (it kept the
critic from learning).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.fields import Checked, Count, Index, NonNegative, Positive, Share, setting
from app.stopwatch import phase
from rollout import Policy, Rollout, assemble

SCALE_FLOOR = 0.1  # in calibrated units: an advantage is never divided by less
TINY = torch.finfo(torch.float64).tiny  # 0 / 0 is 0: a critic that fits exactly stays


@dataclass
class PPOConfig(Checked):
    """The local update of one client."""

    epochs: Count = setting(3, "K, optimizer steps on each batch [paper: 3]")
    clip_range: Positive = setting(0.2, "epsilon of the clipped surrogate [ours: the usual 0.2]")
    gae_lambda: Share = setting(0.95, "GAE: 0 trusts the critic, 1 the sampled return [ours: the usual 0.95]")
    critic_steps: Index = setting(6, "conjugate-gradient steps of the critic on each batch; 0 leaves it at zero [ours]")
    kl_coef: NonNegative = setting(0.2, "kappa, weight of the KL in the reward, at the start [code: RiC, 0.2]")
    kl_target: NonNegative = setting(
        3.0, "KL per sequence, in nats, that kappa adapts to; 0 keeps kappa fixed [code: RiC, 3]"
    )
    kl_horizon: Count = setting(1000, "cohort samples over which kappa adapts")
    missing_eos_penalty: NonNegative = setting(0.0, "taken off every calibrated score of a response that never ends")
    micro_batch_size: Count | None = setting(None, "rows per forward pass; the whole client batch where not given")


class NotFinite(ValueError):  # noqa: N818
    """Something in a client's update is NaN or infinite. The message says what was so first, and a remedy."""


@dataclass
class Batch:
    """One client's responses, B rows of at most L tokens, and what is known of them at θ_t."""

    rollout: Rollout
    scores: Tensor  # [B, k] calibrated
    logp_old: Tensor  # [B, L] log π_θt of every token
    logp_ref: Tensor  # [B, L] log π_ref
    hidden: Tensor | None  # [B, L, H] the states that the tokens were predicted from, where a critic reads them
    kl_coef: float  # κ

    def combined(self, columns: Tensor) -> "Batch":
        """The same responses with the rewards scores @ columns; columns [k, k′]."""
        return replace(self, scores=self.scores @ columns.to(self.scores))

    def logp_gap(self) -> float:
        """Largest |log π_sampler − log π_old| over the real tokens, in nats."""
        return float(((self.rollout.sampled_logp - self.logp_old).abs() * self.rollout.mask).max())


@phase("reference")
def prepare(
    policy: Policy, rollout: Rollout, scores: Tensor, kl_coef: float, config: PPOConfig, keep_hidden: bool = True
) -> Batch:
    """The batch at θ_t, where the adapter must stand. scores [B, k] calibrated, the penalty not yet taken off."""
    scores = scores.to(policy.device, torch.float32)
    logp_old, hidden = policy.logprobs_in_pieces(rollout, config.micro_batch_size)  # [B, L], [B, L, H]
    with policy.adapter.disabled():
        logp_ref, _ = policy.logprobs_in_pieces(rollout, config.micro_batch_size)  # [B, L]
    scores = scores - config.missing_eos_penalty * (~rollout.ended)[:, None]
    return Batch(rollout, scores, logp_old, logp_ref, hidden if keep_hidden else None, kl_coef)


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
    """Σ_{u ≥ t} r_u, what every token still has before it: the Monte Carlo return. rewards [B, L, ...] -> alike."""
    return rewards.flip(1).cumsum(1).flip(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), undiscounted, per reward.

    rewards, values [B, L, k], mask [B, L], 1 on a prefix of each row; the value after the last real token is 0.
    Returns advantages [B, L, k], 0 where masked.
    """
    m = mask[..., None].to(values.dtype)  # [B, L, 1]
    values = values * m
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])  # A_{t+1}  [B, k]
    next_value = torch.zeros_like(ahead)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        ahead = (delta + gae_lambda * ahead) * m[:, t]
        advantages[:, t] = ahead
        next_value = values[:, t]
    return advantages


def whiten(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Â [B, L, k], of mean 0 and deviation 1 per column over the real tokens, and σ [k]; divides by max(σ, 0.1)."""
    scale = masked_std(advantages, mask)
    centred = (advantages - masked_mean(advantages, mask)) * mask[..., None]
    return centred / scale.clamp_min(SCALE_FLOOR), scale


@dataclass
class Advantages:
    """What a learner makes of a batch: one column per reward. A learner without a critic has no returns and values."""

    normalised: Tensor  # [B, L, k] Â
    scale: Tensor  # [k] σ, what they and the KL in them were divided by (the floor aside)
    returns: Tensor | None = None  # [B, L, k] what the critic fits
    values: Tensor | None = None  # [B, L, k] what the critic said before the update


# ---- how a client learns: with a critic ----------------------------------------------------------------------


class Critic:
    """V_j(t) = w_jᵀ h_t + b_j, j = 1..k, on the policy's detached hidden states h; zero at the start, float32."""

    def __init__(self, hidden_size: int, k: int, device: torch.device | str = "cpu") -> None:
        self.weight = torch.zeros(hidden_size + 1, k, device=device)  # the last row is b

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] of any type -> values [..., k]."""
        return hidden.float() @ self.weight[:-1] + self.weight[-1]

    def fit(self, hidden: Tensor, returns: Tensor, steps: int) -> None:
        """Conjugate gradients on Σ_t (V_j(t) − G_j(t))², G_j the returns, each j by itself, from where it stands.

        hidden [n, H], returns [n, k]. CGLS (Hestenes and Stiefel 1952), which never forms the normal equations; in
        float64, since hidden states are badly conditioned and steps on rounding would be steps on noise.
        """
        X = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1).double()  # [n, H + 1]
        weight = self.weight.double()
        residual = returns.double() - X @ weight
        slope = X.T @ residual  # [H + 1, k], minus half the gradient
        direction, size = slope, slope.square().sum(0)
        for _ in range(steps):
            along = X @ direction  # [n, k]
            step = size / along.square().sum(0).clamp_min(TINY)
            weight = weight + step * direction
            residual = residual - step * along
            slope, before = X.T @ residual, size
            size = slope.square().sum(0)
            direction = slope + size / before.clamp_min(TINY) * direction
        self.weight = weight.float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over tokens [n]; 0 for a critic that knows nothing, NaN where R is constant."""
    spread = returns.double().var(correction=0)
    return float(1.0 - (returns - values).double().var(correction=0) / spread)


class PPO:
    """How a client learns: its critic, the advantages, and what of all that lasts from round to round.

    Another learner (`grpo.Groups`) has the same two constants and four methods. `advantages` may depend on the past but
    leaves no trace: a server that picks λ from gradients has it called twice in a round.
    """

    group_size = 1  # responses to each prompt, where the settings leave it open
    reads_hidden = True  # whether a batch keeps its hidden states

    def __init__(self, hidden_size: int, config: PPOConfig, device: torch.device | str, k: int) -> None:
        self.config = config
        self.critic = Critic(hidden_size, k, device)

    def advantages(self, batch: Batch) -> Advantages:
        """Token rewards with KL, GAE on the critic as it stands, whitening."""
        mask, rewards = batch.rollout.mask, token_rewards(batch)
        values = self.critic(batch.hidden)  # [B, L, k]
        advantages = gae(rewards, values, mask, self.config.gae_lambda)
        return Advantages(*whiten(advantages, mask), to_go(rewards), values)

    def fit(self, batch: Batch, advantages: Advantages) -> None:
        """Once a round, after its advantages: the critic towards the returns of all real tokens."""
        real = batch.rollout.mask.bool()
        self.critic.fit(batch.hidden[real], advantages.returns[real], self.config.critic_steps)

    def state(self) -> dict[str, Tensor]:
        """The critic, by its dotted name."""
        return {"critic.weight": self.critic.weight}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.critic.weight = tensors["critic.weight"].to(self.critic.weight)


# ---- the gradients -------------------------------------------------------------------------------------------


def surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped objective per token, negated. ratio [B, L], advantages [B, L, k] -> [B, L, k]."""
    ratio = ratio[..., None]
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def jacobian(losses: Tensor, leaves: list[Tensor], keep_graph: bool = False) -> Tensor:
    """J [k, d] from losses [k] that share one graph: k backward passes, no second forward. In the leaves' type."""
    rows = []
    for j, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, leaves, retain_graph=keep_graph or j + 1 < len(losses))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@dataclass
class Gradients:
    """The k gradients of one optimizer step, and what their forward pass showed."""

    J: Tensor  # [k, d]
    first_half: Tensor | None  # [k, d] the part of J from the first half of the rows, `Rollout.half`, if asked for
    entropy: float  # nats per token
    clip_fraction: float  # share of the tokens whose ratio left [1 − ε, 1 + ε]
    approx_kl: float  # KL(π_old ‖ π_θ) per token, the k3 estimate ρ − 1 − log ρ ≥ 0 (Schulman 2020)

    @property
    def halves(self) -> Tensor:
        """Of the two halves of the rows [2, k, d]; they add up to J."""
        return torch.stack([self.first_half, self.J - self.first_half])


def policy_gradients(
    policy: Policy, batch: Batch, advantages: Tensor, config: PPOConfig, halves: bool = False
) -> Gradients:
    """J: per micro-batch one forward pass and k backward passes. advantages [B, L, k], normalised.

    With halves, the first half's part of J too: k more backward passes where the batch is one micro-batch, none else,
    and J is the same to the last bit. Raises NotFinite where a gradient is not finite.
    """
    rollout, adapter = batch.rollout, policy.adapter
    J = adapter.vector().new_zeros(advantages.shape[-1], adapter.size)
    J_first = torch.zeros_like(J) if halves else None
    ratios, entropies = [], []
    for rows, piece in rollout.micro_batches(config.micro_batch_size):
        l = piece.mask.shape[1]
        logp, entropy, _ = policy.logprobs(piece)  # [b, l] each
        ratio = (logp - batch.logp_old[rows, :l]).exp()  # [b, l]
        losses = surrogate(ratio, advantages[rows, :l], config.clip_range) * piece.mask[..., None]  # [b, l, k]
        first = rows < rollout.half  # [b]
        mixed = halves and bool(first.any()) and not bool(first.all())
        gradients = jacobian(losses.sum((0, 1)), adapter.leaves(), keep_graph=mixed)
        J += gradients
        if mixed:
            J_first += jacobian(losses[first].sum((0, 1)), adapter.leaves())
        elif halves and bool(first.all()):
            J_first += gradients
        ratios.append((rows, ratio.detach()))
        entropies.append((rows, entropy))
    tokens = rollout.mask.sum()
    J /= tokens  # only now: 16-bit weights pass back what a 16-bit number holds
    if not torch.isfinite(J).all():
        raise NotFinite(first_not_finite(batch, advantages))
    ratio = assemble(rollout, ratios).masked_fill(rollout.mask == 0, 1.0)  # [B, L]
    return Gradients(
        J,
        J_first / tokens if halves else None,
        entropy=float(assemble(rollout, entropies).sum() / tokens),
        clip_fraction=float(((ratio - 1.0).abs() > config.clip_range).sum() / tokens),
        approx_kl=float((ratio - 1.0 - ratio.log()).sum() / tokens),
    )


def first_not_finite(batch: Batch, advantages: Tensor) -> str:
    """What was not finite first, of all that a gradient is computed from, and a remedy."""
    for what, values, remedy in (
        (
            "log-probs of its responses are",
            batch.logp_old,
            "lower lr, raise temperature, or use dtype float32",
        ),
        ("the base model's log-probs are", batch.logp_ref, "raise temperature, or use dtype float32"),
        ("its calibrated rewards are", batch.scores, "lower missing_eos_penalty, or give rewards of a smaller range"),
        ("the KL coefficient is", torch.tensor(batch.kl_coef), "lower kl_coef"),
        ("its advantages are", advantages, "lower kl_coef, or give rewards of a smaller range"),
    ):
        if not torch.isfinite(values).all():
            return f"{what} not finite; {remedy}"
    return "a policy gradient is not finite; lower lr, or use dtype float32"


# ---- the KL coefficient --------------------------------------------------------------------------------------


def sequence_kl(batch: Batch) -> Tensor:
    """KL(π ‖ π_ref) of each response, the k1 estimate Σ_t (log π − log π_ref)_t, in nats: [B]."""
    return ((batch.logp_old - batch.logp_ref) * batch.rollout.mask).sum(1)


def adapt_kl(kl_coef: float, kl: float, samples: int, config: PPOConfig) -> float:
    """The next κ (Ziegler et al. 2019): κ (1 + clip(kl / target − 1, ±0.2) · min(samples / horizon, 1)).

    kl is per sequence, in nats; the minimum [ours] keeps κ positive for cohorts far larger than the horizon. A
    target of 0 keeps κ as it is.
    """
    if config.kl_target == 0.0:
        return kl_coef
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(samples / config.kl_horizon, 1.0))
