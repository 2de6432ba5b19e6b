"""The other methods, against hand calculations and plain NumPy with whole matrices in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_firm import assert_same_state, federation, score

import baselines
import mgda
from app import metrics
from baselines import ADAPTIVE, FEDCMOO, FSMGDA, MAXIMUM, MINIMUM, MORLHF
from fedavg import Upload, n_bytes
from firm import FIRM, LINEAR, MGDA
from rewards import Calibration
from settings import Config


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# All methods


def test_what_a_client_of_every_method_sends_and_receives_in_bytes():
    M, adapter, bills = 3, 4 * len(federation().theta), {}
    for method in (FIRM, LINEAR, MORLHF, FSMGDA, FEDCMOO, ADAPTIVE):
        bill = metrics.bill(federation(method=method, M=M, clients=2, batch_size=2, epochs=1).round())
        bills[method.name] = bill["upload_bytes"], bill["download_bytes"]
    compressed = n_bytes(baselines.compress(torch.zeros(M, adapter // 4), 1.0, np.random.default_rng(0)))
    assert compressed == pytest.approx(adapter, rel=0.02)  # e = 1
    up, down = adapter + 16, adapter + 8  # numbers: prompts and KL; κ
    assert bills["firm"] == bills["linear"] == bills["morlhf"] == (up, down)
    assert bills["fsmgda"] == (up + (M - 1) * adapter, down)
    assert bills["fedcmoo"] == (up + compressed + 8 * M * (M + 1), down + compressed + 8 + 8 * M)  # its weight, λ
    assert bills["adaptive"] == (up + 8 * M, down + 8 * M)


@pytest.mark.parametrize("method", [FSMGDA, FEDCMOO, ADAPTIVE], ids=lambda method: method.name)
def test_the_order_in_which_a_clients_objectives_are_named_does_not_matter(method):
    named, plain = federation(method=method, held=[[1, 0], [0, 1], [1, 0]]), federation(method=method)
    for built in (named, plain):
        built.round(), built.round()
    assert_same_state(named, plain)


# MORLHF, soups


def test_morlhf_at_a_corner_is_training_on_that_objective_alone():
    corner, single = federation(method=MORLHF, preference=[0, 1]), federation(M=1)
    single.score = lambda prompts, rollout, client: score(prompts, rollout)[:, [1]]
    for built in (corner, single):
        built.round(), built.round()
    assert torch.equal(corner.theta, single.theta)


def test_a_soup_is_the_weighted_sum_of_the_specialists_and_at_a_corner_that_specialist_bit_for_bit():
    specialists = torch.tensor([[1.0, 0.0], [3.0, 8.0]])
    assert baselines.interpolate(specialists, [3, 1]).tolist() == [1.5, 2.0]
    specialists = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(baselines.interpolate(specialists, [0, 1, 0]), specialists[1])


# FSMGDA


def test_fsmgda_moves_along_the_min_norm_point_of_the_averaged_updates():
    theta = torch.tensor([1.0, 1.0])
    updates = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.5]]])  # [C, M, d]
    uploads = [Upload({"theta": theta + update}, {"prompts": n}) for update, n in zip(updates, (1, 2), strict=True)]
    moved, _, training_shares = FSMGDA.server(Config(server_lr=0.5)).step(theta, uploads)
    # averaged updates (2, 0) and (0, 1): λ₁ = 1 / (1 + 2²)
    assert training_shares.tolist() == pytest.approx([0.2, 0.8])
    assert moved.tolist() == pytest.approx([1.2, 1.4])


def lossless(monkeypatch, M, step=0.3, steps=5000):
    """From here on FedCMOO does not compress M gradients, and takes these steps to its λ."""
    for name, value in {"COMPRESSION": 2.0 * M, "STEP": step, "STEPS": steps}.items():
        monkeypatch.setattr(baselines, name, value)


@pytest.mark.parametrize("M", [2, 3])
def test_with_one_plain_step_fsmgda_is_fedcmoo_without_compression(M, monkeypatch):
    # Both weigh the mean gradients of the federation by min-norm, one from uploads, the other from gradients.
    def two_rounds(method):
        built = federation(method=method, M=M, optimizer="sgd", lr=0.1, epochs=1, server_lr=0.7)
        start = built.theta
        built.round(), built.round()
        return built.theta - start

    lossless(monkeypatch, M)
    fedcmoo, fsmgda, mgda_s = map(two_rounds, (FEDCMOO, FSMGDA, MGDA))
    assert (fedcmoo - fsmgda).norm() < 1e-4 * fedcmoo.norm()
    assert (fedcmoo - mgda_s).norm() > 1e-2 * fedcmoo.norm()  # while clients of mgda disagree


# FedCMOO: compression


@pytest.mark.parametrize("M, d", [(2, 200), (3, 101), (5, 7), (1, 1)])
def test_without_loss_the_factors_give_back_the_gradients(M, d):
    A = gaussian(M, d)
    factors = baselines.compress(A, 2.0 * M, np.random.default_rng(0))
    assert (baselines.expand(factors, M, d) - A).abs().max() < 1e-12


def test_the_randomised_svd_is_nearly_as_good_as_any_of_its_rank_and_leaves_out_what_is_orthogonal():
    X = gaussian(94, 90)  # a flat spectrum, the hardest
    factors = baselines.factorise(X, 20, np.random.default_rng(0))
    rest = X - factors["left"] @ factors["right"]
    best = np.sqrt((np.linalg.svd(X.numpy(), compute_uv=False)[20:] ** 2).sum())
    assert factors["left"].shape == (94, 20) and factors["right"].shape == (20, 90)
    assert best <= float(rest.norm()) < 1.05 * best
    assert (rest @ factors["right"].T).abs().max() < 1e-12


# FedCMOO: the estimate


def combined(G, low_rank, T):
    """The estimate from any low-rank parts: the formula asks nothing of them."""
    known, rest = zip(*(baselines.gram_terms(*pair, T) for pair in zip(G, low_rank, strict=True)), strict=True)
    return baselines.mean_gram(torch.stack(known), torch.stack(rest), float(low_rank.square().sum()))


@pytest.mark.parametrize("ratio, extra", [(1.49, True), (1.51, False)])
def test_the_estimate_is_the_papers_formula_on_both_sides_of_the_threshold(ratio, extra):
    low_rank, R, T = gaussian(4, 3, 30), gaussian(4, 3, 30, seed=1), gaussian(3, 30, seed=2)
    R = R * low_rank.norm() / R.norm() / ratio
    c, r, t = low_rank.transpose(1, 2).numpy(), R.transpose(1, 2).numpy(), T.T.numpy()
    gram = np.zeros((3, 3))  # with one column per objective, as in the paper
    for i in range(4):
        a, bracket, middle = c[i] + r[i], r[i].T @ (t - c[i]), c[i].T @ (t - c[i])
        gram += a.T @ a + (middle + middle.T) / 2 + bracket + bracket.T
        gram += 3 * r[i].T @ r[i] if extra else 0.0
    assert np.abs(combined(low_rank + R, low_rank, T).numpy() - gram / 16).max() < 1e-12 * np.abs(gram).max()


def test_the_whole_estimate_is_the_formula_with_truncated_svds():
    # Nine directions that all clients share stand far above the rest: there the randomised SVD finds what any SVD does.
    M, d, rank = 2, 722, 9  # folded to 38 × 38
    shared = np.linalg.qr(gaussian(38, rank, seed=9).numpy())[0].T
    a = [gaussian(38, rank, seed=c).numpy() @ shared + 0.01 * gaussian(38, 38, seed=10 + c).numpy() for c in range(4)]

    def truncated(X):
        U, s, V = np.linalg.svd(X.reshape(38, 38))
        return ((U[:, :rank] * s[:rank]) @ V[:rank]).reshape(M, d)

    a = [X.reshape(M, d) for X in a]
    low_rank = [truncated(X) for X in a]
    T, gram = truncated(sum(low_rank)), 0.0
    for X, c in zip(a, low_rank, strict=True):
        bracket = (X - c) @ (T - c).T
        gram = gram + X @ X.T + c @ (T - c).T + bracket + bracket.T
    estimated, _ = baselines.estimate_gram(torch.from_numpy(np.stack(a)), 1.0, np.random.default_rng(0))
    assert np.linalg.norm(32 * estimated.numpy() - gram - gram.T) < 1e-8 * np.linalg.norm(gram + gram.T)


# FedCMOO: the weights


def server_lambda(monkeypatch, J, prompts=(1, 1, 1, 1), server=None):
    """What a server sends if these are the clients' gradients [N, M, d] and numbers of prompts."""
    monkeypatch.setattr(baselines, "gradients_at_start", lambda *_: dict(enumerate(J)))
    clients = [SimpleNamespace(prompts=range(n)) for n in prompts]
    server = server or FEDCMOO.server(Config())
    return server.broadcast(SimpleNamespace(clients=clients, rounds_done=0), [], {})["lambda"]


@pytest.mark.parametrize(("M", "prompts"), [(2, (1, 1, 1, 1)), (4, (1, 1, 1, 1)), (2, (1, 2, 3, 10))])
def test_in_the_long_run_the_weights_are_min_norm_for_the_mean_by_prompts(M, prompts, monkeypatch):
    lossless(monkeypatch, M, step=0.1)
    J, held = gaussian(4, M, 40) + 0.3, torch.tensor(prompts).double()
    mean = torch.einsum("c,cmd->md", held / held.sum(), J)
    assert (server_lambda(monkeypatch, J, prompts) - mgda.solve(mgda.normalise(mean @ mean.T))).abs().max() < 1e-6


def test_the_weights_go_on_from_the_last_round_and_gradients_of_zero_leave_them(monkeypatch):
    J, server = gaussian(4, 2, 40), FEDCMOO.server(Config())
    lossless(monkeypatch, 2, step=0.001, steps=100)
    server_lambda(monkeypatch, J, server=server)
    twice = server_lambda(monkeypatch, J, server=server)
    assert torch.allclose(server_lambda(monkeypatch, 0 * J, server=server), twice, atol=1e-12)
    lossless(monkeypatch, 2, step=0.001, steps=200)
    assert torch.allclose(twice, server_lambda(monkeypatch, J), atol=1e-12)
    assert server_lambda(monkeypatch, 0 * J).tolist() == [0.5, 0.5]


def test_the_codes_constants_go_two_thirds_of_the_way_for_orthogonal_gradients():
    moved = baselines.descend(torch.tensor([0.9, 0.1]).double(), 1e4 * torch.eye(2).double())
    assert float(moved[0]) == pytest.approx(0.5 + 0.4 * math.exp(-1), abs=1e-3)


def test_a_gram_is_scaled_by_its_mean_norm_a_negative_diagonal_counting_as_zero(monkeypatch):
    lossless(monkeypatch, 2, step=0.04, steps=1)
    moved = baselines.descend(torch.full((2,), 0.5).double(), torch.tensor([[9.0, 1.0], [1.0, 1.0]]).double())
    # Mean norm (3 + 1)/2 = 2, so Ĝλ = (5, 1)/4; on the simplex half the difference counts.
    assert float(moved[0]) == pytest.approx(0.5 - 0.04 * 0.5, abs=1e-5)
    lam = baselines.descend(torch.full((2,), 0.5).double(), torch.diag(torch.tensor([-1.0, 1.0])).double())
    assert torch.isfinite(lam).all() and float(lam.sum()) == pytest.approx(1.0)


def test_the_server_sees_the_gradients_of_the_first_steps_and_all_clients_use_its_lambda(monkeypatch):
    seen, original = [], baselines.gradients_at_start
    monkeypatch.setattr(baselines, "gradients_at_start", lambda *a: seen.append(original(*a)) or seen[-1])
    built = federation(method=FEDCMOO)
    built.round()  # so that θ_t is not θ_0, and the critics know something
    record = built.round()
    for c, part in record.arrived.items():
        steps = part.updates[0].steps
        assert torch.allclose(mgda.gram(seen[1][c]), steps[0].gram, rtol=1e-5)
        assert all(torch.equal(step.lam, record.message["lambda"]) for step in steps)
    assert float(record.message["lambda"][0]) != 0.5


def test_a_client_without_finite_gradients_has_no_say_in_lambda():
    built, without = federation(method=FEDCMOO), federation(method=FEDCMOO)
    plain = built.score
    built.score = lambda *arguments: plain(*arguments) + (math.inf if arguments[2].index == 0 else 1.0)
    without.score = lambda *arguments: plain(*arguments) + 1.0
    without.cohort = lambda: (without.clients[1:], 0)
    assert list(built.round().faults) == [0]
    without.round()
    assert_same_state(built, without)


# One reward of several


@pytest.mark.parametrize(("method", "extreme"), [(MINIMUM, "amin"), (MAXIMUM, "amax")])
def test_the_least_or_the_greatest_raw_reward_of_a_response_is_its_one_on_one_scale(method, extreme):
    built = federation(method=method, M=3)
    built.calibration = Calibration(torch.tensor([0.0, 5.0, 1.0]), torch.tensor([1.0, 7.0, 5.0]), torch.zeros(3).bool())
    for part in built.round().arrived.values():
        expected = (getattr(part.raw, extreme)(1) - 2.0) / 5.0  # the mean of the means, √(75 / 3)
        assert torch.allclose(part.updates[0].batch.scores[:, 0].double(), expected, atol=1e-6)


def test_alpha_is_the_softmax_of_how_badly_an_objective_was_served_in_the_running_mean():
    server, h = ADAPTIVE.server(Config()), None
    for rewards in ([[0.2, 0.9], [0.6, 0.1]], [[0.8, 0.0], [0.4, 0.2]]):
        uploads = [Upload({"theta": torch.zeros(1, 3)}, {"prompts": n, "reward0": a, "reward1": b})
                   for n, (a, b) in zip((1.0, 3.0), rewards, strict=True)]  # fmt: skip
        server.step(torch.zeros(3), uploads)
        now = np.array([0.25, 0.75]) @ np.array(rewards)  # by prompts
        h = now if h is None else 0.7 * h + 0.3 * now
        weights = np.exp(-h / 0.1)
        alpha = server.broadcast(SimpleNamespace(names="ab"), [], {})["alpha"]
        assert alpha.tolist() == pytest.approx(weights / weights.sum())


def test_the_adaptive_reward_is_the_sum_by_alpha_which_is_uniform_at_first():
    built = federation(method=ADAPTIVE)
    assert built.round().message["alpha"].tolist() == [0.5, 0.5]
    record = built.round()
    alpha = record.message["alpha"]
    assert abs(float(alpha[0]) - 0.5) > 1e-3
    for part in record.arrived.values():
        assert torch.allclose(part.updates[0].batch.scores[:, 0].double(), (part.raw - 0.5) / 0.2 @ alpha, atol=1e-5)
