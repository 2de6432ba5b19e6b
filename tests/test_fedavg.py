"""The server's arithmetic, by hand."""

import numpy as np
import pytest
import torch

import fedavg
from fedavg import Upload


def test_the_average_weighs_clients_by_their_prompts():
    updates = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 0.0]])
    assert fedavg.average(updates, torch.tensor([1.0, 2.0, 1.0])).tolist() == [2.75, 12.5]


def test_one_client_gets_back_its_own_adapter():
    theta = torch.randn(1, 100)
    assert torch.equal(fedavg.average(theta, torch.tensor([7.0])), theta[0])


def test_the_sum_runs_in_float64():
    updates = torch.tensor([[1e8], [1.0], [-1e8]])  # in float32 the 1 is lost
    assert float(fedavg.average(updates, torch.ones(3))) == pytest.approx(1 / 3, rel=1e-6)


def test_a_client_of_weight_zero_leaves_no_trace_even_if_it_is_nan():
    updates = torch.tensor([[1.0], [float("nan")]])
    assert fedavg.average(updates, torch.tensor([1.0, 0.0])).tolist() == [1.0]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [1.0]])
def test_weights_that_cannot_be_normalised_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        fedavg.average(torch.ones(2, 3), torch.tensor(weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_a_fault(value):
    assert Upload(torch.tensor([[1.0, 2.0]]), 1, 0.0).fault is None
    assert "adapter after the last step is not finite" in Upload(torch.tensor([[value, 0.0]]), 1, 0.0).fault


@pytest.mark.parametrize("numbers", [{"kl": float("nan")}, {"numbers": {"accuracy": float("inf")}}])
def test_any_other_number_that_is_not_finite_is_a_fault_too(numbers):
    assert "not all finite" in Upload(**{"thetas": torch.zeros(1, 2), "prompts_held": 1, "kl": 0.0, **numbers}).fault


def test_clients_vanish_with_the_probability_given_and_never_all_of_them():
    rng, clients = np.random.default_rng(0), range(10)
    kept = [fedavg.staying(clients, 0.3, rng) for _ in range(2000)]
    assert np.mean([len(staying) for staying in kept]) == pytest.approx(7, abs=0.1)
    assert all(staying == sorted(staying) for staying in kept)
    assert fedavg.staying(clients, 0.0, rng) == list(clients)
    assert {len(fedavg.staying(clients, 1.0, rng)) for _ in range(50)} == {1}


def test_a_named_number_in_an_upload_is_on_the_bill():
    bills = []
    for numbers in ({}, {"accuracy": 0.5, "share": 0.25}):
        ledger = fedavg.Ledger()
        ledger.upload(Upload(torch.zeros(1, 10), 7, 0.1, numbers))
        bills.append(ledger.bytes)
    assert bills[1]["upload/scalars"] - bills[0]["upload/scalars"] == 16
    assert bills[0]["upload/scalars"] == 16 and bills[0]["upload/payload"] == bills[1]["upload/payload"] == 40


def test_the_mean_update_mixes_each_clients_trainings_and_weighs_clients_by_their_prompts():
    theta = torch.tensor([1.0, 1.0])
    uploads = [Upload(theta + torch.tensor([[4.0, 0.0], [0.0, 8.0]]), n, 0.0) for n in (1, 3)]
    uploads[1].thetas = theta.expand(2, 2)  # three quarters of the prompts did not move
    mixed = fedavg.mean_update(theta, uploads, fedavg.prompts_held(uploads), torch.tensor([0.25, 0.75]).double())
    assert mixed.tolist() == [0.25, 1.5]


def test_client_sampling_draws_distinct_clients_and_every_client_in_time():
    rng = np.random.default_rng(0)
    draws = [fedavg.sample_clients(8, 3, rng) for _ in range(100)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in draws)
    assert set().union(*draws) == set(range(8))


@pytest.mark.parametrize("per_round", [0, 9])
def test_a_cohort_size_outside_1_to_c_is_refused_by_name(per_round):
    with pytest.raises(ValueError, match="clients_per_round"):
        fedavg.sample_clients(8, per_round, np.random.default_rng(0))


def test_a_message_is_its_payload_its_scalars_and_a_small_header():
    parts = fedavg.message_bytes({"theta": torch.zeros(1000)}, scalars=3)
    assert parts["payload"] == 4000 and parts["scalars"] == 24 and 0 < parts["header"] < 300


def test_an_empty_message_is_not_sent():
    assert sum(fedavg.message_bytes({}).values()) == 0


def test_a_ledger_adds_up_each_way_by_part():
    ledger = fedavg.Ledger()
    ledger.up({"theta": torch.zeros(10)}, scalars=2)
    ledger.up({"more": torch.zeros(5, dtype=torch.float64)})
    ledger.down({"theta": torch.zeros(10)})
    metrics = ledger.metrics()
    assert (metrics["upload/payload"], metrics["upload/scalars"], metrics["download/payload"]) == (80, 16, 40)
    assert metrics["upload_bytes"] == sum(metrics[f"upload/{part}"] for part in ("payload", "header", "scalars"))
