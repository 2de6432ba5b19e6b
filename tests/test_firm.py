"""Algorithm 1 as a whole, on a random tiny model with toy objectives, and what the methods have in common."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_policy

import firm
from baselines import FSMGDA, MORLHF, FedCMOOConfig, fedcmoo
from firm import FIRM, LINEAR, MGDA, Federation, FIRMConfig
from ppo import PPOConfig, ppo_advantages

NAMES = ["even", "low", "third", "high"]


@dataclass(frozen=True)
class Question:
    token_ids: tuple


def score(prompts, rollout, M=2):
    """Shares of even, of low, … tokens in a response: raw [N, M]."""
    ids, n = rollout.responses, rollout.mask.sum(1)
    kinds = [ids % 2 == 0, ids < 20, ids % 3 == 0, ids > 30][:M]
    return torch.stack([(kind * rollout.mask).sum(1) / n for kind in kinds], 1).double()


def federation(kind="llama", method=FIRM, seed=0, clients=3, ppo=None, M=2, device="cpu", **settings) -> Federation:
    rng = np.random.default_rng(0)
    shares = [[Question(tuple(rng.integers(3, 50, rng.integers(2, 8)))) for _ in range(4 + c)] for c in range(clients)]
    config = FIRMConfig(**{"rounds": 2, "clients": clients, "batch_size": 6, "lr": 1e-2, **settings})
    ppo = PPOConfig(**{"kl_coef": 0.01, **(ppo or {})})
    policy = make_policy(kind, noise=0.0, device=device)
    return Federation(
        policy, shares, NAMES[:M], lambda prompts, rollout: score(prompts, rollout, M), lambda raw: (raw - 0.5) / 0.2,
        config, ppo, 6, method, seed,
    )  # fmt: skip


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


@pytest.mark.parametrize("M", [2, 3, 4])
def test_only_fsmgda_sends_more_for_more_objectives_and_fedcmoo_sends_one_plus_e_times_an_adapter(M):
    e = 1.0
    sent = {
        method.name: federation(method=method, M=M, clients=2, batch_size=2, ppo={"epochs": 1}).round()
        for method in (FIRM, MGDA, LINEAR, MORLHF, FSMGDA, fedcmoo(FedCMOOConfig(fedcmoo_compression=e)))
    }
    adapter = 4 * len(federation().theta)  # bytes
    for name in ("firm", "mgda", "linear", "morlhf"):
        assert sent[name]["upload/payload"] == sent[name]["download/payload"] == adapter
    assert sent["fsmgda"]["upload/payload"] == M * adapter and sent["fsmgda"]["download/payload"] == adapter
    for way in ("upload", "download"):
        assert sent["fedcmoo"][f"{way}/payload"] == pytest.approx((1 + e) * adapter, rel=0.02)


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
     ("server_lr", 0.0), ("clients_per_round", 9), ("preference", [0.5, -0.5]), ("max_grad_norm", 0.0),
     ("gram", "full")],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        FIRMConfig(**{field: value})


def test_a_cross_gram_of_a_single_row_is_refused_by_name():
    with pytest.raises(ValueError, match="gram: cross needs two half-batches"):
        FIRMConfig(gram="cross", batch_size=1)


# Local runs


def watched(*runs):
    """Firm with these rewards per local run, and a server that never moves: the method, and a list of its uploads."""
    arrived = []

    def aggregate(theta, uploads, prompts_held, config):
        arrived.append(uploads)
        return theta, torch.full((len(runs),), 1 / len(runs), dtype=torch.float64)

    return replace(FIRM, runs=lambda M, config: list(runs), aggregate=aggregate), arrived


@pytest.mark.parametrize("optimizer", ["adam", "adam-keep"])
def test_every_local_run_of_a_client_goes_as_it_would_alone(optimizer):
    runs = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.3], [0.7]])]
    method, together = watched(*runs)
    built = federation(method=method, optimizer=optimizer)
    built.round(), built.round()  # the second with critics, and perhaps moments, that know the first
    assert together[0].shape == (3, 2, len(built.theta))
    for r, R in enumerate(runs):
        method, alone = watched(R)
        built = federation(method=method, optimizer=optimizer)
        built.round(), built.round()
        assert all(torch.equal(both[:, [r]], one) for both, one in zip(together, alone, strict=True))


def test_a_method_with_a_run_per_objective_uploads_as_many_adapters():
    method, _ = watched(*torch.eye(3).split(1, dim=1))
    assert federation(method=method, M=3).round()["upload/payload"] == 3 * federation(M=3).round()["upload/payload"]


def test_a_client_is_rejected_whole_if_one_of_its_uploads_is_broken(monkeypatch):
    real, method = firm.local_update, watched(*torch.eye(2).split(1, dim=1))
    broken = federation(method=method[0])

    def break_one(client, *args):
        upload, log = real(client, *args)
        return (upload * float("nan") if client is broken.runs[1][0] else upload), log

    monkeypatch.setattr(firm, "local_update", break_one)
    assert broken.round()["rejected_clients"] == 1
    assert method[1][0].shape[:2] == (2, 2) and torch.isfinite(method[1][0]).all()


def test_fsmgda_logs_each_objective_as_a_training_on_it_alone_would():
    # At rate 0 the policy stays, so that both see the same responses; the critics learn all the same.
    both = federation(method=FSMGDA, lr=0.0)
    both.round()
    metrics = both.round()
    for name, corner in (("even", [1.0, 0.0]), ("low", [0.0, 1.0])):
        alone = federation(method=MORLHF, preference=corner, lr=0.0)
        alone.round()
        expected = alone.round()
        for key in ("advantage_scale", "explained_variance"):
            assert metrics[f"{key}/{name}"] == pytest.approx(expected[f"{key}/loss0"], abs=1e-6)
    assert metrics["explained_variance/even"] != pytest.approx(metrics["explained_variance/low"], abs=1e-3)


# Where methods are the same


@pytest.mark.parametrize("method", [MGDA, LINEAR, MORLHF, FSMGDA, fedcmoo(FedCMOOConfig())], ids=lambda m: m.name)
def test_with_one_objective_every_method_is_firm(method):
    a, b = federation(M=1), federation(M=1, method=method)
    for _ in range(2):
        a.round(), b.round()
    assert torch.equal(a.theta, b.theta)


@pytest.mark.parametrize("objective", [0, 1])
def test_morlhf_at_a_corner_is_training_on_that_objective_alone(objective):
    corner = federation(method=MORLHF, preference=[1.0 - objective, float(objective)])
    single = federation(M=1)
    single.score = lambda prompts, rollout: score(prompts, rollout)[:, [objective]]
    for _ in range(2):
        corner.round(), single.round()
    assert torch.equal(corner.theta, single.theta)


def one_plain_step(method, clients, M, **settings):
    """θ after two rounds of one gradient step per client and run, and how far it went."""
    built = federation(method=method, clients=clients, M=M, optimizer="sgd", lr=0.1, ppo={"epochs": 1}, **settings)
    start = built.theta
    built.round(), built.round()
    return built.theta, float((built.theta - start).norm())


@pytest.mark.parametrize("M", [2, 3])
def test_with_one_client_and_one_plain_step_fsmgda_is_mgda(M):
    # Its update for one objective is −lr times that gradient, and the critic's heads learn apart.
    (a, moved), (b, _) = (one_plain_step(method, 1, M) for method in (MGDA, FSMGDA))
    assert (a - b).norm() < 1e-5 * moved


@pytest.mark.parametrize("M", [2, 3])
def test_with_one_plain_step_fsmgda_is_fedcmoo_without_compression(M):
    # Both weigh the mean gradients of the federation by min-norm, one from uploads, the other from gradients.
    lossless = FedCMOOConfig(fedcmoo_compression=2.0 * M, fedcmoo_step=0.3, fedcmoo_iterations=3000)
    (a, moved), (b, _) = (one_plain_step(method, 3, M, server_lr=0.7) for method in (fedcmoo(lossless), FSMGDA))
    assert (a - b).norm() < 1e-4 * moved
    assert (a - one_plain_step(MGDA, 3, M, server_lr=0.7)[0]).norm() > 1e-2 * moved  # while clients of mgda disagree


# Going on after an interruption


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [(FIRM, "adam"), (MORLHF, "adam-keep"), (FSMGDA, "adam-keep"),
     (fedcmoo(FedCMOOConfig(fedcmoo_iterations=50)), "adam")], ids=lambda part: getattr(part, "name", part),
)  # fmt: skip
def test_from_a_checkpoint_every_method_goes_on_bit_for_bit_in_state_and_metrics(method, optimizer):
    whole, resumed = (federation(method=method, optimizer=optimizer) for _ in range(2))
    whole.round(), whole.round()
    tensors, values = whole.state()
    resumed.restore(safetensors.torch.load(safetensors.torch.save(tensors)), values)
    expected, metrics = whole.round(), resumed.round()
    assert expected["lambda/movement"] == metrics["lambda/movement"]  # not NaN: it knows the last round's λ
    different = {name for name in expected if repr(expected[name]) != repr(metrics[name])}
    assert different == {"seconds"}
    (after, counts), (again, counts_again) = whole.state(), resumed.state()
    assert after.keys() == again.keys() and all(torch.equal(after[name], again[name]) for name in after)
    assert counts == counts_again


# The QP's Gram


def at_gradient_scale(factor, **settings):
    """λ of the first step where every advantage, and so every gradient, is `factor` times as large."""

    def scaled(*args):
        advantages = ppo_advantages(*args)
        return replace(advantages, whitened=factor * advantages.whitened)

    built = federation(method=replace(FIRM, advantages=scaled), ppo={"epochs": 1}, preference=[0.2, 0.8], **settings)
    metrics = built.round()
    return [metrics["lambda/even"], metrics["lambda/disagreement"]]


def test_on_raw_grams_gradients_s_times_as_large_are_as_a_beta_s_squared_times_smaller():
    larger = at_gradient_scale(8.0, gram="raw", beta=0.5)
    assert larger == pytest.approx(at_gradient_scale(1.0, gram="raw", beta=0.5 / 64), abs=1e-9)
    assert larger != pytest.approx(at_gradient_scale(1.0, gram="raw", beta=0.5), abs=1e-3)


def test_on_normalised_grams_the_scale_of_the_gradients_does_not_matter():
    larger = at_gradient_scale(8.0, gram="normalised", beta=0.5)
    assert larger == pytest.approx(at_gradient_scale(1.0, gram="normalised", beta=0.5), abs=1e-9)


def test_on_raw_grams_huge_gradients_get_mgdas_weights_and_tiny_ones_the_preference():
    mgda = at_gradient_scale(1.0, gram="normalised", beta=0.0)
    assert at_gradient_scale(2.0**12, gram="raw", beta=0.5) == pytest.approx(mgda, abs=1e-5)
    assert at_gradient_scale(2.0**-12, gram="raw", beta=0.5) == pytest.approx([0.2, 0.0], abs=1e-5)


def test_a_checkpoint_of_another_federation_is_refused():
    tensors, values = federation(method=FSMGDA).state()
    with pytest.raises(ValueError, match="another federation"):
        federation(method=MORLHF).restore(tensors, values)
    with pytest.raises(ValueError, match="another federation"):
        federation(clients=2).restore(*federation(clients=3).state())


def test_a_method_of_other_losses_than_the_objectives_does_not_borrow_their_names():
    twice = replace(
        FIRM, runs=lambda M, config: [torch.eye(M)] * 2,
        aggregate=lambda theta, uploads, held, config: (uploads[0, 0], torch.tensor([0.5, 0.5], dtype=torch.float64)),
    )  # fmt: skip
    metrics = federation(method=twice).round()
    assert {f"advantage_scale/loss{i}" for i in range(4)} <= metrics.keys()
