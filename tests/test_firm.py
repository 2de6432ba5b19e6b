"""Algorithm 1 as a whole, on a random tiny model with two toy objectives."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_policy

import firm
from firm import FIRM, LINEAR, MGDA, Federation, FIRMConfig
from ppo import PPOConfig


@dataclass(frozen=True)
class Question:
    token_ids: tuple


def score(prompts, rollout):
    """Even tokens against low tokens: shares of a response, raw [N, 2]."""
    n = rollout.mask.sum(1)
    even = ((rollout.responses % 2 == 0) * rollout.mask).sum(1) / n
    low = ((rollout.responses < 20) * rollout.mask).sum(1) / n
    return torch.stack([even, low], 1).double()


def federation(kind="llama", method=FIRM, seed=0, clients=3, ppo=None, **settings) -> Federation:
    rng = np.random.default_rng(0)
    shares = [[Question(tuple(rng.integers(3, 50, rng.integers(2, 8)))) for _ in range(4 + c)] for c in range(clients)]
    config = FIRMConfig(**{"rounds": 2, "clients": clients, "batch_size": 6, "lr": 1e-2, **settings})
    ppo = PPOConfig(**{"kl_coef": 0.01, **(ppo or {})})
    policy = make_policy(kind, noise=0.0)
    return Federation(
        policy, shares, ["even", "low"], score, lambda raw: (raw - 0.5) / 0.2, config, ppo, 6, method, seed
    )


def test_training_raises_both_objectives_where_they_can_rise_together():
    # Not a claim about FIRM, only that the signs of reward, advantage, loss and step fit together.
    trained = federation(batch_size=32)
    metrics = [trained.round() for _ in range(12)]
    for name in ("even", "low"):
        first, last = (np.mean([m[f"reward/{name}"] for m in part]) for part in (metrics[:2], metrics[-2:]))
        assert last > first + 0.1


def test_the_base_weights_stay_bit_for_bit(kind):
    trained = federation(kind)
    frozen = {k: v.clone() for k, v in trained.policy.model.state_dict().items() if not k.endswith((".A", ".B"))}
    trained.round()
    now = trained.policy.model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    assert not torch.equal(trained.theta, federation(kind).theta)  # while the adapter did move


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_at_learning_rate_zero_nothing_moves(kind, optimizer):
    trained = federation(kind, lr=0.0, optimizer=optimizer)
    before = trained.theta.clone()
    metrics = trained.round()
    assert torch.equal(trained.theta, before)
    assert metrics["kl"] == 0.0 and metrics["approx_kl"] == 0.0 and metrics["clip_fraction"] == 0.0


def test_the_same_seed_repeats_a_run_bit_for_bit():
    a, b = federation(), federation()
    for _ in range(2):
        a.round(), b.round()
    assert torch.equal(a.theta, b.theta)


def test_another_seed_gives_another_run():
    a, b = federation(), federation(seed=1)
    a.round(), b.round()
    assert not torch.equal(a.theta, b.theta)


@pytest.mark.parametrize("optimizer", ["adam", "adam-keep"])
def test_a_restored_federation_goes_on_bit_for_bit(optimizer):
    whole = federation(optimizer=optimizer)
    whole.round()
    tensors, values = whole.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    whole.round()
    resumed = federation(optimizer=optimizer)
    resumed.restore(tensors, values)
    resumed.round()
    assert torch.equal(whole.theta, resumed.theta)


def test_kept_moments_change_the_second_round():
    fresh, kept = federation(optimizer="adam"), federation(optimizer="adam-keep")
    fresh.round(), kept.round()
    assert torch.equal(fresh.theta, kept.theta)
    fresh.round(), kept.round()
    assert not torch.equal(fresh.theta, kept.theta)


def test_a_clients_upload_does_not_depend_on_who_shares_its_batch():
    together = federation(clients=3)
    prompts, rollout = together.rollout(together.clients, 0, firm.TRAINING)
    alone_prompts, alone = together.rollout(together.clients[1:2], 0, firm.TRAINING)
    assert prompts[1] == alone_prompts[0]
    mine = rollout.rows(slice(6, 12))
    n = min(mine.mask.shape[1], alone.mask.shape[1])
    assert torch.equal(mine.mask[:, :n], alone.mask[:, :n])
    assert torch.equal(mine.responses * mine.mask, alone.responses[:, :n] * alone.mask[:, :n])
    config, ppo = together.config, together.ppo_config
    uploads = [
        firm.local_update(
            federation().clients[1], together.policy, together.theta, batch.rows(slice(0, 6)),
            score(None, batch).float(), 0.01, FIRM, config, ppo,
        )[0]
        for batch in (mine, alone)
    ]  # fmt: skip
    assert torch.equal(*uploads)


def test_the_server_averages_by_prompts_held():
    trained, uploads = federation(), []
    real = firm.local_update

    def spy(*args, **kwargs):
        result = real(*args, **kwargs)
        uploads.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firm, "local_update", spy)
        trained.round()
    held = torch.tensor([4.0, 5.0, 6.0])
    by_hand = (torch.stack(uploads) * (held / held.sum())[:, None]).sum(0)
    assert (trained.theta - by_hand).abs().max() < 1e-6


def test_half_a_server_rate_goes_half_the_way():
    start = federation().theta
    full, half = federation(), federation(server_lr=0.5)
    full.round(), half.round()
    assert ((half.theta - start) - 0.5 * (full.theta - start)).abs().max() < 1e-6


def test_one_adapter_is_uploaded_whatever_the_number_of_objectives():
    two = federation()
    three = Federation(
        two.policy, [c.prompts for c in two.clients], ["even", "low", "odd"], None, two.calibrate, two.config,
        two.ppo_config, two.max_new_tokens,
    )  # fmt: skip
    three.score = lambda prompts, rollout: torch.cat([score(prompts, rollout), 1 - score(prompts, rollout)[:, :1]], 1)
    assert two.round()["upload_bytes"] == three.round()["upload_bytes"]


def test_mgda_is_firm_with_beta_zero():
    a, b = federation(method=MGDA, beta=5.0), federation(method=FIRM, beta=0.0)
    a.round(), b.round()
    assert torch.equal(a.theta, b.theta)


def test_linear_keeps_the_preference():
    metrics = federation(method=LINEAR, preference=[0.3, 0.7]).round()
    assert metrics["lambda/even"] == pytest.approx(0.3) and metrics["lambda/disagreement"] == pytest.approx(
        0.0, abs=1e-12
    )


def test_firm_with_a_huge_beta_is_linear():
    a, b = federation(beta=1e9, preference=[0.3, 0.7]), federation(method=LINEAR, preference=[0.3, 0.7])
    a.round(), b.round()
    assert (a.theta - b.theta).abs().max() < 1e-5


def test_a_larger_beta_makes_clients_agree_more():
    disagreement = {beta: federation(beta=beta).round()["lambda/disagreement"] for beta in (0.0, 1.0, 10.0)}
    assert disagreement[0.0] > disagreement[1.0] > disagreement[10.0]


def test_only_the_sampled_clients_take_part():
    trained = federation(clients=3, clients_per_round=1)
    trained.round()
    assert sum(bool(c.critic.weight.any()) for c in trained.clients) == 1


def test_a_broken_update_is_rejected_and_counted(monkeypatch):
    real = firm.local_update

    def broken(client, *args, **kwargs):
        upload, log = real(client, *args, **kwargs)
        return (upload * float("nan") if client.index == 0 else upload), log

    monkeypatch.setattr(firm, "local_update", broken)
    trained = federation()
    assert trained.round()["rejected_clients"] == 1
    assert torch.isfinite(trained.theta).all()


def test_if_every_update_is_broken_the_round_ends_with_a_remedy(monkeypatch):
    real = firm.local_update
    monkeypatch.setattr(firm, "local_update", lambda *a, **k: (real(*a, **k)[0] * float("nan"), {}))
    with pytest.raises(ValueError, match="lower lr"):
        federation().round()


def test_plain_gradient_descent_along_mgda_promises_every_objective_a_gain():
    assert federation(method=MGDA, optimizer="sgd", lr=0.1, ppo={"epochs": 1}).round()["first_order_gain"] >= 0.0


def test_a_client_draws_every_prompt_before_any_twice():
    client = federation().clients[2]
    drawn = client.draw(12, np.random.default_rng(0))
    assert set(drawn[:6]) == set(client.prompts) == set(drawn[6:])


def test_micro_batches_change_no_more_than_rounding():
    # SGD, since Adam's first step divides every gradient, rounding included, by its own size.
    a, b = (federation(optimizer="sgd", ppo={"micro_batch_size": size}) for size in (None, 4))
    a.round(), b.round()
    assert (a.theta - b.theta).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("clients", 0), ("batch_size", 0), ("beta", -0.1), ("lr", float("nan")), ("optimizer", "lion"),
     ("server_lr", 0.0), ("clients_per_round", 9), ("preference", [0.5, -0.5]), ("max_grad_norm", 0.0)],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        FIRMConfig(**{field: value})
