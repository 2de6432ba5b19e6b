"""PluralLLM: groups teach one model what each prefers, without sharing their answers (arXiv 2503.09925).

A group (a country, say) holds answers to survey questions: the share of its people who chose each option. The predictor
is given some questions as a group answered them, and says how that group answers others. Clients, which hold a group or
several, train it by FedAvg; then it is asked about other groups.

    predictor: a point is x ⊕ y, x the embedding of "question option", y the option's share; targets have y = 0 [code]
    for t = 0 … T − 1                                                    [code: T = 100]
        each client c, from θ_t, repeats `local_steps` times:            [code: 6]
            of each of its groups g draw questions as context and others as targets
            L_c = Σ_g (n_g / n_c) mean over target points of −log N(y; softmax of m within its question, exp(s))
            one step of Adam, whose moments stay with the client; its rate decays every step    [code]
        θ_{t+1} = Σ_c (n_c / n) θ_c,  n_c the points that c holds (`fedavg.average`)

The architecture is [code]'s, which is that of Group Preference Optimization (arXiv 2310.11523). Four linear layers
embed a point. In six transformer layers without positions every point attends to the context points only: keys and
values come from the context rows, so no target sees another. A head gives mean m and log-deviation s.

Context and targets have 9 to 90 questions each, drawn for every step [code]. A draw depends on (seed, step, group):
central training, which is one client that holds all groups, draws alike. Where we differ [ours]:
- A group with fewer than 180 questions draws from what it has, and keeps at least 9 as targets.
- n_c counts all points that a client holds; in [code] it counts the points of the round's first draw.
- Clients train on all their questions, as the central side does; [code]'s clients train on the first 90 %.
- x embeds the question and one option; [code] also embeds an instruction, all options and the option's letter.
- The rate decays once, over the whole training; [code]'s cosine has 100 steps and then rises again.
- `max_grad_norm`, off by default. The deviation s gives gradients heavy tails; unclipped, the loss jumps on some seeds.

Left out on purpose: batches of several draws, dropout (0 in [code] too).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, parameters_to_vector, vector_to_parameters

from clients import Purpose, stream
from fedavg import average, sample_clients
from settings import Config

WIDTH, LAYERS, HEADS, EMBEDDERS = 128, 6, 4, 4  # of the predictor [code]
CONTEXT_QUESTIONS, CONTEXT_DRAWS = 20, 20  # of the evaluation [code; ours]


@dataclass(frozen=True)
class Question:
    """A question and its options, as texts."""

    text: str
    options: tuple[str, ...]


Answers = dict[str, dict[int, Tensor]]  # group -> number of a question -> shares [k]


class Survey:
    """Questions with embedded options, and what groups answered.

    embeddings [P, E]: a row per option of every question, in order. All tensors lie on the embeddings' device.
    """

    def __init__(self, questions: Sequence[Question], embeddings: Tensor, answers: Answers) -> None:
        device = embeddings.device
        self.questions, self.embeddings = list(questions), embeddings
        self.answers = {group: {q: y.to(device) for q, y in asked.items()} for group, asked in answers.items()}
        self.rows = torch.arange(len(embeddings), device=device).split([len(q.options) for q in questions])
        self.position = {group: i for i, group in enumerate(answers)}  # a group's draws depend on it
        self.n_points = {group: sum(map(len, asked.values())) for group, asked in answers.items()}  # n_g

    def points(self, group: str, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(x [n, E], y [n], which [n]) of some of a group's questions; which: the position of each point's question."""
        rows = [self.rows[q] for q in chosen]
        which = torch.cat([torch.full_like(row, position) for position, row in enumerate(rows)])
        return self.embeddings[torch.cat(rows)], torch.cat([self.answers[group][q] for q in chosen]), which


class Layer(nn.Module):
    """A transformer layer, normalised after each half, in which all rows attend to those of the context."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        """rows [n, WIDTH], context [C, WIDTH]; returns [n, WIDTH]."""
        rows = self.norm1(rows + self.attention(rows, context, context, need_weights=False)[0])
        return self.norm2(rows + self.feedforward(rows))


class Predictor(nn.Module):
    """From a group's answers to its answers on others; 1,188,354 parameters at [code]'s width of embeddings, 4,096."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width + 1] + [WIDTH] * EMBEDDERS
        linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.embed = nn.Sequential(*(part for layer in linear for part in (layer, nn.ReLU())))[:-1]  # none at the end
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
        self.width = width

    def forward(self, context_x: Tensor, context_y: Tensor, target_x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean m [T], log-deviation s [T]) of the target points x [T, E], given context points x [C, E], y [C]."""
        C = len(context_x)
        x = torch.cat([context_x, target_x])  # [C + T, E]
        y = torch.cat([context_y, context_y.new_zeros(len(target_x))])  # [C + T]
        rows = self.embed(torch.cat([x, y[:, None]], 1))  # [C + T, WIDTH]
        for layer in self.layers[:-1]:
            rows = layer(rows, rows[:C])
        return self.head(self.layers[-1](rows[C:], rows[:C])).unbind(1)  # of the last layer only targets are read

    @torch.no_grad()
    def shares(self, context_x: Tensor, context_y: Tensor, target_x: Tensor, which: Tensor) -> Tensor:
        """The predicted share of every target point [T]; which [T] as in `Survey.points`."""
        return softmax_within(self(context_x, context_y, target_x)[0], which)


def softmax_within(m: Tensor, which: Tensor) -> Tensor:
    """Softmax of m [T] over the points of each question; which [T]: the question's position, from 0."""
    count = int(which.max()) + 1
    top = m.detach().new_full((count,), -torch.inf).scatter_reduce(0, which, m.detach(), "amax")  # for the range only
    e = (m - top[which]).exp()
    return e / e.new_zeros(count).index_add(0, which, e)[which]


def loss(m: Tensor, s: Tensor, y: Tensor, which: Tensor) -> Tensor:
    """Mean over points of −log N(y; softmax of m within its question, exp(s)) [code]; all [T]."""
    deviation = (y - softmax_within(m, which)) * (-s).exp()
    return (0.5 * deviation.square() + s + 0.5 * math.log(2 * math.pi)).mean()


def draw(available: Sequence[int], least: int, most: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(context, targets), of the questions available to a group; `least` to `most` of each."""
    n = len(available)
    context = int(rng.integers(least, min(most, n - least) + 1))
    targets = int(rng.integers(least, min(most, n - context) + 1))
    order = [available[i] for i in rng.permutation(n)]
    return order[:context], order[context : context + targets]


class PredictorFederation:
    """The server and its clients, each a list of groups. State: theta [d], rounds_done, every client's Adam moments."""

    def __init__(self, survey: Survey, clients: Sequence[Sequence[str]], config: Config) -> None:
        self.survey, self.clients, self.config = survey, clients, config
        self.n_points = torch.tensor([sum(map(survey.n_points.get, groups)) for groups in clients])  # n_c [C]
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = Predictor(survey.embeddings.shape[1]).to(survey.embeddings.device)
        self.parameters = list(self.model.parameters())
        self.adams = [torch.optim.Adam(self.parameters, fused=True) for _ in clients]  # the clients share one model
        self.theta = parameters_to_vector(self.parameters).detach()
        self.rounds_done = 0

    def load(self) -> None:
        """Copy θ into the model."""
        vector_to_parameters(self.theta.clone(), self.parameters)  # a clone: the parameters become views of it

    def round(self) -> dict[str, float]:
        """One communication round. Returns its figures. Raises ValueError if a client's predictor is not finite."""
        t, per_round = self.rounds_done, self.config.clients_per_round or len(self.clients)
        cohort = sample_clients(len(self.clients), per_round, stream(self.config.seed, Purpose.COHORT, t))
        thetas, losses = [], []
        for c in cohort:
            self.load()
            losses += self.local_steps(c)
            thetas.append(parameters_to_vector(self.parameters).detach())
            if not thetas[-1].isfinite().all():
                raise ValueError(f"lr: client {c}'s predictor is not finite after round {t}; lower lr or max_grad_norm")
        self.theta = average(torch.stack(thetas), self.n_points[cohort])
        self.load()
        self.rounds_done += 1
        size = self.theta.nbytes  # of the message to a client, and of its answer
        return {"round": t, "loss": float(np.mean(losses)), "upload_bytes": size, "download_bytes": size}

    def local_steps(self, c: int) -> list[float]:
        """Client c's steps of this round, on the model as it stands. Returns L_c before each."""
        K, adam, losses = self.config.local_steps, self.adams[c], []
        for step in range(self.rounds_done * K, (self.rounds_done + 1) * K):
            adam.zero_grad()
            losses.append(0.0)
            for group in self.clients[c]:
                rng = stream(self.config.seed, Purpose.PREDICTOR_TRAINING, step, self.survey.position[group])
                context, targets = draw(list(self.survey.answers[group]), *self.config.questions, rng)
                x, y, _ = self.survey.points(group, context)
                target_x, target_y, which = self.survey.points(group, targets)
                share = self.survey.n_points[group] / int(self.n_points[c])  # n_g / n_c
                part = share * loss(*self.model(x, y, target_x), target_y, which)
                part.backward()  # adds to the gradient of the groups before
                losses[-1] += part.item()
            if self.config.max_grad_norm is not None:
                norm = parameters_to_vector([p.grad for p in self.parameters]).norm()
                clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
            adam.param_groups[0]["lr"] = self.config.lr * (1 + math.cos(math.pi * step / (self.config.rounds * K))) / 2
            adam.step()
        return losses

    def state(self) -> dict[str, Any]:
        """All that changes. No copies."""
        adams = [adam.state_dict()["state"] for adam in self.adams]
        return {"theta": self.theta, "rounds_done": self.rounds_done, "adams": adams}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.rounds_done, self.theta = state["rounds_done"], state["theta"].to(self.theta.device)
        self.load()
        for adam, moments in zip(self.adams, state["adams"], strict=True):
            adam.load_state_dict(adam.state_dict() | {"state": moments})


def distances(p: Tensor, q: Tensor, which: Tensor) -> Tensor:
    """Jensen–Shannon distances [n], √(divergence in nats), 0 to 0.83, of p and q [T] within each question. [code]"""
    p, q = p.double(), q.double()
    mean = ((p + q) / 2).clamp_min(1e-300)
    terms = (torch.special.xlogy(p, p / mean) + torch.special.xlogy(q, q / mean)) / 2
    return p.new_zeros(int(which.max()) + 1).index_add(0, which, terms).clamp_min(0).sqrt()


def context_of(
    survey: Survey, group: str, number: int, seed: int, size: int = CONTEXT_QUESTIONS, partner: str | None = None
) -> list[int]:
    """Context `number` of a group's evaluation: `size` of its questions, of those that its partner answered too."""
    pool = [q for q in survey.answers[group] if q in survey.answers[partner or group]]
    order = stream(seed, Purpose.PREDICTOR_EVALUATION, number, survey.position[group]).permutation(len(pool))
    return [pool[j] for j in order[:size]]


def alignment(
    survey: Survey, model: Predictor, groups: Sequence[str], seed: int, size: int = CONTEXT_QUESTIONS,
    draws: int = CONTEXT_DRAWS, partners: dict[str, str] | None = None, swapped: bool = False,
) -> Tensor:  # fmt: skip
    """1 − the distance of predicted and true answers, [G, Q]: by group and question, NaN if it was never a target.

    A mean over the draws of a context; a group's other questions are targets. With partners a context is of questions
    that a group and its partner answered; swapped: as the partner answered them.
    """
    scores = torch.full((len(groups), len(survey.questions), draws), torch.nan, dtype=torch.float64)
    for i, group in enumerate(groups):
        partner = partners[group] if partners else group
        for number in range(draws):
            context = context_of(survey, group, number, seed, size, partner)
            targets = [q for q in survey.answers[group] if q not in context]
            x, y, _ = survey.points(partner if swapped else group, context)
            target_x, target_y, which = survey.points(group, targets)
            shares = model.shares(x, y, target_x, which)
            scores[i, targets, number] = 1 - distances(shares, target_y, which).cpu()
    return scores.nanmean(2)


def context_worth(survey: Survey, model: Predictor, groups: list[str], seed: int, size: int = 15) -> dict[str, float]:
    """Mean alignment given `size` of a group's own answers, and given another group's to the same questions. [ours]

    The other is the next in the list, round its end, that shares as many questions; a group without one is left out.
    """
    partners: dict[str, str] = {}
    for i, group in enumerate(groups):
        for other in (*groups[i + 1 :], *groups[:i]):
            if len(survey.answers[group].keys() & survey.answers[other].keys()) >= size:
                partners.setdefault(group, other)
    scores = partial(alignment, survey, model, list(partners), seed, size, partners=partners)
    return {name: float(scores(swapped=name == "other").nanmean(1).mean()) for name in ("own", "other")}


def guessed(survey: Survey, groups: Sequence[str], givers: Sequence[str] = ()) -> Tensor:
    """Scores [G, Q] of guesses: the mean answer of other givers, NaN if none answered; without givers options alike."""
    scores = torch.full((len(groups), len(survey.questions)), torch.nan, dtype=torch.float64)
    for i, group in enumerate(groups):
        for q, shares in survey.answers[group].items():
            known = [survey.answers[giver][q] for giver in givers if giver != group and q in survey.answers[giver]]
            guess = torch.stack(known).mean(0) if known else torch.full_like(shares, 1 / len(shares))
            if known or not givers:
                scores[i, q] = 1 - distances(guess, shares, torch.zeros_like(shares, dtype=torch.long))[0]
    return scores


def jain(values: Tensor) -> float:
    """Jain's index (Σ v)² / (n Σ v²) of n values, which is 1 / (1 + CoV²): 1 if all are equal, low or high."""
    return float(values.sum().square() / (len(values) * values.square().sum()))


def fairness(scores: Tensor, least: int = 3) -> float:
    """The fairness index: Jain's over groups of each question, mean over questions. scores [G, Q] as of `alignment`.

    Only questions that at least so many groups were asked count: with fewer it is near 1 by construction.
    """
    columns = [column[~column.isnan()] for column in scores.T]
    indices = [jain(column) for column in columns if len(column) >= least]
    return float(np.mean(indices)) if indices else math.nan


def convergence(curve: Sequence[float], level: float, window: int = 3) -> int | None:
    """The first position of a curve at which its last `window` scores have a mean of level; None if there is none."""
    means = [np.mean(curve[i : i + window]) for i in range(len(curve) - window + 1)]
    return next((i + window - 1 for i, mean in enumerate(means) if mean >= level), None)
