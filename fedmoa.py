"""FedMOA: federated GRPO whose objective weights move, and a server that looks at accuracy (arXiv 2602.00453).

Only the abstract is public: a critic-free client whose weights follow hypergradients, "which prioritizes primary
reasoning as auxiliary objectives saturate", and a "task- and accuracy-aware aggregation" [paper]. All formulas are
[ours]. On the engine of `firm.py`, with the advantages of `grpo.py`, one objective being the primary:

**Weights** (`adapt`). A client's step goes along −Σ_i w_i g_i. Had w_i been larger, the primary's loss after a plain
step θ′ = θ − η Σ_i w_i g_i would have changed by (Baydin et al. 2018, for each objective)

    ∂L_primary(θ′) / ∂w_i = −η ⟨∇L_primary(θ′), g_i⟩

In round t + 1, before its first step, the client has g_primary(θ_{t+1}) on fresh responses: on those it had stepped on,
the product would measure how far the step overshot. It costs nothing more, since that gradient is the first step's row
of J anyway; what is kept for it is g_i of the last step that this client took, M·d numbers, at home and in the
checkpoint. A client that is not sampled keeps its own. The product in units of the primary's own gradients,

    h_i = ⟨∇L_primary(θ_{t+1}), g_i⟩ / (‖∇L_primary(θ_{t+1})‖ max(‖g_i‖, ‖g_primary‖)),

is their cosine, less where g_i is shorter than g_primary; 0 for a gradient of zero. Then

    w ← softmax((1 − pull) log w + pull log w⁰ + rate h)                      w⁰: the preference p

Where h stays as it is, log w_i − log w_j ends (rate / pull) (h_i − h_j) from where the preference has it. An objective
that is saturated has groups of equal rewards and no advantage but the KL's (κ), which is short: h ≈ 0, and its share
falls to those that still help. (Its cosine would be that of the KL, at full length.)
Under Adam, after several local steps and after the server's average, h is no derivative any more.

**Aggregation** (`accuracy_weights`). Within a task q_c ∝ n_c a_c^γ, tasks share the total equally, and θ is the average
under q. a_c is the mean of the primary over the client's responses of this round, between 0 and 1, and noisy; it is
shrunk towards the mean of its task (empirical Bayes). With s² the mean sampling variance of the a_c of a task, each
clustered by prompt, and v their variance between clients,

    a_c ← ā + B (a_c − ā),     B = max(0, v − s²) / v

so that few responses (large s²), or clients no further apart than chance would have them, give equal weights. Where no
client of a task was right, n_c alone counts, with a warning. γ = 0 with one task is FedAvg to the last bit. A client's
task is that of most of its prompts (`task` in the data; without that column there is one task). Accuracy is low where
prompts are hard as well as where data are bad: the server cannot tell.

**Personalisation** (`personalise`). After the last round, local steps from the global adapter, by each client for
itself; nothing is uploaded.

Left out on purpose: what the paper may do beyond its abstract; accuracies remembered from earlier rounds.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import clients
import grpo
from app.fields import Checked, Index, NonNegative, Positive, Share, setting
from clients import Client, LocalTraining
from fedavg import Server, Upload, prompts_held
from firm import LINEAR, Federation, local_update


@dataclass
class FedMOAConfig(Checked):
    """FedMOA's own settings, for its parts wherever they are used."""

    hyper_rate: NonNegative = setting(2.0, "hypergradient weights: how far a cosine of 1 moves log w in a round [ours]")
    hyper_pull: Share = setting(0.1, "hypergradient weights: how far log w returns to the preference's a round [ours]")
    accuracy_power: NonNegative = setting(1.0, "accuracy-aware server: gamma, the power of a client's accuracy [ours]")
    personal_rounds: Index = setting(0, "local rounds of every client on its own after the last one, any method [ours]")
    personal_lr: Positive | None = setting(None, "learning rate in those; the client's if not given [ours]")


# ---- the weights -----------------------------------------------------------------------------------------------


def hypergradient(primary: Tensor, taken: Tensor) -> Tensor:
    """⟨∇L_primary(θ′), g_i⟩ [k] in float64: times −η, the derivative of L_primary(θ′) by w_i.

    primary [d], the primary's gradient at θ′; taken [k, d], the g_i of the step that led there.
    """
    return taken.double() @ primary.double()


def relative(primary: Tensor, taken: Tensor, which: int) -> Tensor:
    """h [k]: the hypergradient in units of the primary's gradients, from −1 to 1. which: the primary's row of taken."""
    lengths = taken.double().norm(dim=1)  # [k]
    unit = primary.double().norm() * torch.maximum(lengths, lengths[which])
    return hypergradient(primary, taken) / torch.where(unit > 0, unit, 1.0)


def next_weights(w: Tensor, prior: Tensor, h: Tensor, settings: FedMOAConfig) -> Tensor:
    """w [k] on the simplex, moved by h [k] and drawn back to prior [k]; a weight of 0 stays 0."""
    pull, logs = settings.hyper_pull, [x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (w, prior)]
    logits = (1 - pull) * logs[0] + pull * logs[1] + settings.hyper_rate * h
    return torch.softmax(torch.where(prior > 0, logits, -torch.inf), 0)


def adapt(training: LocalTraining, epoch: int, J: Tensor, settings: FedMOAConfig) -> None:
    """Move a training's weights before the first step of a round, by that step's J [k, d]; keep the last step's."""
    if epoch == 0 and training.taken is not None:
        h = relative(J[training.primary], training.taken.to(J), training.primary).cpu()
        training.preference = next_weights(training.preference, training.prior, h, settings)
    training.taken = J


# ---- the server ------------------------------------------------------------------------------------------------


def accuracy(client: Client, raw: Tensor, S: int) -> dict[str, float]:
    """What a client's upload says beside the adapter: its task, and the mean of the primary with its sampling variance.

    raw [B, M], S consecutive rows to a prompt. The variance is that of the prompts' means, over their number; of one
    prompt it is a(1 − a), all that is known. Raises ValueError for a primary reward outside 0 to 1.
    """
    rewards = raw[:, client.objectives[client.primary]]  # [B]
    if rewards.min() < 0 or rewards.max() > 1:
        raise ValueError(
            f"aggregation: accuracy needs a primary reward from 0 to 1, but client {client.index} got one of "
            f"{float(rewards.min() if rewards.min() < 0 else rewards.max()):g}; use --aggregation fedavg"
        )
    by_prompt, mean = rewards.unflatten(0, (-1, S)).mean(1), rewards.mean()
    variance = by_prompt.var() / len(by_prompt) if len(by_prompt) > 1 else mean * (1 - mean)
    return {"task": float(client.task), "accuracy": float(mean), "accuracy_variance": float(variance)}


def shrunk(accuracies: Tensor, variances: Tensor) -> Tensor:
    """The accuracies [C] of one task's clients, drawn towards their mean by what chance explains of their spread."""
    mean, between = accuracies.mean(), accuracies.var() if len(accuracies) > 1 else accuracies.new_zeros(())
    beyond_chance = (between - variances.mean()).clamp_min(0.0)
    return mean + beyond_chance / torch.where(between > 0, between, 1.0) * (accuracies - mean)


def accuracy_weights(uploads: Sequence[Upload], server: Server) -> Tensor:
    """What each upload counts in the average [C], float64, of any sum: tasks alike, within a task n_c a_c^γ."""
    held = prompts_held(uploads)
    task, accuracies, variances = (
        torch.tensor([upload.numbers[name] for upload in uploads], dtype=torch.float64)
        for name in ("task", "accuracy", "accuracy_variance")
    )
    weights = torch.zeros_like(held)
    for number in task.unique():
        own, power = task == number, server.settings.accuracy_power
        a = shrunk(accuracies[own], variances[own])
        if power and not a.max() > 0:
            warnings.warn("no client of a task was right; its clients are weighed by their prompts alone", stacklevel=2)
            power = 0.0
        q = held[own] * (a / torch.where(a.max() > 0, a.max(), 1.0)) ** power  # over the largest: no power is too high
        weights[own] = q * (held.sum() / q.sum())  # tasks alike; a factor of exactly 1 for one task at γ = 0
    return weights


# ---- the method ------------------------------------------------------------------------------------------------

FEDMOA = replace(
    LINEAR, name="fedmoa", help="GRPO, weights that follow the primary's hypergradients, accuracy-aware average",
    learner=grpo.GRPO, adapt=adapt, numbers=accuracy, client_weights=accuracy_weights, settings=FedMOAConfig(),
)  # fmt: skip


def personalise(federation: Federation, client: Client, settings: FedMOAConfig) -> Tensor:
    """The adapter [d] of a client after local rounds on its own from θ, each on fresh responses.

    Neither the federation nor what the client keeps changes; the adapter is left at θ. For one training per client.
    What an average of many clients would do to the noise of their steps, a lower rate has to do here.
    """
    policy, method, config, theta = federation.policy, federation.method, federation.config, federation.theta
    if settings.personal_lr:
        config = replace(config, client=replace(config.client, lr=settings.personal_lr))
    (training,) = copy.deepcopy(client.trainings)
    for i in range(settings.personal_rounds):
        policy.adapter.assign(theta)
        responses = federation.respond([client], clients.PERSONAL, federation.group_size, i)
        (batch,) = federation.prepare([client], responses)
        theta = local_update(training, policy, theta, batch.combined(training.columns), method, config).theta
    policy.adapter.assign(federation.theta)
    return theta
