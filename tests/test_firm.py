"""Algorithm 1 as a whole, on a random tiny model with toy objectives, and what the methods have in common."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import make_policy

import fedavg
import firm
from app import metrics
from app.checkpoint import federation_state, restore_federation
from app.ranks import packed, unpacked
from baselines import ADAPTIVE, FSMGDA, MORLHF
from fedavg import Server
from fedmoa import FEDMOA
from firm import FIRM, LINEAR, MGDA, Federation
from methods import METHODS
from rewards import Calibration
from settings import Config

NAMES = ["even", "low", "third", "high"]
TRAINED = [method for method in METHODS.values() if not method.several_runs]
every_method = pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)


@dataclass(frozen=True)
class Question:
    token_ids: tuple


def score(prompts, rollout, M=2):
    """Shares of even, of low, … tokens in a response: raw [N, M]."""
    ids, n = rollout.responses, rollout.mask.sum(1)
    kinds = [ids % 2 == 0, ids < 20, ids % 3 == 0, ids > 30][:M]
    return torch.stack([(kind * rollout.mask).sum(1) / n for kind in kinds], 1).double()


def federation(kind="llama", method=FIRM, clients=3, M=2, device="cpu", held=None, exchange=None, **settings):
    """A small federation on random weights, whose client c has 4 + c prompts."""
    rng = np.random.default_rng(0)
    shares = [[Question(tuple(rng.integers(3, 50, rng.integers(2, 8)))) for _ in range(4 + c)] for c in range(clients)]
    groups = {"group_size": 2} if method.estimator.group_size > 1 else {}
    small = {"clients": clients, "batch_size": 6, "epochs": 2, "lr": 1e-2, "kl_coef": 0.01} | groups
    policy = make_policy(kind, noise=0.0, device=device, max_new_tokens=6)

    def scored(prompts, rollout, client):
        raw = score(prompts, rollout, M)
        raw[:, [j for j in range(M) if j not in client.objectives]] = torch.nan
        return raw

    built = Federation(policy, shares, NAMES[:M], scored, method, Config(**small | settings), held, exchange=exchange)
    built.calibration = Calibration(
        torch.full((M,), 0.5).double(), torch.full((M,), 0.2).double(), torch.zeros(M).bool()
    )
    return built


def logged(built):
    """A round's line of metrics.jsonl."""
    return metrics.line(built.round(), built.clients, built.names)


def thetas(record):
    """The adapters that arrived [C, d], of a method with one local training."""
    return torch.cat([part.upload.tensors["theta"] for part in record.arrived.values()])


def assert_same_state(a, b):
    assert packed(federation_state(a)) == packed(federation_state(b))


def failing(method, *clients):
    """The method, if these clients trained and then had a number in their upload that is not finite."""
    part = method.aggregation

    def numbers(client, raw, S):
        return part.numbers(client, raw, S) | {"luck": math.nan if client.index in clients else 1.0}

    return replace(method, aggregation=replace(part, numbers=numbers))


# A round


def test_training_raises_both_objectives_if_they_can_rise_together():
    # Not a claim about FIRM, only that the signs of reward, advantage, loss and step fit together.
    built = federation(batch_size=32, epochs=3)
    lines = [logged(built) for _ in range(10)]
    for name in ("even", "low"):
        first, last = (np.mean([line[f"reward/{name}"] for line in part]) for part in (lines[:2], lines[-2:]))
        assert last > first + 0.1


def test_the_base_weights_stay_bit_for_bit(kind):
    built = federation(kind)
    frozen = {k: v.clone() for k, v in built.policy.model.state_dict().items() if not k.endswith((".A", ".B"))}
    start = built.theta
    built.round()
    now = built.policy.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    assert not torch.equal(built.theta, start)  # while the adapter did move


def test_at_learning_rate_zero_nothing_moves():
    built = federation(lr=0.0)
    before = built.theta.clone()
    line = logged(built)
    assert torch.equal(built.theta, before)
    assert line["kl"] == 0.0 and line["approx_kl"] == 0.0 and line["clip_fraction"] == 0.0


def test_a_clients_upload_does_not_depend_on_who_shares_its_batch():
    built, uploads = federation(), []
    for cohort, position in ((built.clients, 1), (built.clients[1:2], 0)):
        client, batch, raw = list(built.batches(cohort))[position]
        message = {"theta": built.theta}
        uploads.append(firm.contribution(client, built.policy, batch, raw, message, FIRM, built.config, 0).upload)
        built.policy.adapter.assign(built.theta)
    assert torch.equal(*(upload.tensors["theta"] for upload in uploads)) and uploads[0].numbers == uploads[1].numbers


def test_a_client_draws_every_prompt_before_any_twice():
    client = federation().clients[2]
    drawn = client.draw(12, np.random.default_rng(0))
    assert set(drawn[:6]) == set(client.prompts) == set(drawn[6:])


def test_the_rewards_are_calibrated_on_the_base_policy_wherever_the_adapter_stands():
    calibrations = []
    for noise in (0.0, 0.5):
        built = federation()
        built.policy.adapter.assign(built.theta + noise * torch.randn(built.theta.shape))
        built.calibrate()
        calibrations.append(built.calibration)
    assert all(torch.equal(x, getattr(calibrations[1], name)) for name, x in vars(calibrations[0]).items())


# Faults, checkpoints, processes


@pytest.mark.parametrize("method", [FIRM, FSMGDA, FEDMOA, ADAPTIVE], ids=lambda method: method.name)
def test_a_client_whose_update_fails_stays_as_it_was_and_the_round_is_one_without_it(method):
    built, without = federation(method=method), federation(method=method)
    built.round(), without.round()
    built.method, without.cohort = failing(method, 0), lambda: (without.clients[1:], 0)
    record = built.round()
    without.round()
    assert record.faults == {0: "luck in its upload is not finite; lower lr"} and list(record.arrived) == [1, 2]
    assert_same_state(built, without)


def test_a_client_that_the_servers_questions_found_faulty_is_left_out_of_the_round():
    class Suspicious(Server):
        def broadcast(self, federation, work, faults):
            faults[next(iter(work))[0].index] = "no answer"
            return {}

    built = federation(method=replace(FIRM, server=Suspicious))
    record = built.round()
    assert record.faults == {0: "no answer"} and list(record.arrived) == [1, 2] and not built.clients[0].state


def test_a_server_may_look_ahead_and_leave_the_adapter_anywhere():
    class Curious(Server):
        def broadcast(self, federation, work, faults):
            assert [client.index for client, *_ in work] == [0, 1, 2]
            federation.policy.adapter.assign(federation.theta + 1.0)
            return {}

    plain, looked = (federation(method=replace(FIRM, server=server)) for server in (Server, Curious))
    for _ in range(2):
        assert plain.round() and looked.round() and torch.equal(plain.theta, looked.theta)


def test_if_no_update_can_be_used_the_round_ends_with_a_remedy():
    with pytest.raises(ValueError, match="client 0: .*lower lr"):
        federation(method=failing(FIRM, 0, 1, 2)).round()


@every_method
def test_from_a_checkpoint_every_method_goes_on_bit_for_bit_in_state_and_metrics(method):
    whole, resumed = (federation(method=method, clients=2) for _ in range(2))
    whole.round(), whole.round()
    restore_federation(resumed, unpacked(packed(federation_state(whole))))
    assert repr(logged(whole)) == repr(logged(resumed))
    assert_same_state(whole, resumed)


class Half:
    """The exchange of one of two processes, here threads: every second client is its own."""

    def __init__(self, rank, barrier, parts):
        self.rank, self.barrier, self.parts = rank, barrier, parts

    def mine(self, items):
        return items[self.rank :: 2]

    def merged(self, results):
        self.parts[self.rank] = results
        self.barrier.wait(60)
        everything = dict(sorted((c, result) for part in self.parts for c, result in part.items()))
        self.barrier.wait(60)
        return everything


def test_two_processes_of_which_one_has_a_client_that_fails_come_to_what_one_comes_to():
    barrier, parts = threading.Barrier(2), [{}, {}]
    alone, *pair = (federation(method=failing(FEDMOA, 1), exchange=exchange)
                    for exchange in (None, Half(0, barrier, parts), Half(1, barrier, parts)))  # fmt: skip

    def train(built):
        built.calibration = None  # so that the first round takes it
        return [list(built.round().faults) for _ in range(2)]

    with ThreadPoolExecutor() as pool:
        assert train(alone) == [*pool.map(train, pair)][0]
    assert_same_state(pair[0], alone)
    assert_same_state(pair[1], alone)


# If methods are the same


def test_mgda_is_firm_with_beta_zero():
    a, b = federation(method=MGDA), federation(method=FIRM, beta=0.0)
    a.round(), b.round()
    assert torch.equal(a.theta, b.theta)


ON_A_CRITIC = [m for m in TRAINED if (m.estimator, m.correct) == (FIRM.estimator, FIRM.correct)]


@pytest.mark.parametrize("method", ON_A_CRITIC, ids=lambda m: m.name)
def test_with_one_objective_all_methods_with_a_critic_are_the_same(method):
    a, b = federation(M=1, clients=2), federation(M=1, clients=2, method=method)
    for _ in range(2):
        a.round(), b.round()
    assert torch.allclose(a.theta, b.theta, atol=1e-6)


# What every method keeps to


@every_method
def test_lambda_and_mixing_lie_on_the_simplex(method):
    record = federation(method=method, M=3, clients=2, batch_size=4, epochs=1).round()
    steps = [step for part in record.arrived.values() for update in part.updates for step in update.steps]
    for weights in [record.training_shares, record.shares, *(step.lam for step in steps)]:
        assert weights.min() >= 0 and abs(float(weights.sum()) - 1) < 1e-12


def test_along_mgda_plain_gradient_descent_promises_every_objective_a_gain():
    record = federation(method=MGDA, optimizer="sgd", lr=0.1, epochs=1).round()
    assert all(part.updates[0].steps[0].first_order_gain >= 0.0 for part in record.arrived.values())


# The seams


def test_fedprox_is_a_correction_of_every_step():
    mu, seen = 0.7, []

    def towards_theta_t(gradient, context):
        seen.append((context.round, context.epoch, context.theta, gradient, context.J))
        return gradient + mu * (context.theta - context.message["theta"])

    built = federation(method=replace(FIRM, correct=towards_theta_t), clients=1, optimizer="sgd", lr=0.1, epochs=3)
    theta = start = built.theta
    (update,) = built.round().arrived[0].updates
    for k, (t, epoch, at, gradient, J) in enumerate(seen):
        assert (t, epoch) == (0, k) and torch.allclose(at, theta, atol=1e-7)
        assert torch.allclose(gradient, update.steps[k].lam.float() @ J)
        theta = theta - 0.1 * (gradient + mu * (theta - start))
    assert len(seen) == 3 and torch.allclose(built.theta, theta, atol=1e-7)
    assert (theta - start + 0.1 * sum(gradient for _, _, _, gradient, _ in seen)).norm() > 1e-3  # the pull shows


def test_scaffold_sends_its_controls_as_named_tensors_which_are_billed():
    class Controls(Server):
        def broadcast(self, federation, work, faults):
            return {"control": self.state.get("control", torch.zeros_like(federation.theta))}

        def step(self, theta, uploads):
            controls = torch.cat([upload.tensors["control"] for upload in uploads])
            self.state["control"] = fedavg.average(controls, fedavg.prompts_held(uploads))
            return super().step(theta, uploads)

    def correct(gradient, context):
        return gradient - context.state.get("control", 0.0) + context.message["control"]

    def finish(context):
        gone = (context.message["theta"] - context.theta) / context.config.lr  # in one step
        context.state["control"] = context.state.get("control", 0.0) - context.message["control"] + gone
        return {"control": context.state["control"]}

    scaffold = replace(FIRM, correct=correct, finish=finish, server=Controls)
    built, plain = (federation(method=method, optimizer="sgd", epochs=1) for method in (scaffold, FIRM))
    built.round(), plain.round()
    controlled, uncontrolled = built.round(), plain.round()
    # With one step the controls move every client, by Σ w_c (c − c_c) = 0 on average.
    assert (thetas(controlled) - thetas(uncontrolled)).norm(dim=1).min() > 1e-4
    assert torch.allclose(built.theta, plain.theta, atol=1e-6)
    for way in ("upload_bytes", "download_bytes"):
        assert metrics.bill(controlled)[way] - metrics.bill(uncontrolled)[way] == 4 * len(built.theta)


# Clients that hold only some of the objectives


def test_a_client_trains_on_the_objectives_that_it_holds_and_on_no_other():
    uploads = thetas(federation(held=[[0], [1], [0, 1]]).round())
    for j in (0, 1):
        alone = federation(M=1)
        alone.score = lambda prompts, rollout, client, j=j: score(prompts, rollout)[:, [j]]
        assert torch.equal(uploads[j], thetas(alone.round())[j])
    assert torch.equal(uploads[2], thetas(federation().round())[2])


@pytest.mark.parametrize("method", [LINEAR, MORLHF], ids=lambda method: method.name)
def test_the_preference_among_a_clients_objectives_is_that_of_all_renormalised(method):
    built = federation(method=method, M=3, held=[[0, 2], [0, 1, 2], [1]], preference=[1, 2, 4])
    record = built.round()
    weights = [metrics.objective_weights(client, record, client.index, 3)[0] for client in built.clients]
    nan = math.nan
    expected = [[0.2, nan, 0.8], [1 / 7, 2 / 7, 4 / 7], [nan, 1.0, nan]]
    assert torch.allclose(torch.stack(weights), torch.tensor(expected).double(), equal_nan=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [("fsmgda", "fsmgda compares clients on all objectives"), ("adaptive", "adaptive compares"),
     ("fedcmoo", "fedcmoo compares"), ("fedmoa", "client 1 lacks even, which fedmoa goes by")],
)  # fmt: skip
def test_a_method_that_needs_an_objective_refuses_a_client_without_it(method, message):
    with pytest.raises(ValueError, match=f"client_objectives: {message}"):
        federation(method=METHODS[method], held=[[0], [1], [0, 1]])


def test_a_client_whose_objectives_all_have_weight_zero_is_refused():
    with pytest.raises(ValueError, match="preference: client 1 "):
        federation(held=[[0], [1], [0, 1]], preference=[1, 0])
