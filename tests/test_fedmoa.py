"""FedMOA: the hypergradient, the weights, the accuracy-aware average, personalisation; a run is in test_run.py."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_firm import assert_same_state, federation, thetas

import fedmoa
import ppo
from clients import Purpose
from fedavg import FEDAVG, Upload
from fedmoa import FEDMOA
from firm import LINEAR
from settings import Config

# The weights


def test_the_hypergradient_is_the_derivative_of_the_primary_loss_by_the_weights():
    """On quadratics under plain SGD, in float64: −η ⟨∇L_primary(θ′), g_i⟩ against central differences."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    A = draw(3, 7, 7)
    A, centre, theta, lr = A @ A.mT, draw(3, 7), draw(7), 0.01
    gradient = lambda x: torch.einsum("ijk,ik->ij", A, x - centre)  # [3, 7]  # noqa: E731
    taken, primary = gradient(theta), 0

    def primary_loss(w):
        off = theta - lr * w @ taken - centre[primary]
        return float(0.5 * off @ A[primary] @ off)

    w = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)  # any, not on the simplex
    fresh = gradient(theta - lr * w @ taken)[primary]
    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    differences = [(primary_loss(w + e) - primary_loss(w - e)) / 2e-5 for e in steps]
    units = fresh.norm() * taken.norm(dim=1).clamp_min(taken[0].norm())
    assert (-lr * units * fedmoa.hypergradients(fresh, taken)).tolist() == pytest.approx(differences, rel=1e-6)


def test_h_is_a_cosine_less_if_the_gradient_is_shorter_than_the_primarys_and_zero_for_a_gradient_of_zero():
    primary = torch.tensor([2.0, 0.0])
    taken = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [-20.0, 0.0]])
    expected = [0.6, 0.2, 0.0, -1.0]  # the first is the primary's own, of length 5
    assert fedmoa.hypergradients(primary, taken).tolist() == pytest.approx(expected)
    assert fedmoa.hypergradients(1e-12 * primary, 1e9 * taken).tolist() == pytest.approx(expected)
    assert not fedmoa.hypergradients(0 * primary, taken).any() and not fedmoa.hypergradients(primary, 0 * taken).any()


def test_the_weights_stay_on_the_simplex_and_what_the_preference_leaves_out_stays_out():
    rng = np.random.default_rng(0)
    w = prior = torch.tensor([0.5, 0.3, 0.0, 0.2]).double()
    for _ in range(200):
        w = fedmoa.next_weights(w, prior, torch.from_numpy(rng.uniform(-1, 1, 4)), rate=1e3)
        assert (w >= 0).all() and float(w.sum()) == pytest.approx(1.0) and w[2] == 0.0


def test_under_a_steady_cosine_the_weights_end_at_rate_over_pull_from_the_preference():
    w = prior = torch.tensor([0.5, 0.3, 0.2]).double()
    h = torch.tensor([0.3, 0.0, -0.1]).double()
    for _ in range(500):
        w = fedmoa.next_weights(w, prior, h, rate=0.5)
    expected = prior * torch.exp(0.5 / fedmoa.HYPER_PULL * h)
    assert w.tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_a_round_moves_the_weights_by_the_fresh_primary_gradient_and_the_last_step_of_the_round_before(monkeypatch):
    seen, original = [], ppo.policy_gradients  # all J that local updates took, in order
    monkeypatch.setattr(ppo, "policy_gradients", lambda *a: seen.append(original(*a)) or seen[-1])
    built = federation(method=FEDMOA, preference=[3, 1])
    first, second = built.round(), built.round()
    C, K = 3, 2
    for c in range(C):
        assert all(step.lam.tolist() == [0.75, 0.25] for step in first.arrived[c].updates[0].steps)
        last, fresh = seen[c * K + 1].J.double(), seen[C * K + c * K].J.double()[0]
        lengths = last.norm(dim=1)
        h = last @ fresh / (fresh.norm() * torch.maximum(lengths, lengths[0]))
        w = torch.softmax(torch.tensor([0.75, 0.25]).double().log() + 2.0 * h, 0)  # the pull is towards where it is
        steps = second.arrived[c].updates[0].steps
        assert steps[0].lam.tolist() == pytest.approx(w.tolist(), rel=1e-6) and steps[1].lam.equal(steps[0].lam)


@pytest.mark.parametrize(
    ("scores", "S", "expected"),
    [([1, 1, 0, 0], 2, False), ([1, 1, 0, 1], 2, True), ([1, 1, 0, 0], 1, True), ([1, 1, 1, 1], 1, False)],
)
def test_scores_vary_within_groups_or_without_groups_at_all(scores, S, expected):
    assert fedmoa.varies(torch.tensor(scores), S) == expected


def test_if_the_primarys_rewards_do_not_vary_the_weights_stay():
    built = federation(method=FEDMOA, kl_coef=0.5)
    original = built.score
    built.score = lambda *arguments: original(*arguments) * torch.tensor([0.0, 1.0]).double()
    for _ in range(3):
        built.round()
    assert all(client.state[0]["weights"].tolist() == [0.5, 0.5] for client in built.clients)


def test_a_saturated_auxiliarys_h_is_nearly_zero(monkeypatch):
    cosines, original = [], fedmoa.hypergradients
    monkeypatch.setattr(
        fedmoa, "hypergradients", lambda *arguments: cosines.append(original(*arguments)) or cosines[-1]
    )
    built = federation(method=FEDMOA, clients=2, batch_size=16, lr=3e-2)
    score = built.score
    built.score = lambda *arguments: score(*arguments) * torch.tensor([1.0, 0.0]).double()
    for _ in range(5):
        built.round()
    h = torch.stack(cosines).abs()  # [rounds and clients, 2]
    assert 0 < h[:, 1].max() < 0.1 * h[:, 0].max()


def test_a_client_that_is_not_sampled_keeps_its_weights_and_gradients():
    built = federation(method=FEDMOA, clients_per_round=1)
    for _ in range(3):
        before = [client.state for client in built.clients]
        (chosen,) = built.round().arrived
        assert [client.state is kept for client, kept in zip(built.clients, before, strict=True)] == [
            c != chosen for c in range(3)
        ]
    assert set(built.clients[chosen].state[0]) == {"weights", "taken"}  # and no critic


def test_an_objective_that_a_client_lacks_has_no_row_and_no_weight():
    built = federation(method=FEDMOA, held=[[0, 1, 2], [0, 2], [0]], M=3)
    built.round()
    record = built.round()
    assert [len(client.state[0]["taken"]) for client in built.clients] == [3, 2, 1]
    assert [len(part.updates[0].steps[0].lam) for part in record.arrived.values()] == [3, 2, 1]


# The average


def weights_of(accuracies, held=(1, 1, 1), tasks=(0, 0, 0), variances=(0.0, 0.0, 0.0), power=1.0):
    """The shares of three clients in the average."""
    names = ("prompts", "task", "accuracy", "accuracy_variance")
    rows = zip(held, tasks, accuracies, variances, strict=True)
    uploads = [Upload({}, dict(zip(names, map(float, row), strict=True))) for row in rows]
    weights = fedmoa.accuracy_weights(uploads, Config(accuracy_power=power))
    return (weights / weights.sum()).tolist()


def test_within_a_task_a_client_counts_by_its_prompts_times_a_power_of_its_accuracy_and_tasks_count_alike():
    expected = np.array([3 * 0.04, 2 * 0.16, 0.64])
    assert weights_of([0.2, 0.4, 0.8], held=[3, 2, 1], power=2.0) == pytest.approx(expected / expected.sum())
    assert weights_of([0.2, 0.4, 0.8], tasks=[0, 0, 5]) == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert weights_of([0.02, 0.02, 0.03], power=300.0) == pytest.approx([0.0, 0.0, 1.0])  # no power is too high


def test_if_nobody_was_right_clients_count_by_their_prompts_with_a_warning():
    with pytest.warns(UserWarning, match="no client of a task was right"):
        assert weights_of([0.0, 0.0, 0.5], held=[1, 3, 4], tasks=[0, 0, 1]) == pytest.approx([1 / 8, 3 / 8, 1 / 2])


def test_with_a_power_of_zero_and_one_task_the_average_is_fedavg_to_the_last_bit():
    aware, plain = (federation(method=method, accuracy_power=0.0) for method in
                    (FEDMOA, replace(FEDMOA, aggregation=FEDAVG)))  # fmt: skip
    for built in (aware, plain):
        built.round(), built.round()
    assert torch.equal(aware.theta, plain.theta)


def test_a_spread_that_chance_explains_counts_for_nothing_and_a_sure_one_in_full():
    accuracies = torch.tensor([0.2, 0.3, 0.4]).double()  # of variance 0.01
    for variance, expected in ((0.0, [0.2, 0.3, 0.4]), (0.005, [0.25, 0.3, 0.35]), (0.02, [0.3, 0.3, 0.3])):
        assert fedmoa.shrunk(accuracies, torch.full((3,), variance).double()).tolist() == pytest.approx(expected)
    assert fedmoa.shrunk(torch.tensor([0.25]).double(), torch.tensor([0.1]).double()).tolist() == [0.25]


def test_shrinking_brings_the_estimates_nearer_to_the_truth():
    rng = np.random.default_rng(0)
    raw = shrunk = 0.0
    for _ in range(300):
        truth = rng.uniform(0.4, 0.6, 8)
        given = rng.binomial(16, truth) / 16
        variances = torch.from_numpy(given * (1 - given) / 15)
        raw += ((given - truth) ** 2).sum()
        shrunk += ((fedmoa.shrunk(torch.from_numpy(given), variances).numpy() - truth) ** 2).sum()
    assert shrunk < 0.7 * raw


def test_a_client_sends_its_task_and_its_accuracy_and_the_average_follows_them():
    built = federation(method=FEDMOA)
    before, record = built.theta.clone(), built.round()
    for part in record.arrived.values():
        rewards = part.raw[:, 0].numpy()
        variance = rewards.reshape(3, 2).mean(1).var(ddof=1) / 3  # of the means of its groups
        expected = {"task": 0.0, "accuracy": rewards.mean(), "accuracy_variance": variance}
        assert part.upload.numbers == pytest.approx(part.upload.numbers | expected) and len(part.upload.numbers) == 5
    numbers = [part.upload.numbers for part in record.arrived.values()]
    shares = weights_of(*([n[name] for n in numbers] for name in ("accuracy", "prompts", "task", "accuracy_variance")))
    moved = torch.tensor(shares).float() @ (thetas(record) - before)
    assert torch.allclose(built.theta - before, moved, atol=1e-7)


def test_the_accuracy_of_one_prompt_is_not_held_for_certain():
    raw = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()[:, None]
    numbers = fedmoa.accuracy_numbers(SimpleNamespace(task=3), raw, 4)
    assert numbers == pytest.approx({"task": 3.0, "accuracy": 0.25, "accuracy_variance": 0.25 * 0.75})


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_a_primary_reward_that_is_no_accuracy_is_refused_at_calibration(value):
    built = federation(method=FEDMOA)
    built.score = lambda prompts, rollout, client: torch.full((len(prompts), 2), value).double()
    with pytest.raises(ValueError, match=f"aggregation: .* client 0 got one of {value}; use --aggregation fedavg"):
        built.calibrate()


# Personalisation


def test_personalisation_changes_nothing_but_what_it_returns():
    built, untouched = federation(method=FEDMOA, personal_rounds=2), federation(method=FEDMOA)
    built.round(), untouched.round()
    personal = [fedmoa.personalise(built, client) for client in built.clients[:2]]
    assert_same_state(built, untouched)
    assert torch.equal(built.policy.adapter.vector(), built.theta)
    assert not torch.equal(*personal) and not torch.equal(personal[0], built.theta)


def test_personal_rounds_are_those_of_a_federation_of_its_own():
    settings = {"method": LINEAR, "clients": 1, "kl_target": 0.0}
    built, alone = federation(personal_rounds=2, **settings), federation(**settings)
    built.round(), alone.round()
    batches = alone.batches
    alone.batches = lambda cohort: batches(cohort, Purpose.PERSONAL, alone.rounds_done - 1)
    alone.config = replace(alone.config, lr=fedmoa.PERSONAL_LR * alone.config.lr)
    alone.round(), alone.round()
    assert torch.allclose(fedmoa.personalise(built, built.clients[0]), alone.theta, atol=1e-7)
