"""FedMOA: the hypergradient, the weights, the accuracy-aware average, personalisation, and any mix of the parts."""

import contextlib
import copy
import io
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_firm import federation

import clients
import fedmoa
from app import metrics
from app.checkpoint import federation_state, restore_federation
from app.session import held_objectives
from fedavg import Server, Upload
from fedmoa import FEDMOA, FedMOAConfig
from firm import FIRM, LINEAR
from grpo import GRPO, Groups
from ppo import PPO
from run import main
from settings import parse
from worlds import reasoning

# the weights


@pytest.mark.parametrize("seed", range(5))
def test_the_hypergradient_is_the_derivative_of_the_primary_loss_by_the_weights(seed):
    """On quadratics under plain SGD, in float64: −η ⟨∇L_primary(θ′), g_i⟩ against central differences."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    A = draw(3, 7, 7)
    A, centre, theta, lr = A @ A.mT, draw(3, 7), draw(7), 0.01
    gradient = lambda x: torch.einsum("ijk,ik->ij", A, x - centre)  # [3, 7]  # noqa: E731
    taken, primary = gradient(theta), 1

    def primary_loss(w):
        off = theta - lr * w @ taken - centre[primary]
        return float(0.5 * off @ A[primary] @ off)

    w = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)  # any, not on the simplex
    fresh = gradient(theta - lr * w @ taken)[primary]
    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    differences = [(primary_loss(w + e) - primary_loss(w - e)) / 2e-5 for e in steps]
    assert (-lr * fedmoa.hypergradient(fresh, taken)).tolist() == pytest.approx(differences, rel=1e-6)


def test_h_is_a_cosine_less_where_the_gradient_is_shorter_than_the_primarys_and_zero_for_a_gradient_of_zero():
    primary = torch.tensor([2.0, 0.0])
    taken = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [-20.0, 0.0]])
    expected = [0.6, 0.2, 0.0, -1.0]  # the first is the primary's own, of length 5
    assert fedmoa.relative(primary, taken, 0).tolist() == pytest.approx(expected)
    assert fedmoa.relative(1e-12 * primary, 1e9 * taken, 0).tolist() == pytest.approx(expected)
    assert (
        fedmoa.relative(0 * primary, taken, 0).tolist() == fedmoa.relative(primary, 0 * taken, 0).tolist() == [0.0] * 4
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_weights_stay_on_the_simplex_and_what_the_preference_leaves_out_stays_out(seed):
    rng = np.random.default_rng(seed)
    settings = FedMOAConfig(hyper_rate=float(rng.uniform(0, 1e3)), hyper_pull=float(rng.choice([0.0, 0.1, 1.0])))
    prior = torch.from_numpy(rng.dirichlet(np.ones(4)))
    prior[2] = 0.0
    w = prior = prior / prior.sum()
    for _ in range(200):
        w = fedmoa.next_weights(w, prior, torch.from_numpy(rng.uniform(-1, 1, 4)), settings)
        assert (w >= 0).all() and float(w.sum()) == pytest.approx(1.0) and w[2] == 0.0


def test_under_a_steady_cosine_the_weights_end_where_the_docstring_says():
    prior, h = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.3, 0.0, -0.1]).double()
    w = prior
    for _ in range(500):
        w = fedmoa.next_weights(w, prior, h, FedMOAConfig(hyper_rate=0.5, hyper_pull=0.1))
    expected = prior * torch.exp(5 * h)
    assert w.tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_without_a_rate_the_weights_are_the_preference():
    still = replace(FEDMOA, settings=FedMOAConfig(hyper_rate=0.0))
    moving, fixed = federation(method=still), federation(method=replace(FEDMOA, adapt=None))
    for built in (moving, fixed):
        built.round(), built.round()
    assert torch.equal(moving.theta, fixed.theta)


@pytest.fixture
def seen(monkeypatch):
    """All J that local updates took, in order."""
    taken, original = [], clients.ppo.policy_gradients

    def recording(*arguments):
        gradients = original(*arguments)
        taken.append(gradients.J.clone())
        return gradients

    monkeypatch.setattr(clients.ppo, "policy_gradients", recording)
    return taken


def test_a_round_moves_the_weights_by_the_fresh_primary_gradient_and_the_last_step_of_the_round_before(seen):
    built = federation(method=FEDMOA, ppo={"epochs": 2}, primary="low")
    built.round(), built.round()
    C, K = 3, 2
    for c in range(C):
        last, fresh = seen[c * K + 1].double(), seen[C * K + c * K].double()[1]  # low is the second objective
        lengths = last.norm(dim=1)
        h = last @ fresh / (fresh.norm() * torch.maximum(lengths, lengths[1]))
        w = torch.softmax(torch.tensor([0.5, 0.5]).double().log() + 2.0 * h, 0)
        steps = built.record.updates[c][0].steps
        assert steps[0].lam.tolist() == pytest.approx(w.tolist(), rel=1e-6) and steps[1].lam.equal(steps[0].lam)


def test_where_the_primarys_rewards_do_not_vary_the_weights_stay():
    built = federation(method=FEDMOA, ppo={"kl_coef": 0.5})
    original = built.score
    built.score = lambda *arguments: original(*arguments) * torch.tensor([0.0, 1.0]).double()
    for _ in range(3):
        built.round()
    assert all(client.trainings[0].preference.tolist() == [0.5, 0.5] for client in built.clients)


@pytest.mark.parametrize(
    ("scores", "S", "expected"),
    [([1, 1, 0, 0], 2, False), ([1, 1, 0, 1], 2, True), ([1, 1, 0, 0], 1, True), ([1, 1, 1, 1], 1, False)],
)
def test_scores_vary_within_groups_or_where_there_are_none_at_all(scores, S, expected):
    assert fedmoa.varies(torch.tensor(scores), S) == expected


def test_a_saturated_auxiliarys_h_is_nearly_zero(monkeypatch):
    found, original = [], fedmoa.relative
    monkeypatch.setattr(fedmoa, "relative", lambda *arguments: found.append(original(*arguments)) or found[-1])
    built = federation(method=FEDMOA, batch_size=32, lr=3e-2, ppo={"kl_coef": 0.01})
    score = built.score
    built.score = lambda *arguments: score(*arguments) * torch.tensor([1.0, 0.0]).double()
    for _ in range(6):
        built.round()
    h = torch.stack(found).abs()  # [rounds and clients, 2]
    assert 0 < h[:, 1].max() < 0.1 * h[:, 0].max()


def test_the_first_round_has_the_preference_for_weights():
    built = federation(method=FEDMOA, preference=[3, 1])
    built.round()
    assert all(step.lam.tolist() == [0.75, 0.25] for own in built.record.updates for step in own[0].steps)


def test_a_client_that_is_not_sampled_keeps_its_weights_and_gradients():
    built = federation(method=FEDMOA, clients_per_round=1)
    for _ in range(4):
        before = [(c.trainings[0].preference, c.trainings[0].taken) for c in built.clients]
        built.round()
        chosen = built.record.cohort[0].index
        for c, (preference, taken) in enumerate(before):
            training = built.clients[c].trainings[0]
            assert (training.taken is taken) == (c != chosen)
            assert training.preference is preference or c == chosen


def test_the_weights_and_the_gradients_travel_through_a_checkpoint():
    built, other = federation(method=FEDMOA), federation(method=FEDMOA)
    built.round(), built.round()
    restore_federation(other, *federation_state(built))
    for one, two in zip(built.clients, other.clients, strict=True):
        assert torch.equal(one.trainings[0].preference, two.trainings[0].preference)
        assert torch.equal(one.trainings[0].taken, two.trainings[0].taken)
    built.round(), other.round()
    assert torch.equal(built.theta, other.theta)


def test_a_checkpoint_from_before_the_first_round_gives_back_the_preference():
    built, moved = federation(method=FEDMOA), federation(method=FEDMOA)
    moved.round(), moved.round()
    restore_federation(moved, *federation_state(built))
    assert all(c.trainings[0].preference.tolist() == [0.5, 0.5] and c.trainings[0].taken is None for c in moved.clients)


def test_a_checkpoint_holds_no_critic():
    built = federation(method=FEDMOA)
    built.round()
    kept = {name.split(".", 2)[2] for name in federation_state(built)[0] if "client" in name}
    assert kept == {"preference", "taken"}


def test_an_objective_that_a_client_lacks_has_no_row_and_no_weight():
    built = federation(method=FEDMOA, held=[[0, 1, 2], [0, 2], [0]], M=3)
    built.round(), built.round()
    assert [len(client.trainings[0].taken) for client in built.clients] == [3, 2, 1]
    assert [len(own[0].steps[0].lam) for own in built.record.updates] == [3, 2, 1]


def test_the_primary_is_found_among_the_objectives_that_a_client_holds():
    built = federation(method=FEDMOA, held=[[0, 1, 2], [1, 2], [2]], M=3, primary="third")
    assert [client.primary for client in built.clients] == [2, 1, 0]


def test_groups_of_equal_rewards_are_counted_by_objective():
    built = federation(method=FEDMOA)
    line = built.round()
    scores = torch.cat([own[0].batch.scores for own in built.record.updates]).unflatten(0, (-1, 2))  # [groups, 2, M]
    share = (scores[:, 0] == scores[:, 1]).double().mean(0)
    assert [line["zero_spread/even"], line["zero_spread/low"]] == pytest.approx(share.tolist())
    assert not [name for name in federation().round() if name.startswith("zero_spread")]


# the average


def uploads_of(accuracies, held=None, tasks=None, variances=None):
    n = len(accuracies)
    held, tasks, variances = held or [1] * n, tasks or [0] * n, variances or [0.0] * n
    return [
        Upload(torch.zeros(1, 2), h, 0.0, {"task": float(t), "accuracy": a, "accuracy_variance": v})
        for a, h, t, v in zip(accuracies, held, tasks, variances, strict=True)
    ]


def weights_of(*arguments, power=1.0, **settings):
    server = Server(1.0, {}, np.random.default_rng(0), FedMOAConfig(accuracy_power=power))
    return fedmoa.accuracy_weights(uploads_of(*arguments, **settings), server)


def test_within_a_task_a_client_counts_by_its_prompts_times_a_power_of_its_accuracy():
    w = weights_of([0.2, 0.4, 0.8], held=[3, 2, 1], power=2.0)
    expected = torch.tensor([3 * 0.04, 2 * 0.16, 0.64]).double()
    assert (w / w.sum()).tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_tasks_share_the_average_equally():
    w = weights_of([0.2, 0.4, 0.8], tasks=[0, 0, 5])
    assert (w / w.sum()).tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2])


def test_no_power_is_so_high_that_a_right_answer_counts_as_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = weights_of([0.02, 0.03], power=300.0)
    assert (w / w.sum()).tolist() == pytest.approx([0.0, 1.0])


def test_with_a_power_of_zero_and_one_task_the_average_is_fedavg_to_the_last_bit():
    assert weights_of([0.0, 0.3, 0.9], held=[3, 7, 11], power=0.0).tolist() == [3.0, 7.0, 11.0]
    even = replace(FEDMOA, settings=FedMOAConfig(accuracy_power=0.0))
    aware, plain = federation(method=even), federation(method=replace(even, client_weights=FIRM.client_weights))
    for built in (aware, plain):
        built.round(), built.round()
    assert torch.equal(aware.theta, plain.theta)


def test_where_nobody_was_right_clients_count_by_their_prompts_with_a_warning():
    with pytest.warns(UserWarning, match="no client of task 0 was right"):
        w = weights_of([0.0, 0.0, 0.5], held=[1, 3, 4], tasks=[0, 0, 1])
    assert (w / w.sum()).tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 2])


def test_a_spread_that_chance_explains_counts_for_nothing_and_a_sure_one_in_full():
    accuracies = torch.tensor([0.2, 0.3, 0.4]).double()  # of variance 0.01
    for variance, expected in ((0.0, [0.2, 0.3, 0.4]), (0.005, [0.25, 0.3, 0.35]), (0.02, [0.3, 0.3, 0.3])):
        found = fedmoa.shrunk(accuracies, torch.full((3,), variance).double())
        assert found.tolist() == pytest.approx(expected)


def test_shrinking_brings_the_estimates_nearer_to_the_truth():
    rng = np.random.default_rng(0)
    raw = shrunk = 0.0
    for _ in range(300):
        truth = rng.uniform(0.4, 0.6, 8)
        given = rng.binomial(16, truth) / 16
        variances = torch.from_numpy(given * (1 - given) / 15)
        raw += ((given - truth) ** 2).sum()
        shrunk += ((fedmoa.shrunk(torch.from_numpy(given), variances).numpy() - truth) ** 2).sum()
    assert shrunk < 0.7 * raw


def test_one_client_of_a_task_keeps_its_accuracy():
    assert fedmoa.shrunk(torch.tensor([0.25]).double(), torch.tensor([0.1]).double()).tolist() == [0.25]


@pytest.mark.parametrize(
    ("settings", "column"), [({}, 0), ({"primary": "third", "M": 3, "held": [[0, 2], [2], [1, 2]]}, 2)]
)
def test_a_client_sends_its_task_and_its_accuracy_with_the_variance_of_the_means_of_its_groups(settings, column):
    built = federation(method=FEDMOA, **settings)
    built.round()
    for upload, raw in zip(built.record.uploads, built.record.raw, strict=True):
        rewards = raw[:, column].numpy()
        means = rewards.reshape(3, 2).mean(1)
        assert upload.numbers == pytest.approx(
            {"task": 0.0, "accuracy": rewards.mean(), "accuracy_variance": means.var(ddof=1) / 3}
        )


def test_the_accuracy_of_one_prompt_is_not_held_for_certain():
    client = federation(method=FEDMOA).clients[0]
    raw = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()[:, None]
    assert fedmoa.accuracy_numbers(client, raw, 4)["accuracy_variance"] == pytest.approx(0.25 * 0.75)


def test_the_average_and_its_logged_shares_follow_the_uploads():
    built = federation(method=FEDMOA)
    before = built.theta.clone()
    built.round()
    line = metrics.line(built.record, built.names, built.policy.adapter)
    shares = torch.tensor([line[f"share/client{c}"] for c in range(3)]).double()
    moved = torch.stack([upload.thetas[0] - before for upload in built.record.uploads])
    assert float(shares.sum()) == pytest.approx(1.0)
    assert torch.allclose(built.theta - before, (shares[:, None] * moved.double()).sum(0).float(), atol=1e-7)
    assert line["lambda/low/client1"] == pytest.approx(float(built.record.updates[1][0].steps[0].lam[1]))
    assert line["reward/low/client1"] == pytest.approx(float(built.record.raw[1][:, 1].mean()))


def test_the_bill_is_the_adapter_and_the_named_scalars():
    line = federation(method=FEDMOA).round()
    assert line["upload/payload"] == 4 * federation().theta.numel()
    assert line["upload/scalars"] == 8 * 5  # prompts, KL, task, accuracy, its variance


def test_a_client_that_was_never_right_among_others_that_were_counts_for_nothing():
    built = federation(method=FEDMOA)
    original = built.score
    zero = torch.tensor([0.0, 1.0, 1.0]).double().repeat_interleave(6)

    def scored(prompts, rollout, holdings):
        raw = original(prompts, rollout, holdings)
        return torch.stack([zero, raw[:, 1]], 1)

    built.score = scored
    built.round()
    assert built.record.shares[0] < 0.01


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_a_primary_reward_that_is_no_accuracy_is_refused_by_name(value):
    built = federation(method=FEDMOA)
    built.score = lambda prompts, rollout, holdings: torch.full((len(prompts), 2), value).double()
    with pytest.raises(ValueError, match=f"aggregation: .* client 0 got one of {value}; use --aggregation fedavg"):
        built.round()


# personalisation


def test_personalisation_changes_nothing_but_what_it_returns():
    built = federation(method=FEDMOA)
    built.round()
    before = copy.deepcopy(federation_state(built))
    own = fedmoa.personalise(built, built.clients[1], FedMOAConfig(personal_rounds=2))
    after = federation_state(built)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items()) and before[1] == after[1]
    assert torch.equal(built.policy.adapter.vector(), built.theta) and not torch.equal(own, built.theta)


def test_a_personal_round_is_the_clients_part_of_a_federation_of_its_own():
    built, alone = federation(method=LINEAR, clients=1), federation(method=LINEAR, clients=1)
    built.round(), alone.round()
    drawn = alone.respond
    alone.respond = lambda cohort, purpose, size: drawn(cohort, clients.PERSONAL, size, 0)
    alone.round()
    own = fedmoa.personalise(built, built.clients[0], FedMOAConfig(personal_rounds=1))
    assert torch.allclose(own, alone.theta, atol=1e-7)


def test_every_personal_round_draws_afresh(monkeypatch):
    built = federation(method=FEDMOA)
    built.round()
    drawn, respond = [], built.respond
    built.respond = lambda *arguments: drawn.append(respond(*arguments)) or drawn[-1]
    fedmoa.personalise(built, built.clients[0], FedMOAConfig(personal_rounds=2, personal_lr=1e-12))
    assert not torch.equal(*(responses.rollout.responses[:, :1] for responses in drawn))


def test_every_client_ends_at_an_adapter_of_its_own_and_none_without_rounds():
    built = federation(method=FEDMOA)
    built.round()
    own = [fedmoa.personalise(built, client, FedMOAConfig(personal_rounds=1)) for client in built.clients]
    assert not torch.equal(own[0], own[1])
    assert torch.equal(fedmoa.personalise(built, built.clients[0], FedMOAConfig()), built.theta)


def test_a_personal_rate_takes_the_place_of_the_clients():
    built = federation(method=FEDMOA, optimizer="sgd")
    built.round()
    near, far = (
        fedmoa.personalise(built, built.clients[0], FedMOAConfig(personal_rounds=1, personal_lr=lr)) - built.theta
        for lr in (1e-6, 1e-2)
    )
    assert float(near.norm()) < 1e-3 * float(far.norm())


# any mix of the parts


def method_of(*arguments):
    return parse([*arguments, "--objectives", "rule:length", "rule:distinct"])[0].method


@pytest.mark.parametrize(
    ("arguments", "learner", "weights", "adapt", "average"),
    [("--method fedmoa", GRPO, LINEAR, FEDMOA, FEDMOA),
     ("--method firm --advantages group", Groups, FIRM, FIRM, FIRM),
     ("--method firm --aggregation accuracy", PPO, FIRM, FIRM, FEDMOA),
     ("--method fedmoa --aggregation fedavg", GRPO, LINEAR, FEDMOA, FIRM),
     ("--method fedmoa --weights min-norm", GRPO, FIRM, FIRM, FEDMOA),
     ("--method fedmoa --weights fixed --advantages ppo", PPO, LINEAR, FIRM, FEDMOA),
     ("--method linear --weights hypergradient", PPO, LINEAR, FEDMOA, FIRM)],
)  # fmt: skip
def test_parts_are_swapped_by_flags_and_run(arguments, learner, weights, adapt, average):
    method = method_of(*arguments.split())
    assert (method.learner, method.weights, method.adapt) == (learner, weights.weights, adapt.adapt)
    assert method.client_weights is average.client_weights and method.numbers is average.numbers
    built = federation(method=method)
    built.round(), built.round()
    assert torch.isfinite(built.theta).all()


def test_a_part_has_its_settings_whatever_the_method():
    method = method_of("--method", "firm", "--aggregation", "accuracy", "--accuracy_power", "3")
    assert method.settings.accuracy_power == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--method fedcmoo --aggregation accuracy", "aggregation: fedcmoo has a server of its own"),
     ("--method fsmgda --weights fixed", "weights: fsmgda has a server of its own"),
     ("--method morlhf --weights hypergradient", "weights: morlhf has one loss"),
     ("--method fedmoa --primary third", "primary: third is no objective; choose from length, distinct"),
     ("--method fedmoa --group_size 1", "group_size: a group of 1"),
     ("--method fedmoa --client_objectives 0=distinct", "primary: client 0 does not hold length"),
     ("--client_objectives maths=length", "client_objectives: 'maths' is no client's task"),
     ("--client_objectives 0=width", "client_objectives: '0=width'; write WHO=NAME"),
     ("--client_objectives 0=length 0=distinct", "client_objectives: 0 is named twice"),
     ("--severity 0.5", "severity: only the reasoning world"),
     ("--preset fedmoa-tiny --severity 0.5 --split iid", "severity: wrong references would be held out too"),
     ("--compare fedmoa fedcmoo --client_objectives 0=length", "fedcmoo's server cannot compare"),
     ("--client_objectives 0:length", "client_objectives: '0:length'; write WHO=NAME"),
     ("--method fsmgda --personal_rounds 1", "personal_rounds: fsmgda has no local training"),
     ("--split natural", "split: no row has a 'client'")],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_field(arguments, message, tmp_path, capsys):
    objectives = ["--objectives", "rule:length", "rule:distinct"]
    assert main([*arguments.split(), *objectives, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("run.py: error: ")
    assert not (tmp_path / "run").exists()


def test_a_client_goes_by_its_number_else_by_its_task():
    held = held_objectives(["1=a", "code=b,a"], ["a", "b"], ["maths", "code", "code", "2"])
    assert held == [[0, 1], [0], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [("2=a", "2 is named twice, or is a client and a task"), ("3=a,a", "write WHO=NAME"), ("04=a", "no client's task")],
)
def test_whoever_may_be_two_or_none_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        held_objectives([spec], ["a", "b"], ["maths", "code", "code", "2"])


def test_a_federation_without_a_primary_for_all_is_refused():
    with pytest.raises(ValueError, match="primary: client 1 does not hold low"):
        federation(method=FEDMOA, held=[[0, 1], [0], [1]], primary="low")


def test_a_warning_is_given_once_and_no_figure_is_nan_where_accuracy_is_zero():
    built = federation(method=FEDMOA, diagnostics=False)
    built.score = lambda prompts, rollout, holdings: torch.zeros(len(prompts), 2).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = built.round()
    assert len(caught) == 1 and all(np.isfinite(value) for name, value in line.items() if name != "cosine")
    assert built.record.shares.tolist() == pytest.approx([4 / 15, 5 / 15, 6 / 15])


# a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The preset in miniature, on a model that has hardly been trained: the run directory, and what was printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        taught = reasoning.pretrain
        patch.setattr(reasoning, "pretrain", lambda **settings: taught(steps=30, progress=False))
        out = tmp_path_factory.mktemp("runs") / "run"
        small = "--rounds 2 --batch_size 8 --held_out 16 --eval_samples 2 --personal_rounds 1 --severity 0.5"
        assert main(["--preset", "fedmoa-tiny", *small.split(), "--out", str(out)]) == 0
    return out, printed.getvalue()


def test_a_run_leaves_the_picture_of_tasks_and_an_adapter(finished):
    assert {"tasks.png", "weights.png", "adapter", "summary.json"} <= {path.name for path in finished[0].iterdir()}


def test_the_summary_has_every_clients_primary_before_after_and_personal(finished):
    summary = json.loads((finished[0] / "summary.json").read_text("utf-8"))
    assert [client["task"] for client in summary["clients"]] == ["mathematics"] * 4 + ["code"] * 4
    assert all(set(client["primary"]) == {"before", "after", "personal"} for client in summary["clients"])
    assert [client["objectives"] for client in summary["clients"]][3:5] == [
        ["accuracy", "format", "length"], ["accuracy", "format"]
    ]  # fmt: skip
    everybody = np.mean([client["primary"]["after"]["mean"] for client in summary["clients"]])
    assert everybody == pytest.approx(summary["objectives"]["accuracy"]["after"]["mean"])  # four kinds of equal size


def test_the_closing_table_has_a_line_for_every_task_and_client(finished):
    table = finished[1].split("accuracy on held-out prompts of the clients' kinds")[1]
    assert table.index("code  ") < table.index("client 4: code, easy") < table.index("mathematics  ")
    assert table.count("client ") == 8


def test_the_log_has_every_clients_primary_and_share(finished):
    line = json.loads((finished[0] / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert sum(line[f"share/client{c}"] for c in range(8)) == pytest.approx(1.0)
    assert all(0 <= line[f"{kind}/accuracy/client{c}"] <= 1 for kind in ("reward", "lambda") for c in range(8))


def test_every_clients_own_adapter_is_kept(finished):
    saved = [finished[0] / "personal" / f"client{c}" / "adapter_model.safetensors" for c in range(8)]
    assert len({file.read_bytes() for file in saved}) == 8
