"""Algorithm 1 as a whole, on a random tiny model with toy objectives, and what the methods have in common."""

from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_policy

import clients
import fedavg
import firm
from app import metrics
from app.checkpoint import federation_state, restore_federation
from baselines import FEDCMOO, FSMGDA, MORLHF, FedCMOOConfig
from clients import ClientConfig
from evidence import diagnostics
from firm import FIRM, LINEAR, MGDA, Federation, FIRMConfig, TrainingConfig
from grpo import Groups
from ppo import PPO, PPOConfig
from rewards import Calibration
from settings import METHODS

NAMES = ["even", "low", "third", "high"]
TRAINED = [method for method in METHODS.values() if not method.mixes]
CLIENT_FIELDS = {f.name for f in fields(ClientConfig)}


@dataclass(frozen=True)
class Question:
    token_ids: tuple


def score(prompts, rollout, M=2):
    """Shares of even, of low, … tokens in a response: raw [N, M]."""
    ids, n = rollout.responses, rollout.mask.sum(1)
    kinds = [ids % 2 == 0, ids < 20, ids % 3 == 0, ids > 30][:M]
    return torch.stack([(kind * rollout.mask).sum(1) / n for kind in kinds], 1).double()


class LoggedFederation(Federation):
    """A federation whose rounds return their line of metrics; `record` and `grams` keep what it was made from."""

    def round(self) -> dict[str, float]:
        self.record = super().round()
        line = metrics.line(self.record, self.names, self.policy.adapter)
        if not self.config.firm.diagnostics:
            return line
        figures, self.grams = diagnostics.observe(self.record)
        return line | figures


def federation(kind="llama", method=FIRM, seed=0, clients=3, ppo=None, M=2, device="cpu", held=None, **settings):
    """A small federation on random weights; settings are FIRM's or the client's."""
    rng = np.random.default_rng(0)
    shares = [[Question(tuple(rng.integers(3, 50, rng.integers(2, 8)))) for _ in range(4 + c)] for c in range(clients)]
    groups = {"group_size": 2} if method.learner.group_size > 1 else {}
    settings = {"rounds": 2, "clients": clients, "batch_size": 6, "lr": 1e-2, "seed": seed, **groups, **settings}
    of_client = {name: settings.pop(name) for name in CLIENT_FIELDS & settings.keys()}
    config = TrainingConfig(
        FIRMConfig(**{"diagnostics": held is None, **settings}), ClientConfig(**of_client),
        PPOConfig(**{"kl_coef": 0.01, **(ppo or {})}),
    )  # fmt: skip
    policy = make_policy(kind, noise=0.0, device=device, max_new_tokens=6)

    def scored(prompts, rollout, holdings):
        raw = score(prompts, rollout, M)
        for rows, objectives, _ in holdings:
            raw[rows, [j for j in range(M) if j not in objectives]] = torch.nan
        return raw

    built = LoggedFederation(policy, shares, NAMES[:M], scored, method, config, held)
    built.calibration = Calibration(
        torch.full((M,), 0.5).double(), torch.full((M,), 0.2).double(), torch.zeros(M).bool()
    )
    return built


def fedcmoo(compression=1.0, **settings):
    """FedCMOO with these settings of its own."""
    own = {f"fedcmoo_{name}": value for name, value in settings.items()}
    return replace(FEDCMOO, settings=FedCMOOConfig(fedcmoo_compression=compression, **own))


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


def test_kept_moments_change_the_second_round():
    fresh, kept = federation(optimizer="adam"), federation(optimizer="adam-keep")
    fresh.round(), kept.round()
    assert torch.equal(fresh.theta, kept.theta)
    fresh.round(), kept.round()
    assert not torch.equal(fresh.theta, kept.theta)


def test_a_clients_upload_does_not_depend_on_who_shares_its_batch():
    cohort = federation(clients=3)
    shared = cohort.respond(cohort.clients, clients.TRAINING)
    alone = cohort.respond(cohort.clients[1:2], clients.TRAINING)
    assert shared.prompts[6:12] == alone.prompts
    of_client, rollout = shared.rollout.rows(slice(6, 12)), alone.rollout
    n = min(of_client.mask.shape[1], rollout.mask.shape[1])
    assert torch.equal(of_client.mask[:, :n], rollout.mask[:, :n])
    assert torch.equal(of_client.responses * of_client.mask, rollout.responses[:, :n] * rollout.mask[:, :n])
    thetas = []
    for responses, index in ((shared, 1), (alone, 0)):
        built = federation()
        batch = built.prepare(built.clients[index : index + 1] * len(responses.rows), responses)[index]
        training = federation().clients[1].trainings[0]
        thetas.append(firm.local_update(training, built.policy, built.theta, batch, FIRM, built.config).theta)
    assert torch.equal(*thetas)


def test_the_server_averages_by_prompts_held():
    trained = federation()
    trained.round()
    held = torch.tensor([4.0, 5.0, 6.0])
    uploads = torch.stack([upload.thetas[0] for upload in trained.record.uploads])
    by_hand = (uploads * (held / held.sum())[:, None]).sum(0)
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
        for method in (FIRM, MGDA, LINEAR, MORLHF, FSMGDA, fedcmoo(e))
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
    assert sum(bool(c.trainings[0].learner.critic.weight.any()) for c in trained.clients) == 1


@contextmanager
def broken_clients(*broken, training=0):
    """Inside, what this local training of these clients ends at is NaN."""
    real = clients.Client.upload

    def upload(client, updates, *args):
        if client.index in broken:
            updates = [replace(u, theta=u.theta * float("nan")) if i == training else u for i, u in enumerate(updates)]
        return real(client, updates, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients.Client, "upload", upload)
        yield


def test_a_broken_update_is_rejected_and_counted():
    trained = federation()
    with broken_clients(0):
        assert trained.round()["rejected_clients"] == 1
    assert torch.isfinite(trained.theta).all()


def test_if_every_update_is_broken_the_round_ends_with_a_remedy():
    with broken_clients(0, 1, 2), pytest.raises(ValueError, match="lower lr"):
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
    [("rounds", -1), ("clients", 0), ("batch_size", 0), ("beta", -0.1), ("lr", float("nan")), ("optimizer", "lion"),
     ("server_lr", 0.0), ("clients_per_round", 0), ("preference", [0.5, -0.5]), ("max_grad_norm", 0.0),
     ("gram", "full"), ("seed", -1)],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        (ClientConfig if field in CLIENT_FIELDS else FIRMConfig)(**{field: value})


# Local trainings


def several(*columns):
    """Firm with these rewards per local training, each counting the same."""
    equal = lambda updates, held, server: torch.full((len(columns),), 1 / len(columns), dtype=torch.float64)  # noqa: E731
    return replace(FIRM, trainings=lambda p: list(columns), server_mixing=equal)


@pytest.mark.parametrize("optimizer", ["adam", "adam-keep"])
def test_every_local_training_of_a_client_goes_as_it_would_alone(optimizer):
    columns = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.3], [0.7]])]
    stays = lambda theta, uploads, server: theta  # noqa: E731 - a server that never moves

    def uploads(*chosen):
        built = federation(method=replace(several(*chosen), aggregate=stays), optimizer=optimizer)
        built.round(), built.round()  # the second with critics, and perhaps moments, that know the first
        return torch.stack([upload.thetas for upload in built.record.uploads])

    both = uploads(*columns)
    assert both.shape[:2] == (3, 2)
    for i, column in enumerate(columns):
        assert torch.equal(both[:, [i]], uploads(column))


def test_a_method_with_a_training_per_objective_uploads_as_many_adapters():
    method = several(*torch.eye(3).split(1, dim=1))
    assert federation(method=method, M=3).round()["upload/payload"] == 3 * federation(M=3).round()["upload/payload"]


def test_a_client_is_rejected_whole_if_one_of_its_trainings_is_broken():
    built = federation(method=several(*torch.eye(2).split(1, dim=1)))
    with broken_clients(0, training=1):
        assert built.round()["rejected_clients"] == 1
    assert torch.isfinite(built.theta).all()


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
            assert metrics[f"{key}/{name}"] == pytest.approx(expected[f"{key}/{name}"], abs=1e-6)
    assert metrics["explained_variance/even"] != pytest.approx(metrics["explained_variance/low"], abs=1e-3)


# Where methods are the same


@pytest.mark.parametrize(
    "method", [m for m in TRAINED if m.aggregate is FIRM.aggregate and m.learner is FIRM.learner], ids=lambda m: m.name
)
def test_with_one_objective_methods_that_differ_in_their_weights_alone_are_the_same(method):
    a, b = federation(M=1), federation(M=1, method=method)
    for _ in range(2):
        a.round(), b.round()
    assert torch.equal(a.theta, b.theta)


@pytest.mark.parametrize("objective", [0, 1])
def test_morlhf_at_a_corner_is_training_on_that_objective_alone(objective):
    corner = federation(method=MORLHF, preference=[1.0 - objective, float(objective)])
    single = federation(M=1)
    single.score = lambda prompts, rollout, holdings: score(prompts, rollout)[:, [objective]]
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
    lossless = fedcmoo(2.0 * M, step=0.3, iterations=3000)
    (a, moved), (b, _) = (one_plain_step(method, 3, M, server_lr=0.7) for method in (lossless, FSMGDA))
    assert (a - b).norm() < 1e-4 * moved
    assert (a - one_plain_step(MGDA, 3, M, server_lr=0.7)[0]).norm() > 1e-2 * moved  # while clients of mgda disagree


# Going on after an interruption


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [(method, "adam-keep") for method in TRAINED] + [(METHODS[name], "adam") for name in ("firm", "fedmoa")],
    ids=lambda part: getattr(part, "name", part),
)
def test_from_a_checkpoint_every_method_goes_on_bit_for_bit_in_state_and_metrics(method, optimizer):
    whole, resumed = (federation(method=method, optimizer=optimizer, clients=2) for _ in range(2))
    whole.round(), whole.round()
    tensors, values = federation_state(whole)
    restore_federation(resumed, safetensors.torch.load(safetensors.torch.save(tensors)), values)
    expected, line = whole.round(), resumed.round()
    assert {name for name in expected if repr(expected[name]) != repr(line[name])} == {"seconds"}
    (after, counts), (again, counts_again) = federation_state(whole), federation_state(resumed)
    assert after.keys() == again.keys() and all(torch.equal(after[name], again[name]) for name in after)
    assert counts == counts_again


# The QP's Gram


def at_gradient_scale(factor, **settings):
    """λ of the first step where every advantage, and so every gradient, is `factor` times as large."""

    class Scaled(PPO):
        def advantages(self, batch):
            made = super().advantages(batch)
            return replace(made, normalised=factor * made.normalised)

    built = federation(method=replace(FIRM, learner=Scaled), ppo={"epochs": 1}, preference=[0.2, 0.8], **settings)
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
    state = federation_state(federation(method=FSMGDA))
    with pytest.raises(ValueError, match="another federation"):
        restore_federation(federation(method=MORLHF), *state)
    with pytest.raises(ValueError, match="another federation"):
        restore_federation(federation(clients=2), *federation_state(federation(clients=3)))


def test_the_figures_of_a_loss_on_several_objectives_are_called_by_all_their_names():
    metrics = federation(method=MORLHF).round()
    assert "advantage_scale/even+low" in metrics and "advantage_scale/even" not in metrics


# What every method keeps to


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_lambda_lies_on_the_simplex(method):
    built = federation(method=method, M=3, clients=2)
    built.round()
    lambdas = [built.record.mixing] + [
        step.lam for updates in built.record.updates for update in updates for step in update.steps
    ]
    assert all(lam.min() >= 0 and abs(float(lam.sum()) - 1) < 1e-12 for lam in lambdas)


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
@pytest.mark.parametrize("settings", [{}, {"gram": "cross", "ppo": {"micro_batch_size": 2}}])
def test_diagnostics_change_not_one_bit_of_what_is_trained(method, settings):
    plain, observed = (federation(method=method, clients=2, diagnostics=on, **settings) for on in (False, True))
    plain.round(), observed.round()
    assert torch.equal(plain.theta, observed.theta) and plain.kl_coef == observed.kl_coef
    assert all(update.halves is None for updates in plain.record.updates for update in updates)


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_gradients_at_theta_t_are_taken_only_for_a_server_that_asks(method):
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(clients.Client, "gradients", lambda client, *_: asked.append(client) or torch.ones(2, 5))
        federation(method=method, ppo={"epochs": 1}).round()
    assert bool(asked) == bool(method.server_weights)


def test_a_methods_own_numbers_are_in_the_upload_and_on_the_bill():
    method = replace(FIRM, numbers=lambda client, raw, S: {"accuracy": 0.25 * client.index})
    plain, counted = federation(), federation(method=method)
    bills = [built.round()["upload/scalars"] for built in (plain, counted)]
    assert bills[1] - bills[0] == 8
    assert [upload.numbers["accuracy"] for upload in counted.record.uploads] == [0.0, 0.25, 0.5]


def test_what_the_server_remembers_reaches_the_next_round_through_a_checkpoint():
    def momentum(theta, uploads, server):
        moved = fedavg.mean_update(theta, uploads, server.weights, server.mixing)
        step = moved + 0.9 * server.state.get("momentum", 0.0)
        server.state["momentum"] = step
        return theta + server.lr * step

    whole, resumed = (federation(method=replace(FIRM, aggregate=momentum)) for _ in range(2))
    whole.round()
    restore_federation(resumed, *federation_state(whole))
    whole.round(), resumed.round()
    assert torch.equal(whole.theta, resumed.theta)
    plain = federation()
    plain.round(), plain.round()
    assert not torch.equal(whole.theta, plain.theta)


# Clients that hold only some of the objectives


def test_a_client_trains_on_the_objectives_that_it_holds_and_on_no_other():
    built = federation(held=[[0], [1], [0, 1]])
    built.round()
    assert [update.batch.scores.shape[1] for (update,) in built.record.updates] == [1, 1, 2]
    for c, j in ((0, 0), (1, 1)):
        alone = federation(M=1)
        alone.score = lambda prompts, rollout, holdings, j=j: score(prompts, rollout)[:, [j]]
        alone.round()
        assert torch.equal(built.record.uploads[c].thetas, alone.record.uploads[c].thetas)
    both = federation()
    both.round()
    assert torch.equal(built.record.uploads[2].thetas, both.record.uploads[2].thetas)


def test_the_preference_among_a_clients_objectives_is_that_of_all_renormalised():
    built = federation(method=LINEAR, M=3, held=[[0, 2], [0, 1, 2], [1]], preference=[1, 2, 4])
    built.round()
    lambdas = [updates[0].steps[0].lam.tolist() for updates in built.record.updates]
    assert lambdas[0] == pytest.approx([0.2, 0.8]) and lambdas[2] == [1.0]
    assert lambdas[1] == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_a_reward_combined_of_some_objectives_is_their_weighted_mean():
    built = federation(method=MORLHF, M=3, held=[[0, 2], [0, 1, 2], [1]], preference=[1, 2, 4])
    columns = [client.trainings[0].columns.flatten().tolist() for client in built.clients]
    assert columns[0] == pytest.approx([0.2, 0.8]) and columns[1] == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_a_client_whose_objectives_all_have_weight_zero_is_refused():
    with pytest.raises(ValueError, match="preference: client 1 "):
        federation(held=[[0], [1], [0, 1]], preference=[1, 0])


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
@pytest.mark.parametrize("held", [[[0], [1], [0, 1]], [[0], [1], [0]]])
def test_unequal_objectives_are_refused_by_the_methods_whose_server_needs_them_all(method, held):
    if method.server_weights or method.server_mixing or method.aggregate is not LINEAR.aggregate:
        with pytest.raises(ValueError, match=f"{method.name}'s server cannot compare"):
            federation(method=method, held=held)
    elif method.needs_primary:
        with pytest.raises(ValueError, match="primary: client 1 does not hold even"):
            federation(method=method, held=held)
    else:
        assert torch.isfinite(torch.tensor(federation(method=method, held=held).round()["lambda/even"]))


def test_diagnostics_of_unequal_objectives_are_refused():
    with pytest.raises(ValueError, match="diagnostics cannot compare"):
        federation(held=[[0], [1], [0, 1]], diagnostics=True)


@pytest.mark.parametrize(
    ("held", "message"),
    [([[-1], [0], [1]], "client 0 holds"), ([[0, 0], [1], [1]], "client 0 holds"), ([[5], [0], [1]], "client 0 holds"),
     ([[], [0], [1]], "client 0 holds"), ([[0], [0], [0]], "no client holds low")],
)  # fmt: skip
def test_lists_of_objectives_that_make_no_sense_are_refused_by_name(held, message):
    with pytest.raises(ValueError, match=message):
        federation(held=held)


def test_one_client_with_a_single_objective_leaves_the_others_their_cosine():
    assert -1.0 <= federation(held=[[0], [0, 1], [0, 1]]).round()["cosine"] <= 1.0


def test_several_trainings_need_a_server_that_mixes_them():
    method = replace(several(*torch.eye(2).split(1, dim=1)), server_mixing=None)
    with pytest.raises(ValueError, match="2 adapters for 1 shares|adapters for 1 shares"):
        federation(method=method).round()


GROUPED = {"method": replace(FIRM, learner=Groups)}


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [({}, {"method": MGDA}), ({"method": fedcmoo(iterations=5)}, {"method": LINEAR}),
     ({"held": [[0], [1], [0, 1]]}, {"held": [[1], [0], [0, 1]]}), ({}, GROUPED), (GROUPED, {})],
)  # fmt: skip
def test_a_checkpoint_of_another_method_learner_or_of_other_holdings_is_refused(saved, resumed):
    with pytest.raises(ValueError, match="another federation"):
        restore_federation(federation(**resumed), *federation_state(federation(**saved)))


def test_a_server_may_remember_the_adapter_that_it_returns():
    def remember(theta, uploads, server):
        server.state["last"] = FIRM.aggregate(theta, uploads, server)
        return server.state["last"]

    built = federation(method=replace(FIRM, aggregate=remember))
    built.round()
    assert "server.last" in safetensors.torch.load(safetensors.torch.save(federation_state(built)[0]))


def test_the_download_bills_the_adapter_and_the_kl_coefficient():
    line = federation().round()
    assert (line["download/payload"], line["download/scalars"]) == (4 * len(federation().theta), 8)
