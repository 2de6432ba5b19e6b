"""Advantages from groups of responses, without a critic: S responses to a prompt are each other's baseline.

For response i of a group, its objective j and its token t:

    D_j(i)   = R_j(i) − mean of R_j over the other S − 1                              leave-one-out (RLOO)
    A_{j,t}  = D_j − κ KL_t,   KL_t = Σ_{u ≥ t} (log π_old − log π_ref)_u        the KL per token, outside the baseline
    Â_{j,t}  = A_{j,t} / max(σ_j, 0.1)                                        `GROUP`
    Â_{j,t}  = (R_j − mean of the group) / max(s_j, 0.1) − κ KL_t             `GRPO`

σ_j is the deviation of A_j over the real tokens of the client's batch, s_j that of the group's scores alone. `GROUP`
divides the KL by σ_j and `GRPO` does not, so equal κ weigh it differently. Floors are in calibrated units.

D_j is S / (S − 1) times R_j − mean of the group, and unbiased until it is divided. A prompt's own level, which all its
responses share, cancels in it; a critic must learn that level.

[RLOO, arXiv 2402.14740] the baseline. [GRPO, arXiv 2402.03300] s_j, the sample deviation of a group, which favours
prompts that are nearly solved or nearly hopeless (Dr. GRPO, arXiv 2503.20783): here to compare with.
[ours] per objective (as GDPO, arXiv 2601.05242: rewards that are added up before they are normalised let different ones
pass for the same); σ_j and the floors; no centring over the batch: a group of equal scores then gives exactly no
gradient if κ = 0; κ in the reward, as with a critic, for GRPO too.

Left out on purpose: what GRPO's successors change in the loss (clipping from one side only, lengths).
"""

from dataclasses import replace

import torch
from torch import Tensor

from ppo import SCALE_FLOOR, Advantages, Batch, Estimator, masked_std, to_go, token_rewards
from settings import UpdateSettings


def leave_one_out(scores: Tensor, S: int) -> Tensor:
    """D [B, k]: each score less the mean of the other S − 1 of its group, S consecutive rows of scores [B, k]."""
    groups = scores.unflatten(0, (-1, S))  # [B / S, S, k]
    differences = groups[:, :, None] - groups[:, None]  # [B / S, S, S, k], exactly 0 for equal scores
    return (differences.sum(2) / (S - 1)).flatten(0, 1)


def per_token(batch: Batch, relative: Tensor) -> Tensor:
    """A [B, L, k]: D [B, k] on every token, and the KL rewards from this token to the end."""
    return to_go(token_rewards(replace(batch, scores=relative)))  # 0 after the last token: there is none to come


def group_advantages(batch: Batch, state: dict[str, Tensor], config: UpdateSettings) -> Advantages:
    """Leave-one-out per objective, with the KL that is still to come, over their deviation in the batch."""
    advantages = per_token(batch, leave_one_out(batch.scores, batch.rollout.group_size))
    scale = masked_std(advantages, batch.rollout.mask)
    return Advantages(advantages / scale.clamp_min(SCALE_FLOOR), scale)


def grpo_advantages(batch: Batch, state: dict[str, Tensor], config: UpdateSettings) -> Advantages:
    """The scores of a group, less their mean, over their own deviation; the KL as it is."""
    S = batch.rollout.group_size
    spread = batch.scores.unflatten(0, (-1, S)).std(1).repeat_interleave(S, 0)  # [B, k]
    relative = (S - 1) / S * leave_one_out(batch.scores, S) / spread.clamp_min(SCALE_FLOOR)
    return Advantages(per_token(batch, relative), torch.ones_like(relative[0]))


GROUP = Estimator("group", "group_size responses to a prompt, without a critic", group_advantages, group_size=4)
GRPO = Estimator("grpo", "the same over the group's own deviation", grpo_advantages, group_size=4)
