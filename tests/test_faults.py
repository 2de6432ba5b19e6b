"""What goes wrong in a federation, on a disk, or in a terminal: who is left out, what is kept, how a run ends."""

from dataclasses import replace

import pytest
import torch
from test_firm import broken_clients, fedcmoo, federation

import fedavg
from baselines import FSMGDA
from fedmoa import FEDMOA
from firm import FIRM

# ---- clients -------------------------------------------------------------------------------------------------


def spoil(built, *indices) -> None:
    """From now on the rewards of these clients are NaN by the time that their gradients are taken."""
    real = built.prepare

    def prepare(cohort, responses):
        batches = real(cohort, responses)
        return [
            replace(batch, scores=batch.scores * torch.nan) if client.index in indices else batch
            for client, batch in zip(cohort, batches, strict=True)
        ]

    built.prepare = prepare


def home(client) -> dict:
    """What a client keeps to itself."""
    return {f"{i}.{n}": t.clone() for i, own in enumerate(client.trainings) for n, t in own.state().items()}


@pytest.mark.parametrize("method", [FIRM, FSMGDA, fedcmoo()], ids=lambda method: method.name)
@pytest.mark.parametrize("where", ["gradient", "upload"])
def test_a_client_that_is_not_finite_leaves_the_round_to_the_others_and_keeps_what_it_had(method, where):
    built = federation(method=method, optimizer="adam-keep", diagnostics=False)
    built.round()
    before, (first, last) = home(built.clients[1]), (home(built.clients[c]) for c in (0, 2))
    if where == "gradient":
        spoil(built, 1)
    with broken_clients(*([1] if where == "upload" else [])):
        line = built.round()
    assert [client.index for client in built.record.cohort] == [0, 2]
    assert line["rejected_clients"] == 1 and "not finite" in line["rejected"]["client1"]
    after = home(built.clients[1])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(first[name], t) for name, t in home(built.clients[0]).items())
    assert any(not torch.equal(last[name], t) for name, t in home(built.clients[2]).items())


def test_a_round_without_a_client_is_bit_for_bit_the_average_of_the_others():
    built = federation()
    spoil(built, 1)
    for _ in range(3):
        built.round()
        uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
        assert len(uploads) == 2
        theta = built.record.updates[0][0].batch  # the others' own batches are untouched
        assert torch.isfinite(theta.scores).all()
    assert torch.isfinite(built.theta).all()


def test_the_survivors_of_a_fault_do_what_they_would_without_the_client():
    alone, with_fault = federation(clients=3), federation(clients=3)
    spoil(with_fault, 2)
    with broken_clients(2):
        alone.round()
    with_fault.round()
    assert torch.equal(alone.theta, with_fault.theta) and alone.kl_coef == with_fault.kl_coef


def test_a_client_that_vanishes_leaves_the_round_to_the_others():
    built = federation(clients=3, client_dropout=0.5, server_lr=1.0)
    seen = []
    for _ in range(6):
        theta = built.theta
        line = built.round()
        uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
        held = fedavg.prompts_held(built.record.cohort)
        assert torch.equal(built.theta, theta + fedavg.average(uploads - theta, held))
        assert line["dropped_clients"] == 3 - len(uploads)
        seen.append(tuple(client.index for client in built.record.cohort))
    assert len(set(seen)) > 2


def test_without_dropout_nothing_changes():
    assert torch.equal(federation(client_dropout=0.0).theta, federation().theta)


def test_where_no_client_is_left_the_run_ends_with_what_was_not_finite_first():
    built = federation()
    spoil(built, 0, 1, 2)
    with pytest.raises(
        ValueError, match="no client's update can be used; client 0: its calibrated rewards are not finite"
    ):
        built.round()


def test_a_server_rate_that_throws_the_adapter_out_of_range_is_named():
    built = federation(server_lr=1e39)
    with pytest.raises(ValueError, match="server_lr: .* lower server_lr or lr"):
        built.round()
    assert torch.isfinite(built.theta).all()


def test_fedmoa_forgets_nothing_of_a_client_that_failed(monkeypatch):
    monkeypatch.setattr("test_firm.score", lambda prompts, rollout, M: torch.rand(len(prompts), M).double())
    built = federation(method=FEDMOA, diagnostics=False)
    built.round()
    before = home(built.clients[1])
    spoil(built, 1)
    built.round()
    after = home(built.clients[1])
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_huge_preferences_are_shares_all_the_same():
    import mgda

    assert mgda.preference_vector([1e308, 1e308], 2).tolist() == [0.5, 0.5]
