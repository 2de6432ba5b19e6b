"""PPO with k rewards at once: k advantages, k clipped losses, one forward pass.

For every reward j, on the tokens t of one response (Schulman et al. 2017; Ziegler et al. 2019):

    r_{j,t} = −κ (log π_old − log π_ref)_t + R_j [t is the last token]          token reward, k1 KL
    A_{j,t} = Σ_l (γ μ)^l δ_{j,t+l},   δ_{j,t} = r_{j,t} + γ V_j(t+1) − V_j(t)    GAE, μ is `gae_lambda`
    Â_j     = (A_j − mean) / max(σ_j, 0.1 σ_j⁰)                                  whitening per reward
    L_j(θ)  = −mean_t min(ρ_t Â_{j,t}, clip(ρ_t, 1 − ε, 1 + ε) Â_{j,t}),         ρ_t = π_θ / π_old
    g_j     = ∇_θ L_j                                                          row j of J [k, d]

FIRM's rewards are its M objectives; methods that combine objectives before they train have fewer.

[paper] PPO per objective, the KL watched against a target.
[code: RiC] adaptive κ: initial 0.2, target 3 per sequence.
[ours] the KL in every objective's reward; whitening and its floor (σ_j⁰ = 1, the scale of a calibrated score on the
base policy, stands for that of its advantages: a near-constant objective must not be blown up into noise); the critic,
one linear layer with k outputs on detached hidden states, zero at the start, with its own optimizer.

Means over tokens are over the tokens of the whole client batch, whatever the micro-batches. Left out on purpose: an
entropy bonus.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from app.fields import Checked, Count, NonNegative, Positive, Share, setting
from app.stopwatch import phase
from rollout import Policy, Rollout, assemble

SCALE_FLOOR = 0.1  # of σ_j⁰, in calibrated units: an advantage is never divided by less


@dataclass
class PPOConfig(Checked):
    """The local update of one client."""

    epochs: Count = setting(3, "K, optimizer steps on each batch [paper: 3]")
    clip_range: Positive = setting(0.2, "epsilon of the clipped surrogate [ours: the usual 0.2]")
    value_clip: Positive = setting(0.2, "how far a value may move in one round before its gradient is cut off [ours]")
    gamma: Share = setting(1.0, "discount per token")
    gae_lambda: Share = setting(0.95, "GAE: 0 trusts the critic, 1 the sampled return [ours: the usual 0.95]")
    critic_lr: NonNegative = setting(1e-3, "Adam rate of the critic [ours]")
    kl_coef: NonNegative = setting(0.2, "kappa, weight of the KL in the reward, at the start [code: RiC, 0.2]")
    kl_target: NonNegative = setting(
        3.0, "KL per sequence, in nats, that kappa adapts to; 0 keeps kappa fixed [code: RiC, 3]"
    )
    kl_horizon: Count = setting(1000, "cohort samples over which kappa adapts")
    missing_eos_penalty: NonNegative = setting(0.0, "taken off every calibrated score of a response that never ends")
    micro_batch_size: Count | None = setting(None, "rows per forward pass; the whole client batch where not given")


@dataclass
class Batch:
    """One client's responses, B rows of at most L tokens, and what is known of them at θ_t."""

    rollout: Rollout
    scores: Tensor  # [B, k] calibrated
    logp_old: Tensor  # [B, L] log π_θt of every token
    logp_ref: Tensor  # [B, L] log π_ref
    hidden: Tensor  # [B, L, H] the states that the tokens were predicted from
    kl_coef: float  # κ

    def combined(self, columns: Tensor) -> "Batch":
        """The same responses with the rewards scores @ columns; columns [k, k′]."""
        return replace(self, scores=self.scores @ columns.to(self.scores))

    def logp_gap(self) -> float:
        """Largest |log π_sampler − log π_old| over the real tokens, in nats."""
        return float(((self.rollout.sampled_logp - self.logp_old).abs() * self.rollout.mask).max())


@phase("reference")
def prepare(policy: Policy, rollout: Rollout, scores: Tensor, kl_coef: float, config: PPOConfig) -> Batch:
    """The batch at θ_t, where the adapter must stand. scores [B, k] calibrated, the penalty not yet taken off."""
    scores = scores.to(policy.device, torch.float32)
    logp_old, hidden = policy.logprobs_in_pieces(rollout, config.micro_batch_size)  # [B, L], [B, L, H]
    with policy.adapter.disabled():
        logp_ref, _ = policy.logprobs_in_pieces(rollout, config.micro_batch_size)  # [B, L]
    scores = scores - config.missing_eos_penalty * (~rollout.ended)[:, None]
    return Batch(rollout, scores, logp_old, logp_ref, hidden, kl_coef)


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
    kl = -batch.kl_coef * (batch.logp_old - batch.logp_ref) * mask  # [B, L]
    rewards = kl[..., None].repeat(1, 1, scores.shape[1])  # [B, L, k]
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores.to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), per reward.

    rewards, values [B, L, k], mask [B, L], 1 on a prefix of each row; the value after the last real token is 0.
    Returns advantages and returns (their sum with the values), [B, L, k], 0 where masked.
    """
    m = mask[..., None].to(values.dtype)  # [B, L, 1]
    values = values * m
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])  # A_{t+1}  [B, k]
    next_value = torch.zeros_like(ahead)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = (delta + gamma * gae_lambda * ahead) * m[:, t]
        advantages[:, t] = ahead
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Â [B, L, k]: mean 0 and deviation 1 per column over the real tokens; divides by max(σ, floor)."""
    centred = (advantages - masked_mean(advantages, mask)) * mask[..., None]
    return centred / masked_std(advantages, mask).clamp_min(floor)


@dataclass
class Advantages:
    """What a learner makes of a batch: one column per reward. A learner without a critic has no returns and values."""

    whitened: Tensor  # [B, L, k]
    scale: Tensor  # [k] σ before whitening
    returns: Tensor | None = None  # [B, L, k] what the critic fits
    values: Tensor | None = None  # [B, L, k] what the critic said before the update


# ---- how a client learns: with a critic ----------------------------------------------------------------------


class Critic(nn.Linear):
    """V_j(t), j = 1..k: one linear layer on the policy's detached hidden states, zero at the start, float32."""

    def __init__(self, hidden_size: int, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(hidden_size, k, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, L, H] of any type -> values [B, L, k]."""
        return super().forward(hidden.float())


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²), mean over tokens, summed over rewards: a scalar.

    values, old, returns [B, L, k], mask [B, L].
    """
    cut = old + (values - old).clamp(-clip, clip)
    worst = torch.maximum((values - returns).square(), (cut - returns).square())
    return 0.5 * masked_mean(worst, mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R), [k]; 0 for a critic that knows nothing, NaN where the returns do not vary."""
    return 1.0 - (masked_std(returns - values, mask) / masked_std(returns, mask)).square()


class PPO:
    """How a client learns: its critic, the advantages, the loss, and what of all that lasts from round to round.

    Another learner (groups of responses, say) has the same `config` and five methods. `advantages` may depend on the
    past but leaves no trace: a server that picks λ from gradients has it called twice in a round.
    """

    def __init__(self, hidden_size: int, config: PPOConfig, device: torch.device | str, k: int) -> None:
        self.config = config
        self.critic = Critic(hidden_size, k, device)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr)

    def advantages(self, batch: Batch) -> Advantages:
        """Token rewards with KL, GAE on the critic as it stands, whitening; σ⁰ = 1, so the floor is 0.1."""
        mask, config = batch.rollout.mask, self.config
        with torch.no_grad():
            values = self.critic(batch.hidden)  # [B, L, k]
        advantages, returns = gae(token_rewards(batch), values, mask, config.gamma, config.gae_lambda)
        return Advantages(whiten(advantages, mask, SCALE_FLOOR), masked_std(advantages, mask), returns, values)

    def losses(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The k losses per token, before their mean: ratio ρ [b, l], advantages [b, l, k] -> [b, l, k]."""
        return surrogate(ratio, advantages, self.config.clip_range)

    def fit(self, hidden: Tensor, advantages: Advantages, mask: Tensor) -> None:
        """After each optimizer step: one step of the critic towards its returns. hidden [B, L, H], mask [B, L]."""
        loss = value_loss(self.critic(hidden), advantages.values, advantages.returns, mask, self.config.value_clip)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The critic and its optimizer's moments, by dotted names."""
        tensors = {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        return tensors | moments_to_tensors("critic_adam", self.critic_optimizer.state_dict()["state"])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.critic.load_state_dict({name: tensors[f"critic.{name}"] for name in self.critic.state_dict()})
        moments = moments_from_tensors("critic_adam", tensors)
        self.critic_optimizer.load_state_dict(self.critic_optimizer.state_dict() | {"state": moments})


def moments_to_tensors(owner: str, moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's state as flat names: OWNER.PARAMETER.NAME."""
    return {f"{owner}.{i}.{name}": tensor for i, entry in moments.items() for name, tensor in entry.items()}


def moments_from_tensors(owner: str, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `moments_to_tensors`; other owners' tensors are passed over."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{owner}."):
            i, name = key.removeprefix(f"{owner}.").split(".")
            moments.setdefault(int(i), {})[name] = tensor
    return moments


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
    first_half: Tensor | None  # [k, d] the part of J that the first half of the rows gave, where it was asked for
    hidden: Tensor  # [B, L, H]
    entropy: float  # nats per token
    clip_fraction: float  # share of the tokens whose ratio left [1 − ε, 1 + ε]
    approx_kl: float  # KL(π_old ‖ π_θ) per token, the k3 estimate ρ − 1 − log ρ ≥ 0 (Schulman 2020)

    @property
    def halves(self) -> Tensor:
        """Of the two halves of the rows [2, k, d]; they add up to J."""
        return torch.stack([self.first_half, self.J - self.first_half])


def policy_gradients(policy: Policy, batch: Batch, advantages: Tensor, learner: PPO, halves: bool = False) -> Gradients:
    """J: per micro-batch one forward pass and k backward passes. advantages [B, L, k].

    With halves, the first half's part of J too: k more backward passes where the batch is one micro-batch, none else,
    and J is the same to the last bit. Raises ValueError where a gradient is not finite.
    """
    config, rollout, adapter = learner.config, batch.rollout, policy.adapter
    J = adapter.vector().new_zeros(advantages.shape[-1], adapter.size)
    J_first = torch.zeros_like(J) if halves else None
    hiddens, ratios, entropies = [], [], []
    for rows, piece in rollout.micro_batches(config.micro_batch_size):
        l = piece.mask.shape[1]
        logp, entropy, hidden = policy.logprobs(piece)  # [b, l], [b, l], [b, l, H]
        ratio = (logp - batch.logp_old[rows, :l]).exp()  # [b, l]
        losses = learner.losses(ratio, advantages[rows, :l]) * piece.mask[..., None]  # [b, l, k]
        first = rows < (len(rollout) + 1) // 2  # [b]
        mixed = halves and bool(first.any()) and not bool(first.all())
        gradients = jacobian(losses.sum((0, 1)), adapter.leaves(), keep_graph=mixed)
        J += gradients
        if mixed:
            J_first += jacobian(losses[first].sum((0, 1)), adapter.leaves())
        elif halves and bool(first.all()):
            J_first += gradients
        for kept, values in ((hiddens, hidden), (ratios, ratio), (entropies, entropy)):
            kept.append((rows, values.detach()))
    tokens = rollout.mask.sum()
    J /= tokens  # only now: 16-bit weights pass back what a 16-bit number holds
    if not torch.isfinite(J).all():
        raise ValueError("lr: a policy gradient is not finite; lower lr, or use dtype float32")
    ratio = assemble(rollout, ratios).masked_fill(rollout.mask == 0, 1.0)  # [B, L]
    return Gradients(
        J,
        J_first / tokens if halves else None,
        assemble(rollout, hiddens),
        entropy=float(assemble(rollout, entropies).sum() / tokens),
        clip_fraction=float(((ratio - 1.0).abs() > config.clip_range).sum() / tokens),
        approx_kl=float((ratio - 1.0 - ratio.log()).sum() / tokens),
    )


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
