"""How the parts are wired: a client's update and a server's round, recomputed plainly; parts and flags."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_firm import NAMES, failing, federation, score, thetas
from test_ppo import krylov_fit

import fedmoa
import firm
import methods
import mgda
import ppo
from app import metrics, options
from baselines import FEDCMOO, FSMGDA
from clients import Context, Purpose, stream
from fedavg import FEDAVG, Server
from firm import FIRM, Trainings
from grpo import GROUP, GRPO
from settings import Config

# No two settings are alike, and none is a value at which it would not show.
CONFIG = Config(
    epochs=2, clip_range=0.1, gae_lambda=0.6, lr=0.05, optimizer="sgd", max_grad_norm=0.02, beta=0.3, batch_size=6,
)  # fmt: skip
P = torch.tensor([0.3, 0.7]).double()
KL_COEF = 0.9


def token_logprobs(model, prompt, response):
    """log π of every response token, from the model's own logits, one row at a time."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


def rows_of(rollout):
    """Prompt and response token lists, without padding."""
    for i in range(len(rollout)):
        prompt = rollout.prompts[i][rollout.prompt_mask[i] == 1].tolist()
        yield prompt, rollout.responses[i][rollout.mask[i] == 1].tolist()


def critic_by_hand(rows, old, ref, scores, states, weight):
    """Whitened GAE of every row, token by token, and the critic that is fitted afterwards."""
    advantages, returns = [], []
    for o, r, s, state in zip(old, ref, scores, states, strict=True):
        reward = (-KL_COEF * (o - r))[:, None].repeat(1, 2)
        reward[-1] += s
        value = state @ weight[:-1] + weight[-1]
        delta = reward + torch.cat([value[1:], torch.zeros(1, 2)]) - value
        n = len(o)
        advantages += [
            torch.stack([sum(CONFIG.gae_lambda ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)])
        ]
        returns += [torch.stack([reward[t:].sum(0) for t in range(n)])]
    every = torch.cat(advantages)
    whitened = [(a - every.mean(0)) / every.std(0, correction=0).clamp_min(0.1) for a in advantages]
    return whitened, krylov_fit(torch.cat(states), torch.cat(returns), weight, ppo.CRITIC_STEPS)


def group_by_hand(rows, old, ref, scores, states, weight):
    """Leave-one-out in groups of three, with the KL that is still to come, over the deviation; no critic."""
    advantages = []
    for i, (o, r) in enumerate(zip(old, ref, strict=True)):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        left = torch.stack([(o - r)[t:].sum() for t in range(len(o))])
        advantages.append(scores[i] - scores[others].mean(0) - KL_COEF * left[:, None])
    sigma = torch.cat(advantages).std(0, correction=0)
    return [a / sigma for a in advantages], None


def update_by_hand(built, theta, rollout, scores, weight, advantages_by_hand):
    """One client's update after the formulas of ppo.py, grpo.py and firm.py, row by row: θ, λ, KL, critic."""
    adapter, model = built.policy.adapter, built.policy.model
    adapter.assign(theta)
    rows, states = list(rows_of(rollout)), []
    with torch.no_grad():
        old = [token_logprobs(model, *row) for row in rows]
        with adapter.disabled():
            ref = [token_logprobs(model, *row) for row in rows]
        for prompt, response in rows:
            hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            states.append(hidden[len(prompt) - 1 : -1])  # what is known before each response token
    advantages, critic = advantages_by_hand(rows, old, ref, scores, states, weight)
    lambdas, eps = [], CONFIG.clip_range
    for _ in range(CONFIG.epochs):
        losses = torch.zeros(2)
        for row, o, a in zip(rows, old, advantages, strict=True):
            ratio = (token_logprobs(model, *row) - o).exp()[:, None]
            losses = losses - torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a).sum(0)
        J = ppo.jacobian(losses / sum(map(len, old)), adapter.parameters)
        gram = (J @ J.T).double()
        lambdas.append(mgda.solve(gram / gram.trace(), CONFIG.beta, P))
        gradient = lambdas[-1].float() @ J
        assert gradient.norm() > CONFIG.max_grad_norm  # the clip must show
        adapter.assign(adapter.vector() - CONFIG.lr * gradient * CONFIG.max_grad_norm / gradient.norm())
    kl = torch.stack([(o - r).sum() for o, r in zip(old, ref, strict=True)])
    return adapter.vector(), torch.stack(lambdas), kl, critic


@pytest.mark.parametrize(
    ("estimator", "S", "by_hand"), [(ppo.CRITIC, 1, critic_by_hand), (GROUP, 3, group_by_hand)], ids=["critic", "group"]
)
def test_a_local_update_is_the_formulas_row_by_row(estimator, S, by_hand):
    torch.manual_seed(0)
    method = replace(FIRM, estimator=estimator)
    built = federation(method=method, group_size=S)
    theta = built.theta + 0.2 * torch.randn(built.theta.shape)
    built.policy.adapter.assign(theta)
    rollout, _ = built.respond(built.clients[1], Purpose.TRAINING, S)
    scores, weight = torch.randn(6, 2), 0.1 * torch.randn(built.policy.hidden_size + 1, 2)
    batch = ppo.prepare(built.policy, rollout, scores, KL_COEF, None, estimator.reads_hidden)
    context = Context(CONFIG, 0, {"theta": theta}, torch.eye(2), batch, P, {"critic": weight} if S == 1 else {})
    tensors, update = firm.local_update(built.policy, context, method)
    by_formulas, lambdas, kl, critic = update_by_hand(built, theta, rollout, scores, weight, by_hand)
    assert (tensors["theta"] - by_formulas).norm() < 1e-3 * (by_formulas - theta).norm()
    assert (torch.stack([step.lam for step in update.steps]) - lambdas).abs().max() < 1e-4
    assert (ppo.sequence_kl(batch) - kl).abs().max() < 1e-4
    assert critic is None or (context.state["critic"] - critic).abs().max() < 1e-3 * critic.abs().max()


@pytest.mark.parametrize(("method", "micro", "passes"), [
    (FIRM, None, 1 + 1 + 2), (FSMGDA, None, 1 + 1 + 2 + 3), (FEDCMOO, None, 1 + 1 + 3), (FIRM, 3, 2 + 2 + 6),
])  # fmt: skip
def test_the_first_gradient_comes_from_the_forward_pass_of_pi_old_if_it_is_one(method, micro, passes, monkeypatch):
    built = federation(method=method, epochs=3, micro_batch_size=micro)
    built.calibrate()
    seen, original = [], built.policy.states
    monkeypatch.setattr(built.policy, "states", lambda rollout: seen.append(rollout) or original(rollout))
    built.round()
    assert len(seen) == 3 * passes  # of π_ref, π_old, and the epochs after the first


def test_clients_train_on_calibrated_scores_of_their_own_rows():
    for part in federation().round().arrived.values():
        batch = part.updates[0].batch
        assert (batch.scores - (score(None, batch.rollout).float() - 0.5) / 0.2).abs().max() < 1e-6


def test_every_lambda_can_be_solved_again_from_the_gram_of_its_step():
    record = federation(beta=0.05, preference=[0.3, 0.7]).round()
    steps = [step for part in record.arrived.values() for step in part.updates[0].steps]
    for step in steps:
        assert torch.equal(step.lam, mgda.solve(mgda.normalise(step.gram), 0.05, [0.3, 0.7]))
    assert len({float(step.lam[0]) for step in steps}) == 6


# A round


def test_the_server_goes_its_rate_of_the_way_to_the_average_by_the_sampled_clients_prompts():
    built = federation(clients=5, clients_per_round=2, server_lr=0.7)
    start, record = built.theta, built.round()
    held = torch.tensor([4.0 + c for c in record.arrived])
    assert list(record.arrived) != [0, 1] and held[0] != held[1]
    assert (built.theta - start - 0.7 * (held / held.sum()) @ (thetas(record) - start)).abs().max() < 1e-6


def test_every_round_client_and_purpose_draws_afresh():
    built, draws = federation(), []
    built.config.clients_per_round = 2
    cohorts = set()
    for built.rounds_done in range(6):
        cohorts.add(tuple(client.index for client in built.cohort()[0]))
    assert len(cohorts) > 1
    for built.rounds_done in (0, 1):
        for purpose in (Purpose.TRAINING, Purpose.CALIBRATION):
            draws += [built.respond(client, purpose)[0].prompts.tolist() for client in built.clients]
    assert len({str(prompts) for prompts in draws}) == len(draws) == 12
    uniforms = [stream(0, purpose, t, c).random() for purpose in Purpose for t in range(3) for c in range(3)]
    uniforms += [stream(1, 2, 0, 0).random(), stream(0, 2).random(), stream(0, 2, 0).random()]  # seed, trailing zeros
    assert len(set(uniforms)) == len(uniforms)


def test_the_kl_coefficient_adapts_after_the_round_to_the_clients_that_arrived_and_to_their_responses():
    def second_round(kl_target):
        built = federation(kl_coef=0.5, kl_target=kl_target)
        first = built.round()
        assert first.arrived[0].upload.numbers["kl"] == 0.0  # of the base policy: the error is clipped at −0.2
        assert built.kl_coef == pytest.approx(0.5 * (1 - 0.2 * 18 / 1000), rel=1e-12)
        built.method = failing(FIRM, 0)
        return built, built.kl_coef, built.round()

    _, _, record = second_round(1.0)
    target = 1.1 * np.mean([part.upload.numbers["kl"] for part in record.arrived.values()])  # an error of −1/11
    built, before, record = second_round(target)
    assert {part.updates[0].batch.kl_coef for part in record.arrived.values()} == {before} == {record.kl_coef}
    assert built.kl_coef == pytest.approx(before * (1 - 1 / 11 * 12 / 1000), rel=1e-9)


def test_adams_rate_is_the_configured_one():
    moved = []
    for lr in (1e-3, 2e-3):
        built = federation(lr=lr, max_grad_norm=1e-6, epochs=1)
        start = built.theta
        built.round()
        moved.append(float((built.theta - start).norm()))
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-2)


def test_two_trainings_on_two_objectives_each_are_logged_as_the_server_mixed_them():
    class Quarter(Server):
        def training_shares(self, updates, weights):
            return torch.tensor([0.25, 0.75]).double()

    mixes = list(torch.eye(4).split(2, dim=1))
    method = replace(FIRM, trainings=Trainings("", lambda p, message: mixes), server=Quarter)
    built = federation(method=method, M=4, beta=0.02)
    record = built.round()
    line = metrics.line(record, built.clients, built.names)
    lam = torch.stack([torch.stack([torch.stack([s.lam for s in u.steps]).mean(0) for u in part.updates])
                       for part in record.arrived.values()]).mean(0)  # [trainings, 2]  # fmt: skip
    expected = torch.cat([0.25 * lam[0], 0.75 * lam[1]]).tolist()
    assert [line[f"lambda/{name}"] for name in NAMES] == pytest.approx(expected, abs=1e-12)


# Parts and flags


def config_of(line):
    return options.parse(line.split())[0]


@pytest.mark.parametrize(
    ("line", "estimator", "weights", "aggregation"),
    [("--method fedmoa", GRPO, fedmoa.HYPERGRADIENT, fedmoa.ACCURACY),
     ("--method firm --advantages group", GROUP, firm.MIN_NORM, FEDAVG),
     ("--method firm --aggregation accuracy", ppo.CRITIC, firm.MIN_NORM, fedmoa.ACCURACY),
     ("--method fedmoa --weights min-norm --aggregation fedavg", GRPO, firm.MIN_NORM, FEDAVG),
     ("--method fedmoa --weights fixed --advantages critic", ppo.CRITIC, firm.FIXED, fedmoa.ACCURACY),
     ("--method linear --weights hypergradient", ppo.CRITIC, fedmoa.HYPERGRADIENT, FEDAVG)],
)  # fmt: skip
def test_parts_are_swapped_by_flags_and_run(line, estimator, weights, aggregation):
    method = methods.method_of(config_of(line))
    assert (method.estimator, method.weights, method.aggregation) == (estimator, weights, aggregation)
    assert method.needs_primary == (weights is fedmoa.HYPERGRADIENT or aggregation is fedmoa.ACCURACY)
    built = federation(method=method)
    built.round(), built.round()
    assert torch.isfinite(built.theta).all()


CHANGED = {"beta": 3.0, "preference": [0.2, 0.8], "gae_lambda": 0.3, "hyper_rate": 9.0, "accuracy_power": 4.0}


@pytest.mark.parametrize("name", ["firm", "mgda", "morlhf", "fsmgda", "fedmoa", "minimum", "adaptive"])
def test_a_method_reads_exactly_the_settings_that_its_parts_name(name):
    def trained(**settings):
        built = federation(method=methods.METHODS[name], clients=2, batch_size=4, epochs=1, **settings)
        plain, wrong = built.score, torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()
        # client 0 never serves the primary
        built.score = lambda prompts, rollout, client: plain(prompts, rollout, client) * wrong[client.index]
        built.round(), built.round()
        return built.theta

    default = trained()
    read = {setting for setting, value in CHANGED.items() if not torch.equal(trained(**{setting: value}), default)}
    assert read == methods.settings_of(methods.METHODS[name])
    assert CHANGED.keys() == set().union(*map(methods.settings_of, methods.METHODS.values()))


@pytest.mark.parametrize("line", [
    "--beta 1", "--method linear --weights min-norm --beta 1", "--dirichlet_alpha 2",
    "--aggregation accuracy --accuracy_power 2", "--preset pluralllm-tiny --local_steps 2",
])  # fmt: skip
def test_a_flag_that_a_part_reads_is_taken(line):
    flag, value = line.split()[-2:]
    assert getattr(config_of(line), flag.removeprefix("--")) == float(value)
