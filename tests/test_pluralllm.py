"""The predictor: its architecture, what it cannot see, its loss, its federated training, and its scores."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import pluralllm
from pluralllm import PluralConfig, Predictor, PredictorClient, PredictorFederation, Question, Survey

SETTINGS = PluralConfig(local_steps=2, min_questions=2, max_questions=4, context_questions=3, context_draws=4)
WIDTH = 5


def survey(groups=3, questions=9, seed=0, missing=2):
    """Random questions of 2 to 4 options; every group lacks some of them."""
    rng = np.random.default_rng(seed)
    asked = [Question(f"q{i}", tuple("abcd"[: rng.integers(2, 5)])) for i in range(questions)]
    x = torch.tensor(rng.normal(size=(sum(len(q.options) for q in asked), WIDTH)), dtype=torch.float32)
    answers = {}
    for g in range(groups):
        kept = sorted(rng.permutation(questions)[missing:].tolist())
        answers[f"g{g}"] = {
            q: torch.tensor(rng.dirichlet(np.ones(len(asked[q].options))), dtype=torch.float32) for q in kept
        }
    return Survey(asked, x, answers)


def points(seed=0, context=11, targets=7):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(context, WIDTH, generator=generator), torch.rand(context, generator=generator)
    return x, y, torch.randn(targets, WIDTH, generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Predictor(WIDTH).eval()


def federation(data=None, own=None, rounds=4, **changes):
    data = data or survey()
    return PredictorFederation(data, own or [[g] for g in data.answers], rounds, 1e-2, 7, SETTINGS, **changes)


# ---- the architecture ------------------------------------------------------------------------------------------


def test_it_has_the_public_codes_number_of_parameters():
    assert sum(p.numel() for p in Predictor(4096).parameters()) == 1_188_354


def test_it_is_torchs_encoder_under_the_mask_that_shows_everybody_the_context_only(model):
    x, y, target_x = points()
    layer = nn.TransformerEncoderLayer(128, 4, 128, dropout=0.0, batch_first=True)
    peer, n = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval(), len(x) + len(target_x)
    for theirs, ours in zip(peer.layers, model.layers, strict=True):
        theirs.self_attn.load_state_dict(ours.attention.state_dict())
        theirs.linear1.load_state_dict(ours.feedforward[0].state_dict())
        theirs.linear2.load_state_dict(ours.feedforward[2].state_dict())
        theirs.norm1.load_state_dict(ours.norm1.state_dict())
        theirs.norm2.load_state_dict(ours.norm2.state_dict())
    hidden = torch.ones(n, n, dtype=torch.bool)
    hidden[:, : len(x)] = False  # True may not be attended to
    rows = model.embed(torch.cat([torch.cat([x, y[:, None]], 1), torch.cat([target_x, torch.zeros(7, 1)], 1)]))
    expected = model.head(peer(rows[None], mask=hidden)[0, len(x) :])
    torch.testing.assert_close(torch.stack(model(x, y, target_x), 1), expected, rtol=1e-4, atol=1e-5)


def test_there_is_a_relu_between_the_embedders_and_none_behind_the_last(model):
    kinds = [type(part).__name__ for part in model.embed]
    assert kinds == ["Linear", "ReLU"] * 3 + ["Linear"]


def test_the_order_of_the_context_does_not_matter(model):
    x, y, target_x = points()
    order = torch.randperm(len(x))
    torch.testing.assert_close(model(x[order], y[order], target_x), model(x, y, target_x), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_targets_does_not_matter(model):
    x, y, target_x = points()
    order = torch.randperm(len(target_x))
    expected = tuple(out[order] for out in model(x, y, target_x))
    torch.testing.assert_close(model(x, y, target_x[order]), expected, rtol=1e-4, atol=1e-5)


def test_a_target_is_predicted_alike_whatever_the_other_targets(model):
    x, y, target_x = points()
    alone = model(x, y, target_x[:1])[0]
    torch.testing.assert_close(model(x, y, target_x)[0][:1], alone, rtol=1e-4, atol=1e-5)


def test_the_context_matters(model):
    x, y, target_x = points()
    assert (model(x, y + 1, target_x)[0] - model(x, y, target_x)[0]).abs().max() > 1e-4


def test_a_targets_answer_reaches_no_prediction(model):
    data, other = survey(), survey()
    q = data.questions_of("g0")[0]
    other.answers["g0"][q] = other.answers["g0"][q].flip(0)
    found = []
    for each in (data, other):
        x, y, _ = each.points("g0", each.questions_of("g0")[1:4])
        target_x, _, which = each.points("g0", [q])
        found.append(model.shares(x, y, target_x, which))
    assert torch.equal(*found)


# ---- loss and scores -------------------------------------------------------------------------------------------


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
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 2)
    p[0], q[3] = 0.0, 0.0
    p, q = p / p.sum(), q / q.sum()
    both = torch.tensor(np.concatenate([p, q])), torch.tensor(np.concatenate([q, q]))
    found = pluralllm.distances(*both, torch.tensor([0] * 4 + [1] * 4))
    assert found.tolist() == pytest.approx([scipy.jensenshannon(p, q), 0.0], abs=1e-7)


def test_opposite_answers_are_the_root_of_log_two_apart():
    found = pluralllm.distances(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    assert float(found) == pytest.approx(math.sqrt(math.log(2)))


def test_jains_index_is_one_over_one_plus_the_squared_variation():
    v = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    assert pluralllm.jain(v) == pytest.approx(1 / (1 + float(v.var(correction=0) / v.mean() ** 2)))


def test_fairness_leaves_out_questions_with_fewer_than_three_groups():
    nan = math.nan
    scores = torch.tensor([[0.5, 0.9, nan], [0.7, 0.1, 0.2], [0.9, nan, 0.9]], dtype=torch.float64)
    assert pluralllm.fairness(scores) == pytest.approx(pluralllm.jain(scores[:, 0]))
    assert math.isnan(pluralllm.fairness(scores[:2]))


def test_convergence_is_where_the_mean_of_three_scores_reaches_the_level():
    assert pluralllm.convergence([0.1, 0.9, 0.2, 0.8, 0.8, 0.8], 0.6) == 3
    assert pluralllm.convergence([0.9, 0.9], 0.5) is None  # no three of them yet
    assert pluralllm.convergence([0.1] * 9, 0.5) is None


def test_alignment_is_a_mean_over_the_draws_in_which_a_question_was_a_target(model):
    data = survey()
    scores = pluralllm.alignment(data, model, ["g1"], SETTINGS, seed=3)
    own, found = data.questions_of("g1"), {}
    for number in range(4):
        rng = pluralllm.stream(3, pluralllm.PREDICTOR_EVALUATION, number, 1)
        context = [own[j] for j in rng.permutation(len(own))[:3]]
        x, y, _ = data.points("g1", context)
        for q in set(own) - set(context):
            target_x, target_y, which = data.points("g1", [q])
            shares = model.shares(x, y, target_x, which)
            found.setdefault(q, []).append(1 - float(pluralllm.distances(shares, target_y, which)))
    for q in range(len(data.questions)):
        expected = np.mean(found[q]) if q in found else math.nan
        assert float(scores[0, q]) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_partners_context_is_of_shared_questions_as_the_partner_answered_them(model):
    data = survey(missing=3)
    partners = {"g0": "g1"}
    own = pluralllm.alignment(data, model, ["g0"], SETTINGS, 0, partners)
    swapped = pluralllm.alignment(data, model, ["g0"], SETTINGS, 0, partners, swapped=True)
    assert torch.equal(own.isnan(), swapped.isnan())  # the same targets
    data.answers["g1"] = {q: data.answers["g0"].get(q, y) for q, y in data.answers["g1"].items()}
    same = pluralllm.alignment(data, model, ["g0"], SETTINGS, 0, partners, swapped=True)
    torch.testing.assert_close(same, own, equal_nan=True)
    assert not torch.allclose(swapped.nan_to_num(), own.nan_to_num(), atol=1e-6)


def test_guesses_are_the_mean_of_other_groups_or_every_option_alike():
    data = survey()
    q = next(q for q in data.questions_of("g0") if q in data.answers["g1"] and q in data.answers["g2"])
    y, which = data.answers["g0"][q], torch.zeros(len(data.answers["g0"][q]), dtype=torch.long)
    mean = (data.answers["g1"][q] + data.answers["g2"][q]) / 2
    found = pluralllm.guessed(data, ["g0"], ["g0", "g1", "g2"])  # its own answer is no guess
    assert float(found[0, q]) == pytest.approx(1 - float(pluralllm.distances(mean, y, which)))
    found = pluralllm.guessed(data, ["g0"])
    uniform = torch.full_like(y, 1 / len(y))
    assert float(found[0, q]) == pytest.approx(1 - float(pluralllm.distances(uniform, y, which)))
    assert found[0].isnan().sum() == 2  # what it was not asked


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 7, 42])
def test_a_draw_leaves_enough_of_either_and_nothing_twice(n):
    settings, sizes = PluralConfig(min_questions=2, max_questions=10), []
    for seed in range(200):
        context, targets = pluralllm.draw(list(range(n)), settings, np.random.default_rng(seed))
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


def test_one_client_with_all_groups_and_one_step_a_round_is_plain_centralised_training(in_float64):
    data, groups = survey(), ["g0", "g1", "g2"]
    data.embeddings = data.embeddings.double()
    data.answers = {g: {q: y.double() for q, y in own.items()} for g, own in data.answers.items()}
    settings = PluralConfig(**vars(SETTINGS) | {"local_steps": 1})
    trained = PredictorFederation(data, [groups], 6, 1e-2, 7, settings)
    torch.manual_seed(7)
    model = Predictor(WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    n = {g: sum(map(len, data.answers[g].values())) for g in groups}
    for step in range(6):
        trained.round()
        optimizer.zero_grad()
        for i, g in enumerate(groups):
            context, targets = pluralllm.draw(
                data.questions_of(g), settings, pluralllm.stream(7, pluralllm.PREDICTOR_TRAINING, step, i)
            )
            x, y, _ = data.points(g, context)
            target_x, target_y, which = data.points(g, targets)
            own = pluralllm.loss(*model(x, y, target_x), target_y, which)
            (own * n[g] / sum(n.values())).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(trained.theta, parameters_to_vector(model.parameters()).detach(), rtol=1e-6, atol=1e-8)


def test_a_round_averages_what_clients_reach_alone_by_their_points():
    data = survey()
    together, start = federation(data), federation(data).theta
    together.round()
    alone = torch.stack([_after_a_round(federation(data), c, start) for c in range(3)]).double()
    n = torch.tensor([data.points_held(g) for g in data.answers], dtype=torch.float64)
    torch.testing.assert_close(together.theta.double(), (n / n.sum()) @ alone, rtol=1e-5, atol=1e-6)


def _after_a_round(federation, c, theta):
    client = federation.clients[c]
    client.theta.copy_(theta)
    for step in range(2):
        client.step(step, pluralllm.cosine(1e-2, step, 8), SETTINGS, 7)
    return client.theta


def test_clients_train_on_memory_of_their_own():
    trained = federation()
    trained.round()
    theta = trained.theta.clone()
    trained.clients[0].step(2, 1e-2, SETTINGS, 7)
    assert torch.equal(trained.theta, theta)
    assert torch.equal(parameters_to_vector(trained.model.parameters()), theta)


def test_clients_on_two_threads_end_where_they_do_on_one():
    one, two = federation(), federation(threads=2)
    for _ in range(2):
        assert one.round() == two.round()
    assert torch.equal(one.theta, two.theta)


def test_a_model_computes_with_the_vector_that_its_parameters_are_views_of(model):
    before, theta = model(*points())[0], pluralllm.flat(model)
    assert torch.equal(model(*points())[0], before)
    theta.zero_()
    assert model(*points())[0].abs().max() == 0


def test_clients_keep_their_adams_moments_from_round_to_round():
    trained = federation()
    trained.round()
    trained.round()
    steps = [float(entry["step"]) for client in trained.clients for entry in client.optimizer.state.values()]
    assert set(steps) == {4.0}


def test_the_decay_ends_at_zero_after_all_steps():
    assert pluralllm.cosine(0.3, 0, 10) == 0.3
    assert pluralllm.cosine(0.3, 5, 10) == pytest.approx(0.15)
    assert pluralllm.cosine(0.3, 10, 10) == pytest.approx(0.0)


def test_a_client_whose_update_is_not_finite_is_left_out():
    trained, without = federation(), federation(own=[["g0"], ["g2"]])

    def diverge(*_):
        trained.clients[1].model.head[2].bias.data.fill_(torch.nan)
        return 0.0

    trained.clients[1].step = diverge
    assert trained.round()["broken"] == 1
    without.round()
    torch.testing.assert_close(trained.theta, without.theta)


def test_sampled_clients_alone_take_part():
    trained = federation(clients_per_round=1)
    trained.round()
    assert sum(bool(client.optimizer.state) for client in trained.clients) == 1


def test_an_upload_is_the_parameters_and_one_number():
    figures = federation().round()
    d = sum(p.numel() for p in Predictor(WIDTH).parameters())
    assert figures["upload/payload"] == 4 * d
    assert figures["upload/scalars"] == 8


def test_going_on_from_a_state_is_going_on_bit_for_bit():
    whole, half = federation(), federation()
    for _ in range(4):
        whole.round()
    half.round()
    half.round()
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    other = federation()
    other.restore(state, 2)
    lines = [other.round(), other.round()]
    assert torch.equal(other.theta, whole.theta)
    assert lines[-1]["round"] == 3


def test_a_checkpoint_with_moments_of_another_kind_is_refused():
    trained = federation()
    with pytest.raises(ValueError, match="the checkpoint is of another predictor"):
        trained.restore(trained.state() | {"client0.3.exp_avg": torch.zeros(1)}, 1)
    assert trained.rounds_done == 0


def test_training_learns_to_read_the_context():
    """Two kinds of groups that answer oppositely: only the context tells which one a new group is of."""
    rng = np.random.default_rng(0)
    words = rng.normal(size=(4, WIDTH))
    chosen = [rng.choice(4, 3, replace=False) for _ in range(40)]
    taste = np.array([2.0, -2, 2, -2])
    asked = [Question(str(i), tuple("abc")) for i in range(40)]
    x = torch.tensor(np.concatenate([words[c] for c in chosen]), dtype=torch.float32)
    answers = {
        f"g{g}": {q: torch.tensor((1 - 2 * (g % 2)) * taste[c], dtype=torch.float32).softmax(0)
                  for q, c in enumerate(chosen)} for g in range(6)
    }  # fmt: skip
    data = Survey(asked, x, answers)
    settings = PluralConfig(min_questions=5, max_questions=10, context_questions=8, context_draws=2, local_steps=4)
    trained = PredictorFederation(data, [["g0", "g1"], ["g2", "g3"]], 30, 6e-4, 0, settings)
    for _ in range(30):
        trained.round()
    unseen = ["g4", "g5"]
    uniform = pluralllm.by_group(pluralllm.guessed(data, unseen)).mean()
    found = pluralllm.by_group(pluralllm.alignment(data, trained.model, unseen, settings, 0)).mean()
    assert found > uniform + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"min_questions": 4}, "min_questions: g0 has 7 questions and needs 8"),
     ({"min_questions": 2, "context_questions": 7}, "context_questions: g0 has 7 questions and needs 8")],
)  # fmt: skip
def test_a_group_with_too_few_questions_is_refused(changes, message):
    settings = PluralConfig(**vars(SETTINGS) | changes)
    with pytest.raises(ValueError, match=message):
        pluralllm.check_contexts(survey().answers, ["g0"], settings)


def test_least_questions_above_the_most_are_refused():
    with pytest.raises(ValueError, match="max_questions: 3 must be at least min_questions, 4"):
        PluralConfig(min_questions=4, max_questions=3)


def test_a_clipped_step_is_adams_on_the_clipped_gradient():
    data = survey()
    clipped, plain = (federation(data, own=[list(data.answers)], max_grad_norm=norm) for norm in (1e-3, None))
    assert clipped.round()["loss"] != pytest.approx(plain.round()["loss"], abs=1e-9)
    client = PredictorClient(list(data.answers), data, WIDTH, "cpu")
    seen = []
    client.optimizer.register_step_pre_hook(lambda *_: seen.append(client.theta.grad.norm().item()))
    client.step(0, 1e-2, SETTINGS, 7, max_grad_norm=1e-3)
    client.step(1, 1e-2, SETTINGS, 7)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3) and seen[1] > 1e-2
