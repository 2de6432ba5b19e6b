"""FedMOA: federated GRPO whose objective weights move, and a server that looks at accuracy (arXiv 2602.00453).

We had the abstract only: a critic-free client whose weights follow hypergradients, "which prioritizes primary reasoning
as auxiliary objectives saturate", and a "task- and accuracy-aware aggregation" [paper]. All formulas are [ours]. The
first objective is the primary one, P.

**Weights** (`moving_weights`). A client's step goes along −Σ_i w_i g_i. A larger w_i would change the primary's loss
after a plain step θ′ = θ − η Σ_i w_i g_i by (Baydin et al. 2018, for each objective)

    ∂L_P(θ′) / ∂w_i = −η ⟨∇L_P(θ′), g_i⟩

So w descends on L_P by exponentiated gradients. g_i, g_P are the gradients of this client's last step, in an earlier
round, and g̃_P is the primary's gradient now, before the first step of this round,

    h_i = ⟨g̃_P, g_i⟩ / (‖g̃_P‖ max(‖g_i‖, ‖g_P‖))             their cosine, scaled down if g_i is shorter than g_P
    w   ← softmax((1 − pull) log w + pull log w⁰ + rate h)     w⁰: the preference p; the first round has w⁰

An average over clients and several steps of Adam lie between the two, so h only resembles a derivative. g̃_P is on
fresh responses, because on those of the last step the product would measure its overshoot.

If h stays as it is, log w_i − log w_j ends (rate / pull) (h_i − h_j) from the preference's. A saturated auxiliary has
groups of equal rewards, so only the KL's short gradient: h ≈ 0, and its share falls to those that still help. If the
primary has only equal groups, g̃_P says nothing, and the weights stay.

**Aggregation** (`accuracy_weights`). Within a task q_c ∝ n_c a_c^γ, the tasks of a round's clients share the total
equally (so γ = 0 is FedAvg for one task only), and θ is the average under q. a_c is the mean of the primary over the
client's responses of this round, from 0 to 1, shrunk towards the mean of its task since it is noisy (empirical Bayes).
With s² the mean sampling variance of a task's a_c, each clustered by prompt, and v their variance between clients,

    a_c ← ā + B (a_c − ā),     B = max(0, v − s²) / v

If no client of a task was right, n_c alone counts, with a warning. A client's task is that of most of its prompts
(`task` in the data). The server cannot tell hard prompts from bad data: both make accuracy low.

**Personalisation** (`personalise`). After the last round each client trains by itself from the global adapter.

Left out on purpose: accuracies remembered from earlier rounds, weights on the server.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clients import Client, Context, Purpose
from fedavg import Aggregation, Upload, prompts_held
from firm import LINEAR, Federation, Weights, contexts, local_update
from grpo import GRPO
from ppo import NotFinite
from settings import Config

HYPER_PULL = 0.1  # how far log w returns to the preference's in a round [ours]
PERSONAL_LR = 0.2  # of the client's learning rate: no average takes the noise out of personal steps [ours]


def hypergradients(primary: Tensor, taken: Tensor) -> Tensor:
    """h [k] in float64, from −1 to 1; primary g̃_P [d] at θ′, taken [k, d] the g_i of the step there, g_P first."""
    primary, taken = primary.double(), taken.double()
    lengths = taken.norm(dim=1)  # [k]
    unit = primary.norm() * torch.maximum(lengths, lengths[0])
    return taken @ primary / torch.where(unit > 0, unit, 1.0)


def next_weights(w: Tensor, prior: Tensor, h: Tensor, rate: float) -> Tensor:
    """w [k] on the simplex, moved by h [k] and drawn back to prior [k]; what the prior leaves out stays out."""
    log = lambda x: x.clamp_min(torch.finfo(x.dtype).tiny).log()  # noqa: E731
    logits = (1 - HYPER_PULL) * log(w) + HYPER_PULL * log(prior) + rate * h
    return torch.softmax(torch.where(prior > 0, logits, -torch.inf), 0)


def varies(scores: Tensor, S: int) -> bool:
    """Whether any group's scores differ, S consecutive rows of scores [B]; without groups (S = 1), any at all."""
    groups = scores.unflatten(0, (-1, S if S > 1 else len(scores)))
    return bool((groups != groups[:, :1]).any())


def moving_weights(context: Context) -> Tensor:
    """w [k]; it moves once a round, before the first step, by the primary's gradient now and this client's last g_i."""
    state, scores, S = context.state, context.batch.scores, context.batch.rollout.group_size
    w = state.get("weights", context.preference)
    if context.epoch == 0 and "taken" in state and varies(scores[:, 0], S):
        h = hypergradients(context.J[0], state["taken"].to(context.J)).cpu()
        w = next_weights(w, context.preference, h, context.config.hyper_rate)
    state["weights"], state["taken"] = w, context.J  # J is k·d numbers, kept from round to round
    return w


def accuracy_numbers(client: Client, raw: Tensor, S: int) -> dict[str, float]:
    """What a client's upload says beside the adapter: its task, and the mean of the primary with its sampling variance.

    raw [B, M], S consecutive rows to a prompt. The variance is that of the prompts' means, over their number; of one
    prompt it is a(1 − a), all that is known. Raises ValueError for a primary reward outside 0 to 1.
    """
    rewards = raw[:, 0]  # [B]
    for x in rewards.tolist():
        if not 0 <= x <= 1:
            who = f"client {client.index} got one of {x:g}"
            raise ValueError(f"aggregation: accuracy needs a primary from 0 to 1, but {who}; use --aggregation fedavg")
    by_prompt, mean = rewards.unflatten(0, (-1, S)).mean(1), rewards.mean()
    variance = by_prompt.var() / len(by_prompt) if len(by_prompt) > 1 else mean * (1 - mean)
    return {"task": float(client.task), "accuracy": float(mean), "accuracy_variance": float(variance)}


def shrunk(accuracies: Tensor, variances: Tensor) -> Tensor:
    """The accuracies [C] of one task's clients, drawn towards their mean by what chance explains of their spread."""
    mean, between = accuracies.mean(), accuracies.var() if len(accuracies) > 1 else accuracies.new_zeros(())
    beyond_chance = (between - variances.mean()).clamp_min(0.0)
    return mean + beyond_chance / torch.where(between > 0, between, 1.0) * (accuracies - mean)


def accuracy_weights(uploads: Sequence[Upload], config: Config) -> Tensor:
    """What each upload counts in the average [C], float64, of any sum: tasks alike, within a task n_c a_c^γ."""
    held = prompts_held(uploads)
    task, accuracies, variances = (
        torch.tensor([upload.numbers[name] for upload in uploads], dtype=torch.float64)
        for name in ("task", "accuracy", "accuracy_variance")
    )
    weights = torch.zeros_like(held)
    for number in task.unique():
        own, power = task == number, config.accuracy_power
        a = shrunk(accuracies[own], variances[own])
        if power and not a.max() > 0:
            what = "no client of a task was right: its clients are weighed by their prompts alone"
            warnings.warn(what, stacklevel=2)
            power = 0.0
        q = held[own] * (a / torch.where(a.max() > 0, a.max(), 1.0)) ** power  # over the largest: no power is too high
        weights[own] = q * (held.sum() / q.sum())  # tasks alike; a factor of exactly 1 for one task at γ = 0
    return weights


HYPERGRADIENT = Weights(
    "hypergradient", "as fedmoa, by what helped the primary", moving_weights, settings=("preference", "hyper_rate"),
    needs_primary=True,
)  # fmt: skip
ACCURACY = Aggregation(
    "accuracy", "as fedmoa, by the primary's mean, tasks alike", accuracy_weights, accuracy_numbers,
    settings=("accuracy_power",), needs_primary=True,
)  # fmt: skip
FEDMOA = replace(
    LINEAR, name="fedmoa", help="GRPO, weights that follow the primary's hypergradients, accuracy-aware average",
    estimator=GRPO, weights=HYPERGRADIENT, aggregation=ACCURACY,
)  # fmt: skip


def personalise(federation: Federation, client: Client) -> Tensor:
    """The adapter [d] of a client after `personal_rounds` local rounds on its own from θ, each on fresh responses.

    Its weights go on moving and its critic goes on being fitted, on copies: neither the federation nor what the client
    keeps changes, and the adapter is left at θ. A client stops before a step that is not finite.
    """
    policy, method, theta, state = federation.policy, federation.method, federation.theta, client.state
    config = replace(federation.config, lr=PERSONAL_LR * federation.config.lr)
    for i in range(config.personal_rounds):
        policy.adapter.assign(theta)
        ((_, batch, _),) = federation.batches([client], Purpose.PERSONAL, i)
        (context,) = contexts(replace(client, state=state), batch, {"theta": theta}, method, config, i)
        try:
            local_update(policy, context, method)
        except NotFinite as error:
            warnings.warn(f"client {client.index} ends its personal rounds: {error}", stacklevel=2)
            break
        theta, state = context.theta, [context.state]
    policy.adapter.assign(federation.theta)
    return theta
