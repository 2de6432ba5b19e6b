"""PluralLLM: groups teach one model what each prefers, without sharing their answers (arXiv 2503.09925).

A group (a country, say) holds answers to survey questions: the share of its people who chose each option. One model,
the predictor, learns in context: given some questions as a group answered them, it says how that group answers others.
Every client holds one group or several; they train it by FedAvg; groups that took no part are asked in the end.

    predictor: a point is x ⊕ y, x the embedding of "question option", y the option's share; targets have y = 0 [code]
    for t = 0 … T − 1                                                    [code: T = 100]
        each client c, from θ_t, repeats `local_steps` times:            [code: 6]
            of each of its groups g draw questions as context and others as targets
            L_c = Σ_g (n_g / n_c) mean over target points of −log N(y; softmax of m within its question, exp(s))
            one step of Adam, whose moments stay with the client; its rate decays with t        [code]
        θ_{t+1} = Σ_c (n_c / n) θ_c,  n_c the points that c holds (`fedavg.average`)

The architecture is [code]'s, which is that of Group Preference Optimization (arXiv 2310.11523): four linear layers
embed a point, six transformer layers without positions let every point attend to the context points only, and a head
gives mean m and log-deviation s. Keys and values are taken from the context rows, so no mask is needed: a target
can reach neither another target nor its own answer.

Centralised training is the same thing with one client that holds all groups: the average of one is that one.

[code] context and target sizes, 9 to 90 questions each, drawn for every step. [ours] a group with fewer than 180
questions draws from what it has, and keeps at least 9 as targets; the mean over points for the sum, which would weigh a
step by its draw; n_c of all points held, for those of the last draw; one decay over the whole training, for one of 100
steps that comes round again; `max_grad_norm`, off by default: without it the loss jumps up on some seeds, since the
deviation s makes its gradients heavy-tailed. Draws hang on (seed, step, group), so that a group draws alike whichever
side trains, as long as the list of groups is the same.

Left out on purpose: batches of several draws, dropout (0 in [code] too).
"""

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from app.fields import Checked, Count, setting
from clients import CLIENT_SAMPLING, check_anybody_left, stream
from fedavg import Ledger, Upload, average, prompts_held, sample_clients

NAME, HELP = "pluralllm", "no policy, but a predictor of what groups prefer"
PREDICTOR_TRAINING, PREDICTOR_EVALUATION = 11, 12  # what a stream is for, beside those of `clients.py`
WIDTH, LAYERS, HEADS, EMBEDDERS = 128, 6, 4, 4  # of the predictor [code]


@dataclass
class PluralConfig(Checked):
    """The predictor's training, beside what it shares with FIRM: rounds, clients_per_round, lr, seed."""

    opinions: str | None = setting(
        None, "pluralllm: file of survey answers, .jsonl, .jsonl.gz or .csv; the survey world's if not given"
    )
    encoder: str | None = setting(
        None, "pluralllm: checkpoint (directory or hub name) whose mean hidden states embed texts"
    )
    train_groups: list[str] = setting(
        [], "pluralllm: groups that train, a client each; the public code's eight, or the world's, if not given"
    )
    unseen_groups: list[str] = setting(
        [], "pluralllm: groups that are only evaluated; the public code's six, or the world's, if not given"
    )
    central: bool = setting(True, "pluralllm: beside it the same training with all groups in one place")
    local_steps: Count = setting(6, "pluralllm: Adam steps of a client in a round [code: 6]")
    min_questions: Count = setting(9, "pluralllm: least questions of a context, and of its targets [code: 9]")
    max_questions: Count = setting(90, "pluralllm: most questions of a context, and of its targets [code: 90]")
    context_questions: Count = setting(20, "pluralllm: questions of a context in the evaluation [code: 20]")
    context_draws: Count = setting(20, "pluralllm: contexts that every group's score is a mean over [ours]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_questions < self.min_questions:
            raise ValueError(
                f"max_questions: {self.max_questions} must be at least min_questions, {self.min_questions}"
            )


# ---- what groups answered --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question and its options, as texts."""

    text: str
    options: tuple[str, ...]


class Survey:
    """Questions with embedded options, and what groups answered.

    embeddings [P, E]: a row per option of every question, in order; answers: group -> question's number -> shares [k].
    All of it lies on one device.
    """

    def __init__(
        self, questions: Sequence[Question], embeddings: Tensor, answers: dict[str, dict[int, Tensor]]
    ) -> None:
        device = embeddings.device
        self.questions, self.embeddings = list(questions), embeddings
        self.answers = {group: {q: shares.to(device) for q, shares in own.items()} for group, own in answers.items()}
        ends = np.cumsum([len(question.options) for question in questions])
        self.rows = [
            torch.arange(end - len(q.options), end, device=device) for q, end in zip(questions, ends, strict=True)
        ]

    def position(self, group: str) -> int:
        """The number of a group, which its draws hang on."""
        return list(self.answers).index(group)

    def questions_of(self, group: str) -> list[int]:
        """The numbers of the questions that a group answered."""
        return list(self.answers[group])

    def points(self, group: str, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(x [n, E], y [n], which [n]) of some of a group's questions; which: the position of each point's question."""
        rows = [self.rows[q] for q in chosen]
        which = torch.cat([torch.full_like(row, position) for position, row in enumerate(rows)])
        return self.embeddings[torch.cat(rows)], torch.cat([self.answers[group][q] for q in chosen]), which

    def points_held(self, group: str) -> int:
        """n_g, the number of a group's points."""
        return sum(len(shares) for shares in self.answers[group].values())


# ---- the predictor ---------------------------------------------------------------------------------------------


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
    """From a group's answered questions to its answers on others; width: that of the embeddings.

    1,188,354 parameters at [code]'s width of 4,096.
    """

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
        x = torch.cat([context_x, target_x])
        y, C = torch.cat([context_y, context_y.new_zeros(len(target_x))]), len(context_x)
        rows = self.embed(torch.cat([x, y[:, None]], 1))
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
    """Mean over points of −log N(y; softmax of m within its question, exp(s)) [code, there a sum]; all [T]."""
    deviation = (y - softmax_within(m, which)) * (-s).exp()
    return (0.5 * deviation.square() + s + 0.5 * math.log(2 * math.pi)).mean()


# ---- FedAvg ----------------------------------------------------------------------------------------------------


def draw(available: Sequence[int], settings: PluralConfig, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(context, targets), of the questions available to a group; at least `min_questions` of each."""
    low, high, n = settings.min_questions, settings.max_questions, len(available)
    context = int(rng.integers(low, min(high, n - low) + 1))
    targets = int(rng.integers(low, min(high, n - context) + 1))
    order = [available[i] for i in rng.permutation(n)]
    return order[:context], order[context : context + targets]


def check_contexts(answers: dict[str, dict[int, Tensor]], groups: Sequence[str], settings: PluralConfig) -> None:
    """Raise ValueError for a group with too few questions to train on or to be evaluated by."""
    for field, needed in (
        ("min_questions", 2 * settings.min_questions),
        ("context_questions", settings.context_questions + 1),
    ):
        for group in groups:
            if (n := len(answers[group])) < needed:
                raise ValueError(
                    f"{field}: {group} has {n} questions and needs {needed}; lower {field}, or drop the group"
                )


class PredictorClient:
    """A client: its groups, its copy of the predictor, its Adam."""

    def __init__(self, groups: Sequence[str], survey: Survey, width: int, device: torch.device | str) -> None:
        self.groups, self.survey, self.model = list(groups), survey, Predictor(width).to(device)
        self.prompts_held = sum(survey.points_held(group) for group in groups)  # n_c, of points
        self.theta = flat(self.model)
        self.optimizer = torch.optim.Adam([self.theta], fused=True)

    def step(
        self, number: int, lr: float, settings: PluralConfig, seed: int, max_grad_norm: float | None = None
    ) -> float:
        """One step of Adam over all groups of this client; number: the step's, from 0. Returns the loss."""
        total = 0.0
        for group in self.groups:
            rng = stream(seed, PREDICTOR_TRAINING, number, self.survey.position(group))
            context, targets = draw(self.survey.questions_of(group), settings, rng)
            x, y, _ = self.survey.points(group, context)
            target_x, target_y, which = self.survey.points(group, targets)
            own = loss(*self.model(x, y, target_x), target_y, which)
            own = own * (self.survey.points_held(group) / self.prompts_held)
            own.backward()
            total += own.item()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.theta, max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.theta.grad.zero_()  # in place: the parameters' gradients are views of it
        return total


class PredictorFederation:
    """The server and its clients. State: theta [d], rounds_done, and the clients' moments."""

    def __init__(
        self, survey: Survey, clients: Sequence[Sequence[str]], rounds: int, lr: float, seed: int,
        settings: PluralConfig, clients_per_round: int | None = None, max_grad_norm: float | None = None,
        threads: int = 1,
    ) -> None:  # fmt: skip
        """clients: the groups that each holds; the decay of lr ends with the rounds; threads: clients at once."""
        self.rounds, self.lr, self.seed, self.settings = rounds, lr, seed, settings
        self.max_grad_norm, self.threads = max_grad_norm, threads
        self.per_round = clients_per_round or len(clients)
        width, device = survey.embeddings.shape[1], survey.embeddings.device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Predictor(width).to(device)  # the server's
        self.theta = flat(self.model)
        self.clients = [PredictorClient(own, survey, width, device) for own in clients]
        self.rounds_done = 0

    def round(self) -> dict[str, float]:
        """One communication round. Returns its figures. Raises ValueError where every client's upload is broken."""
        t, ledger = self.rounds_done, Ledger()
        ledger.down({"theta": self.theta})
        cohort = sample_clients(len(self.clients), self.per_round, stream(self.seed, CLIENT_SAMPLING, t))
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            trained = list(pool.map(self.local_training, cohort))  # alike on any number of threads
        faults = {c: upload.fault for c, (upload, _) in zip(cohort, trained, strict=True) if upload.fault}
        uploads = [upload for upload, _ in trained if not upload.fault]
        check_anybody_left(uploads, faults)
        ledger.upload(uploads[0])
        self.theta.copy_(average(torch.cat([upload.thetas for upload in uploads]), prompts_held(uploads)))
        self.rounds_done += 1
        loss = float(np.mean([losses for _, losses in trained]))
        return {"round": t, "loss": loss, "broken": len(faults)} | ledger.metrics()

    def local_training(self, c: int) -> tuple[Upload, list[float]]:
        """What client c does in this round, and the loss of each of its steps. A broken one keeps its old moments."""
        client, K = self.clients[c], self.settings.local_steps
        kept, losses = copy.deepcopy(client.optimizer.state_dict()), []
        client.theta.copy_(self.theta)
        for step in range(self.rounds_done * K, (self.rounds_done + 1) * K):
            lr = cosine(self.lr, step, self.rounds * K)
            losses.append(client.step(step, lr, self.settings, self.seed, self.max_grad_norm))
        upload = Upload(client.theta.clone()[None], client.prompts_held)
        if upload.fault:
            client.optimizer.load_state_dict(kept)
        return upload, losses

    def state(self) -> dict[str, Tensor]:
        """All that changes, but for the number of rounds done, by dotted names."""
        moments = {
            f"client{c}.{name}": tensor
            for c, client in enumerate(self.clients)
            for name, tensor in client.optimizer.state.get(client.theta, {}).items()
        }
        return {"theta": self.theta} | moments

    def restore(self, tensors: dict[str, Tensor], rounds_done: int) -> None:
        """Take back what `state` gave. Raises ValueError where it is of another federation."""
        names = {name.partition(".")[2] for name in tensors} - {"", "step", "exp_avg", "exp_avg_sq"}
        if tensors["theta"].shape != self.theta.shape or names:
            raise ValueError("resume: the checkpoint is of another predictor; resume with its own settings")
        self.rounds_done = rounds_done
        self.theta.copy_(tensors["theta"])
        for c, client in enumerate(self.clients):
            own = {n.partition(".")[2]: moment for n, moment in tensors.items() if n.startswith(f"client{c}.")}
            client.optimizer.load_state_dict(client.optimizer.state_dict() | {"state": {0: own} if own else {}})


def flat(model: nn.Module) -> Tensor:
    """A model's parameters as one vector [d], whose views they become, and their gradients those of its gradient.

    So a step's arithmetic is that of one tensor, and what one client holds is copied at once.
    """
    theta = parameters_to_vector(model.parameters()).detach()
    theta.grad = torch.zeros_like(theta)
    sizes, named = [p.numel() for p in model.parameters()], model.named_parameters()
    own = {name: part.view_as(p) for (name, p), part in zip(named, theta.split(sizes), strict=True)}
    model.load_state_dict(own, assign=True)
    for parameter, grad in zip(model.parameters(), theta.grad.split(sizes), strict=True):
        parameter.grad = grad.view_as(parameter)
    return theta


def cosine(lr: float, step: int, steps: int) -> float:
    """The learning rate of a step, from lr down to 0 after `steps` of them [code]."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


# ---- how well it knows a group ---------------------------------------------------------------------------------


def distances(p: Tensor, q: Tensor, which: Tensor) -> Tensor:
    """Jensen–Shannon distances [n] of two distributions over the points of each question, p and q [T] [code].

    The root of the divergence in nats: 0 to 0.83.
    """
    p, q = p.double(), q.double()
    mean = ((p + q) / 2).clamp_min(1e-300)
    terms = (torch.special.xlogy(p, p / mean) + torch.special.xlogy(q, q / mean)) / 2
    return p.new_zeros(int(which.max()) + 1).index_add(0, which, terms).clamp_min(0).sqrt()


def alignment(
    survey: Survey, model: Predictor, groups: Sequence[str], settings: PluralConfig, seed: int,
    partners: dict[str, str] | None = None, swapped: bool = False,
) -> Tensor:  # fmt: skip
    """1 − the distance of predicted and true answers, [G, Q]: by group and question, NaN for what was no target.

    In each of `context_draws` draws, `context_questions` of a group's questions are the context and all others targets;
    a mean over the draws. partners: a group's context is of questions that its partner answered too; swapped: as the
    partner answered them. Raises ValueError for a group with too few questions.
    """
    totals = torch.zeros(len(groups), len(survey.questions), dtype=torch.float64)
    counts, size = torch.zeros_like(totals), settings.context_questions
    for i, group in enumerate(groups):
        own, partner = survey.questions_of(group), (partners or {}).get(group, group)
        shared = [q for q in own if q in survey.answers[partner]]
        if len(shared) < size or len(own) <= size:
            raise ValueError(f"context_questions: {group} and {partner} share {len(shared)}, too few for {size}")
        for number in range(settings.context_draws):
            rng = stream(seed, PREDICTOR_EVALUATION, number, survey.position(group))
            context = [shared[j] for j in rng.permutation(len(shared))[:size]]
            targets = [q for q in own if q not in context]
            x, y, _ = survey.points(partner if swapped else group, context)
            target_x, target_y, which = survey.points(group, targets)
            apart = distances(model.shares(x, y, target_x, which), target_y, which).cpu()
            totals[i, targets] += 1 - apart
            counts[i, targets] += 1
    return torch.where(counts > 0, totals / counts, torch.nan)


def guessed(survey: Survey, groups: Sequence[str], givers: Sequence[str] = ()) -> Tensor:
    """The same scores [G, Q] for guesses without a predictor: the mean answer of the givers, NaN on questions that none
    of them answered; without givers every option alike.
    """
    scores = torch.full((len(groups), len(survey.questions)), torch.nan, dtype=torch.float64)
    for i, group in enumerate(groups):
        for q, shares in survey.answers[group].items():
            known = [survey.answers[giver][q] for giver in givers if giver != group and q in survey.answers[giver]]
            if known or not givers:
                guess = torch.stack(known).mean(0) if givers else torch.full_like(shares, 1 / len(shares))
                scores[i, q] = 1 - distances(guess, shares, torch.zeros_like(shares, dtype=torch.long))[0]
    return scores


def by_group(scores: Tensor) -> Tensor:
    """Each group's alignment score AS [G]: its mean over questions. scores [G, Q] as of `alignment`."""
    return scores.nanmean(1)


def jain(values: Tensor) -> float:
    """Jain's index (Σ v)² / (n Σ v²) of n values, which is 1 / (1 + CoV²): 1 where all are equal, low or high."""
    return float(values.sum().square() / (len(values) * values.square().sum()))


def fairness(scores: Tensor, groups: int = 3) -> float:
    """The fairness index: the mean of Jain's index over groups, of the questions that at least so many were asked.

    scores [G, Q] as of `alignment`. With fewer groups it is near 1 by construction. NaN where no question has as many.
    """
    asked = [column[~column.isnan()] for column in scores.T]
    found = [jain(column) for column in asked if len(column) >= groups]
    return float(np.mean(found)) if found else math.nan


def convergence(curve: Sequence[float], level: float, window: int = 3) -> int | None:
    """The position of the first score of a curve at which the mean of the last `window` scores has reached level.

    None where it never does. [ours] level: AS₀ + 0.95 (the better final AS − AS₀).
    """
    for i in range(window - 1, len(curve)):
        if np.mean(curve[i - window + 1 : i + 1]) >= level:
            return i
    return None
