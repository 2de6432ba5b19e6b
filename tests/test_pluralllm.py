"""The predictor: its architecture, its loss, its federated training, and its scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import pluralllm
from clients import Purpose
from pluralllm import Predictor, PredictorFederation, Question, Survey
from settings import Config

WIDTH = 5
CONFIG = Config(rounds=4, lr=1e-2, seed=7, local_steps=2, questions=[2, 4])


def survey(groups=3, questions=9, seed=0, missing=2):
    """Random questions of 2 to 4 options; every group lacks some of them."""
    rng = np.random.default_rng(seed)
    asked = [Question(f"q{i}", tuple("abcd"[: rng.integers(2, 5)])) for i in range(questions)]
    x = torch.tensor(rng.normal(size=(sum(len(q.options) for q in asked), WIDTH)), dtype=torch.float32)
    answers = {}
    for g in range(groups):
        chosen = sorted(rng.permutation(questions)[missing:].tolist())
        shares = {q: rng.dirichlet(np.ones(len(asked[q].options))) for q in chosen}
        answers[f"g{g}"] = {q: torch.tensor(y, dtype=torch.float32) for q, y in shares.items()}
    return Survey(asked, x, answers)


def points(seed=0, context=11, targets=7):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(context, WIDTH, generator=generator), torch.rand(context, generator=generator)
    return x, y, torch.randn(targets, WIDTH, generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Predictor(WIDTH).eval()


def federation(data=None, clients=None, **changes):
    data = data or survey()
    return PredictorFederation(data, clients or [[g] for g in data.answers], replace(CONFIG, **changes))


# ---- the architecture ------------------------------------------------------------------------------------------


def test_it_has_the_public_codes_number_of_parameters():
    assert sum(p.numel() for p in Predictor(4096).parameters()) == 1_188_354


def test_it_is_torchs_encoder_under_the_mask_that_shows_only_the_context(model):
    x, y, target_x = points()
    layer = nn.TransformerEncoderLayer(128, 4, 128, dropout=0.0, batch_first=True)
    peer, n = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval(), len(x) + len(target_x)
    names = {"self_attn": "attention", "linear1": "feedforward.0", "linear2": "feedforward.2"}
    for theirs, ours in zip(peer.layers, model.layers, strict=True):
        for name in ("self_attn", "linear1", "linear2", "norm1", "norm2"):
            theirs.get_submodule(name).load_state_dict(ours.get_submodule(names.get(name, name)).state_dict())
    hidden = torch.ones(n, n, dtype=torch.bool)
    hidden[:, : len(x)] = False  # True may not be attended to
    rows = torch.cat([torch.cat([x, y[:, None]], 1), torch.cat([target_x, torch.zeros(7, 1)], 1)])
    for i, part in enumerate(part for part in model.embed if isinstance(part, nn.Linear)):
        rows = part(rows.relu() if i else rows)  # a ReLU between the four, none behind the last
    expected = model.head(peer(rows[None], mask=hidden)[0, len(x) :])
    torch.testing.assert_close(torch.stack(model(x, y, target_x), 1), expected, rtol=1e-4, atol=1e-5)


def test_the_softmax_runs_within_each_question():
    m, which = torch.randn(7, dtype=torch.float64) * 200, torch.tensor([0, 0, 1, 1, 1, 2, 2])
    expected = torch.cat([m[which == i].softmax(0) for i in range(3)])
    torch.testing.assert_close(pluralllm.softmax_within(m, which), expected)


def test_the_loss_is_the_gaussians_of_the_softmaxed_means():
    m, s, y = torch.randn(3, 6, dtype=torch.float64)
    which = torch.tensor([0, 0, 0, 1, 1, 1])
    means = torch.cat([m[:3].softmax(0), m[3:].softmax(0)])
    expected = -torch.distributions.Normal(means, s.exp()).log_prob(y).mean()
    torch.testing.assert_close(pluralllm.loss(m, s, y, which), expected)


def test_distances_are_scipys():
    scipy = pytest.importorskip("scipy.spatial.distance")
    p, q = np.array([0.0, 0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1, 0.0])
    both = torch.tensor(np.concatenate([p, q])), torch.tensor(np.concatenate([q, q]))
    distances = pluralllm.distances(*both, torch.tensor([0] * 4 + [1] * 4))
    assert distances.tolist() == pytest.approx([scipy.jensenshannon(p, q), 0.0], abs=1e-7)


def test_jains_index_is_one_over_one_plus_the_squared_variation():
    v = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    assert pluralllm.jain(v) == pytest.approx(1 / (1 + float(v.var(correction=0) / v.mean() ** 2)))


def test_fairness_leaves_out_questions_with_fewer_than_three_groups():
    nan = math.nan
    scores = torch.tensor([[0.5, 0.9, nan], [0.7, 0.1, 0.2], [0.9, nan, 0.9]], dtype=torch.float64)
    assert pluralllm.fairness(scores) == pytest.approx(pluralllm.jain(scores[:, 0]))
    assert math.isnan(pluralllm.fairness(scores[:2]))


def test_convergence_is_when_the_mean_of_three_scores_reaches_the_level():
    assert pluralllm.convergence([0.1, 0.9, 0.2, 0.8, 0.8, 0.8], 0.6) == 3
    assert pluralllm.convergence([0.9, 0.9], 0.5) is None  # no three of them yet
    assert pluralllm.convergence([0.1] * 9, 0.5) is None


def test_alignment_is_a_mean_over_the_draws_in_which_a_question_was_a_target(model):
    data = survey()
    scores = pluralllm.alignment(data, model, ["g1"], seed=3, size=3, draws=4)
    asked, expected = list(data.answers["g1"]), {}
    for number in range(4):
        rng = pluralllm.stream(3, Purpose.PREDICTOR_EVALUATION, number, 1)
        context = [asked[j] for j in rng.permutation(len(asked))[:3]]
        x, y, _ = data.points("g1", context)
        for q in set(asked) - set(context):
            target_x, target_y, which = data.points("g1", [q])
            shares = model(x, y, target_x)[0].detach().softmax(0)
            expected.setdefault(q, []).append(1 - float(pluralllm.distances(shares, target_y, which)))
    for q in range(len(data.questions)):
        mean = np.mean(expected[q]) if q in expected else math.nan
        assert float(scores[0, q]) == pytest.approx(mean, abs=1e-6, nan_ok=True)


def test_a_swapped_context_has_the_same_questions_as_the_partner_answered_them(model):
    data, partners = survey(missing=3), {"g0": "g1"}
    score = lambda swapped: pluralllm.alignment(data, model, ["g0"], 0, 3, 4, partners, swapped)  # noqa: E731
    plain, swapped = score(False), score(True)
    assert torch.equal(plain.isnan(), swapped.isnan())  # the same targets
    assert not torch.allclose(swapped.nan_to_num(), plain.nan_to_num(), atol=1e-6)
    data.answers["g1"] = {q: data.answers["g0"].get(q, y) for q, y in data.answers["g1"].items()}
    torch.testing.assert_close(score(True), plain, equal_nan=True)


def test_guesses_are_the_mean_of_other_groups_or_every_option_alike():
    data = survey()
    q = next(q for q in data.answers["g0"] if q in data.answers["g1"] and q in data.answers["g2"])
    y, which = data.answers["g0"][q], torch.zeros(len(data.answers["g0"][q]), dtype=torch.long)
    mean = (data.answers["g1"][q] + data.answers["g2"][q]) / 2
    scores = pluralllm.guessed(data, ["g0"], ["g0", "g1", "g2"])  # its own answer is no guess
    assert float(scores[0, q]) == pytest.approx(1 - float(pluralllm.distances(mean, y, which)))
    uniform = pluralllm.guessed(data, ["g0"])
    assert float(uniform[0, q]) == pytest.approx(1 - float(pluralllm.distances(torch.ones_like(y) / len(y), y, which)))
    assert uniform[0].isnan().sum() == 2  # what it was not asked


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 7, 42])
def test_a_draw_leaves_enough_for_both_and_nothing_twice(n):
    sizes = []
    for seed in range(200):
        context, targets = pluralllm.draw(list(range(n)), 2, 10, np.random.default_rng(seed))
        assert len(set(context) | set(targets)) == len(context) + len(targets) <= n
        sizes.append((len(context), len(targets)))
    contexts, targets = zip(*sizes, strict=True)
    assert min(contexts) == min(targets) == 2
    assert max(contexts) == min(10, n - 2) == max(targets)


@pytest.fixture
def in_float64():
    """Adam makes steps of full length from gradients that are mere rounding: in float32 no two orders agree."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_one_client_with_all_groups_is_plain_centralised_training(in_float64, max_grad_norm):
    data, groups = survey(), ["g0", "g1", "g2"]
    data.embeddings = data.embeddings.double()
    data.answers = {g: {q: y.double() for q, y in asked.items()} for g, asked in data.answers.items()}
    trained = federation(data, [groups], rounds=3, max_grad_norm=max_grad_norm)
    torch.manual_seed(7)
    model = Predictor(WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    n = {g: sum(map(len, data.answers[g].values())) for g in groups}
    for step in range(6):
        optimizer.zero_grad()
        for i, g in enumerate(groups):
            rng = pluralllm.stream(7, Purpose.PREDICTOR_TRAINING, step, i)
            context, targets = pluralllm.draw(list(data.answers[g]), 2, 4, rng)
            x, y, _ = data.points(g, context)
            target_x, target_y, which = data.points(g, targets)
            part = pluralllm.loss(*model(x, y, target_x), target_y, which)
            (part * n[g] / sum(n.values())).backward()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
    for _ in range(3):
        trained.round()
    torch.testing.assert_close(trained.theta, parameters_to_vector(model.parameters()).detach(), rtol=1e-6, atol=1e-8)


def test_a_round_averages_what_each_client_reaches_alone_by_its_points():
    trained = federation()
    alone = [federation(clients=[[group]]) for group in trained.survey.answers]
    for each in (trained, *alone):
        each.round()
    n = torch.tensor([float(sum(map(len, asked.values()))) for asked in trained.survey.answers.values()])
    expected = (n / n.sum()) @ torch.stack([each.theta for each in alone])
    torch.testing.assert_close(trained.theta, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameters_to_vector(trained.model.parameters()), trained.theta)


def test_clients_keep_their_moments_and_only_sampled_clients_take_part():
    trained = federation(clients_per_round=2)
    trained.round()
    trained.round()
    steps = [float(adam.state[trained.parameters[0]].get("step", 0)) for adam in trained.adams]
    assert sorted(steps) in ([0, 4, 4], [2, 2, 4])  # two local steps a round


def test_a_predictor_that_is_not_finite_ends_the_run():
    with pytest.raises(ValueError, match="lr: client 0's predictor is not finite after round 0"):
        federation(lr=1e30).round()


def test_a_message_is_the_parameters():
    trained = federation()
    figures = trained.round()
    assert figures["upload_bytes"] == figures["download_bytes"] == 4 * len(trained.theta)


def test_training_learns_to_read_the_context():
    """Two kinds of groups that answer oppositely: only the context tells which one a new group is of."""
    rng = np.random.default_rng(0)
    words, taste = rng.normal(size=(4, WIDTH)), np.array([2.0, -2, 2, -2])
    chosen = [rng.choice(4, 3, replace=False) for _ in range(40)]
    x = torch.tensor(np.concatenate([words[c] for c in chosen]), dtype=torch.float32)
    answers = {
        f"g{g}": {q: torch.tensor((1 - 2 * (g % 2)) * taste[c], dtype=torch.float32).softmax(0)
                  for q, c in enumerate(chosen)} for g in range(6)
    }  # fmt: skip
    data = Survey([Question(str(i), tuple("abc")) for i in range(40)], x, answers)
    clients = [["g0", "g1"], ["g2", "g3"]]
    trained = federation(data, clients, rounds=30, lr=6e-4, seed=0, local_steps=4, questions=[5, 10])
    for _ in range(30):
        trained.round()
    worth = pluralllm.context_worth(data, trained.model, ["g4", "g5"], seed=0, size=8)
    assert worth["own"] > pluralllm.guessed(data, ["g4", "g5"]).nanmean() + 0.1 > worth["other"] + 0.1
