"""What a round leaves in the log, and the best round, on cases small enough to do by hand."""

import math

import numpy as np
import pytest
import test_run
import torch
from test_faults import federation

from app import metrics
from rewards import Calibration

world = test_run.world  # the fixture
HELD = [[0], [0, 1], [1]]  # the objectives of three clients


@pytest.fixture(scope="module")
def round_of(world):
    """The third round of clients that hold different objectives: federation, record, line."""
    built = federation(world, client_objectives=["0=even", "2=short"], beta=0.3)
    built.round(), built.round()
    record = built.round()
    return built, record, metrics.line(record, built.clients, built.names)


def test_disagreement_is_the_mean_distance_to_the_mean_of_what_clients_hold():
    assert metrics.disagreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(math.sqrt(0.5))
    lambdas = torch.tensor([[1.0, math.nan], [0.5, 0.5], [0.0, 1.0]])  # means (½, ¾), distances ½, ¼, √(¼ + 1/16)
    assert metrics.disagreement(lambdas) == pytest.approx((0.5 + 0.25 + math.sqrt(0.3125)) / 3)


def test_the_cosines_are_those_of_every_pair_and_zero_with_a_zero_gradient():
    J = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [2.0, -1.0], [0.0, 0.0]])
    assert metrics.pair_cosines(J @ J.T).tolist() == pytest.approx([-1.0, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-7)


def test_figures_are_means_over_the_clients_that_hold_the_objective_and_each_client_has_its_own(round_of):
    built, record, line = round_of
    parts = list(record.arrived.values())
    lambdas = [torch.stack([step.lam for step in part.updates[0].steps]).mean(0).tolist() for part in parts]
    for j, name in enumerate(built.names):
        holders = [c for c in range(3) if j in HELD[c]]
        rewards = [parts[c].raw[:, j].numpy() for c in holders]
        assert line[f"reward/{name}"] == pytest.approx(np.mean(rewards))
        assert line[f"reward_sd/{name}"] == pytest.approx(np.std(rewards))
        of_clients = [lambdas[c][HELD[c].index(j)] for c in holders]
        assert line[f"lambda/{name}"] == pytest.approx(np.mean(of_clients))
        assert {key: x for key, x in line.items() if key.startswith(f"lambda/{name}/")} == pytest.approx(
            {f"lambda/{name}/client{c}": x for c, x in zip(holders, of_clients, strict=True)}
        )
        assert [line[f"reward/{name}/client{c}"] for c in holders] == pytest.approx(np.mean(rewards, axis=1))
    prompts = np.array([len(client.prompts) for client in built.clients])
    assert [line[f"share/client{c}"] for c in range(3)] == pytest.approx(prompts / prompts.sum())
    assert line["kl"] == pytest.approx(np.mean([line[f"kl/client{c}"] for c in range(3)]))


def test_explained_variance_is_pooled_over_the_real_tokens_of_the_clients(round_of):
    built, record, line = round_of
    for j, name in enumerate(built.names):
        variances = []
        for c in (c for c in range(3) if j in HELD[c]):
            (update,), column = record.arrived[c].updates, HELD[c].index(j)
            both = torch.stack([update.advantages.returns, update.advantages.values])[..., column].double()
            lengths = update.batch.rollout.mask.sum(1).tolist()
            R, V = np.concatenate([both[:, row, :n] for row, n in enumerate(lengths)], axis=1)
            variances.append([np.var(R - V), np.var(R)])
        unexplained, total = np.mean(variances, axis=0)
        assert line[f"explained_variance/{name}"] == pytest.approx(1 - unexplained / total, rel=1e-5)


def test_a_loss_on_several_objectives_goes_by_all_their_names(world):
    built = federation(world, method="adaptive")
    assert "advantage_scale/even+short" in metrics.line(built.round(), built.clients, built.names)


def test_a_group_of_equal_rewards_is_counted_as_one_without_spread(world):
    built = federation(world, advantages="group", group_size=2)
    record = built.round()
    line = metrics.line(record, built.clients, built.names)
    scores = torch.cat([part.raw for part in record.arrived.values()]).reshape(-1, 2, 2)  # [groups, S, M]
    silent = (scores[:, 0] == scores[:, 1]).double().mean(0).tolist()
    assert [line[f"zero_spread/{name}"] for name in built.names] == pytest.approx(silent) and any(silent)


@pytest.mark.parametrize(
    ("constant", "n", "scale", "best"),
    [
        ((False, False), 8, 1.0, 2),  # the least gains are 0.02 and 0.04, of b
        ((False, False), 8, 0.1, 1),  # 0.1 and 0.05, of a
        ((True, False), 8, 0.1, 2),
        ((True, True), 8, 1.0, None),
        ((False, False), 3, 1.0, None),  # too few prompts for two halves
    ],
)
def test_the_best_round_is_the_one_of_the_greatest_least_gain_in_base_deviations(constant, n, scale, best):
    before, gains = torch.full((n, 1, 2), 5.0), {1: torch.tensor([0.10, 0.02]), 2: torch.tensor([0.05, 0.04])}
    calibration = Calibration(torch.tensor([0.0, 0.1]), torch.tensor([1.0, scale]), torch.tensor(constant))
    answer = metrics.best_round({t: before + gain for t, gain in gains.items()}, before, calibration)
    assert (answer and answer[0]) == best


def test_the_best_round_is_chosen_on_one_half_and_reported_on_the_other():
    before, calibration = torch.zeros(8, 1, 2), Calibration(torch.zeros(2), torch.ones(2), torch.tensor([False] * 2))
    half, rest = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tensor_split(2)
    luck = torch.zeros(8, 1, 2)
    luck[half], luck[rest] = 1.0, -3.0
    best, gains = metrics.best_round({1: before + luck, 2: before}, before, calibration)
    assert best == 1 and (gains == -3.0).all()
