"""The server's arithmetic, by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fedavg
from fedavg import FEDAVG, Server, Upload
from settings import Config

NUMBERS = {"prompts": 1.0, "kl": 0.0}


def test_the_average_weighs_clients():
    updates = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 0.0]])
    assert fedavg.average(updates, torch.tensor([1.0, 2.0, 1.0])).tolist() == [2.75, 12.5]


def test_the_sum_runs_in_float64():
    updates = torch.tensor([[1e8], [1.0], [-1e8]])  # in float32 the 1 is lost
    assert float(fedavg.average(updates, torch.ones(3))) == pytest.approx(1 / 3, rel=1e-6)


def test_a_client_of_weight_zero_leaves_no_trace_even_if_it_is_nan():
    updates = torch.tensor([[1.0], [float("nan")]])
    assert fedavg.average(updates, torch.tensor([1.0, 0.0])).tolist() == [1.0]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_cannot_be_normalised_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        fedavg.average(torch.ones(2, 3), torch.tensor(weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [None, "theta", "control", "kl"])
def test_the_first_tensor_or_number_that_is_not_finite_is_the_fault(name, value):
    upload = Upload({"theta": torch.zeros(1, 2), "control": torch.zeros(1, 2)}, dict(NUMBERS))
    if name in upload.tensors:
        upload.tensors[name][0, 1] = value
    elif name:
        upload.numbers[name] = value
    assert upload.fault == name


def test_clients_vanish_with_the_probability_given_and_never_all_of_them():
    rng, clients = np.random.default_rng(0), range(10)
    rounds = [fedavg.staying(clients, 0.3, rng) for _ in range(2000)]
    assert np.mean([len(staying) for staying in rounds]) == pytest.approx(7, abs=0.1)
    assert all(staying == sorted(staying) for staying in rounds)
    assert fedavg.staying(clients, 0.0, rng) == list(clients)
    assert {len(fedavg.staying(clients, 1.0, rng)) for _ in range(50)} == {1}


def test_client_sampling_draws_distinct_clients_and_every_client_in_time():
    rng = np.random.default_rng(0)
    draws = [fedavg.sample_clients(8, 3, rng) for _ in range(100)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in draws)
    assert set().union(*draws) == set(range(8))


def test_the_server_mixes_each_clients_trainings_and_then_averages_clients_by_their_prompts():
    class Mixing(Server):
        def training_shares(self, updates, weights):
            return torch.tensor([0.25, 0.75]).double()

    theta, mixed = torch.tensor([1.0, 1.0]), torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    uploads = [Upload({"theta": theta + moved}, {"prompts": n}) for moved, n in ((mixed, 1.0), (0 * mixed, 3.0))]
    moved, shares, training_shares = Mixing(Config(server_lr=0.5)).step(theta, uploads)
    assert moved.tolist() == [1 + 0.5 * 0.25, 1 + 0.5 * 1.5]  # three quarters of the prompts did not move
    assert shares.tolist() == training_shares.tolist() == [0.25, 0.75]


def test_an_average_of_another_kind_takes_its_place():
    median = replace(FEDAVG, combine=lambda updates, weights: updates.median(0).values)
    uploads = [Upload({"theta": torch.full((1, 2), value)}, NUMBERS) for value in (1.0, 2.0, 1e9)]
    assert Server(Config(), median).step(torch.zeros(2), uploads)[0].tolist() == [2.0, 2.0]


def test_an_adapter_that_the_server_made_infinite_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="lower server_lr"):
        Server(Config(server_lr=1e30)).step(torch.zeros(2), [Upload({"theta": torch.full((1, 2), 1e30)}, NUMBERS)])
