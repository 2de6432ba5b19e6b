"""How the parts are wired: a client's update and a server's round, recomputed plainly with settings that tell apart."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_firm import NAMES, broken_clients, fedcmoo, federation, score, several
from test_ppo import krylov_fit

import clients
import firm
import mgda
import ppo
from baselines import FEDCMOO, FSMGDA, MORLHF
from clients import ClientConfig
from firm import FIRM, LINEAR, FIRMConfig, TrainingConfig
from ppo import PPOConfig

# No two settings are alike, and none is a value at which it would not show.
PPO = PPOConfig(
    epochs=2, clip_range=0.1, gae_lambda=0.6, critic_steps=3, kl_coef=0.7, kl_target=0.5,
    kl_horizon=100, missing_eos_penalty=0.4,
)  # fmt: skip
CLIENT = ClientConfig(lr=0.05, optimizer="sgd", max_grad_norm=0.02)
FIRM_CONFIG = FIRMConfig(beta=0.3, preference=[0.3, 0.7], clients=3, batch_size=6)
CONFIG = TrainingConfig(FIRM_CONFIG, CLIENT, PPO)
KL_COEF = 0.9  # not the initial one


@pytest.fixture
def world():
    """A federation whose adapter is away from zero, one client whose critic knows something, and its batch."""
    torch.manual_seed(0)
    built = federation()
    built.theta = built.theta + 0.2 * torch.randn(built.theta.shape)
    built.policy.adapter.assign(built.theta)
    client = built.clients[1]
    training = client.trainings[0]
    training.learner = ppo.PPO(built.policy.hidden_size, PPO, "cpu", 2)
    training.preference = torch.tensor([0.3, 0.7], dtype=torch.float64)
    training.learner.critic.weight.normal_(std=0.1)
    rollout = built.respond([client], clients.TRAINING).rollout
    scores = (score(None, rollout).float() - 0.5) / 0.2
    return built, training, ppo.prepare(built.policy, rollout, scores, KL_COEF, PPO), scores


def token_logprobs(model, prompt, response):
    """log π of every response token, from the model's own logits, one row at a time."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


def rows_of(rollout):
    """Prompt and response token lists, without padding."""
    for i in range(len(rollout)):
        prompt = rollout.prompts[i][rollout.prompt_mask[i] == 1].tolist()
        yield prompt, rollout.responses[i][rollout.mask[i] == 1].tolist()


def plain_update(built, training, rollout, scores):
    """One client's update after the formulas of ppo.py and firm.py, row by row and token by token."""
    adapter, model = built.policy.adapter, built.policy.model
    adapter.assign(built.theta)
    known = training.learner.critic.weight.clone()
    rows = list(rows_of(rollout))
    old, ref, adv, ret, seen = [], [], [], [], []
    with torch.no_grad():
        for (prompt, response), s in zip(rows, scores, strict=True):
            logp = token_logprobs(model, prompt, response)
            with adapter.disabled():
                base = token_logprobs(model, prompt, response)
            hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            state = hidden[len(prompt) - 1 : -1]  # what is known before each response token
            reward = (-KL_COEF * (logp - base))[:, None].repeat(1, 2)
            reward[-1] += s - (0.0 if response[-1] == 2 else PPO.missing_eos_penalty)
            value = state @ known[:-1] + known[-1]
            after = torch.cat([value[1:], torch.zeros(1, 2)])
            delta = reward + after - value
            advantage = torch.stack([
                sum(PPO.gae_lambda ** (u - t) * delta[u] for u in range(t, len(response)))
                for t in range(len(response))
            ])  # fmt: skip
            returns = torch.stack([reward[t:].sum(0) for t in range(len(response))])
            results = (logp, base, advantage, returns, state)
            for store, item in zip((old, ref, adv, ret, seen), results, strict=True):
                store.append(item)
    every = torch.cat(adv)
    whitened = [(a - every.mean(0)) / every.std(0, correction=0).clamp_min(0.1) for a in adv]
    n = len(every)
    lambdas = []
    for _ in range(PPO.epochs):
        losses = torch.zeros(2)
        for (prompt, response), o, a in zip(rows, old, whitened, strict=True):
            logp = token_logprobs(model, prompt, response)
            ratio = (logp - o).exp()[:, None]
            clipped = ratio.clamp(1 - PPO.clip_range, 1 + PPO.clip_range)
            losses = losses - torch.minimum(ratio * a, clipped * a).sum(0) / n
        J = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.parameters, retain_graph=True)])
            for loss in losses
        ])  # fmt: skip
        G = (J @ J.T).double()
        lam = mgda.solve(G / G.trace(), FIRM_CONFIG.beta, FIRM_CONFIG.preference)
        lambdas.append(lam)
        gradient = lam.float() @ J
        assert gradient.norm() > CLIENT.max_grad_norm  # the clip must show
        adapter.assign(adapter.vector() - CLIENT.lr * gradient * CLIENT.max_grad_norm / gradient.norm())
    critic = krylov_fit(torch.cat(seen), torch.cat(ret), known, PPO.critic_steps)  # on the states at θ_t
    kl = torch.stack([(o - b).sum() for o, b in zip(old, ref, strict=True)])
    return adapter.vector(), torch.stack(lambdas), kl, critic


def test_a_local_update_is_the_formulas_row_by_row(world):
    built, training, batch, scores = world
    theta, lambdas, kl, critic = plain_update(built, training, batch.rollout, scores)
    update = firm.local_update(training, built.policy, built.theta, batch, FIRM, CONFIG)
    moved = (theta - built.theta).norm()
    assert (update.theta - theta).norm() < 1e-3 * moved
    assert (torch.stack([step.lam for step in update.steps]) - lambdas).abs().max() < 1e-4
    assert (ppo.sequence_kl(batch) - kl).abs().max() < 1e-4
    assert (training.learner.critic.weight - critic).abs().max() < 1e-3 * critic.abs().max()


def test_the_update_uses_theta_t_not_what_the_last_client_left(world):
    built, training, batch, _ = world
    first = firm.local_update(training, built.policy, built.theta, batch, FIRM, CONFIG).theta
    assert not torch.equal(built.policy.adapter.vector(), built.theta)
    again = firm.local_update(training, built.policy, built.theta, batch, FIRM, CONFIG).theta
    # Another critic, so another update; but from the same start: far nearer to it than two updates in a row would be.
    for theta in (first, again):
        assert (theta - built.theta).norm() < 1.01 * PPO.epochs * CLIENT.lr * CLIENT.max_grad_norm


def test_clients_train_on_calibrated_scores_of_their_own_rows():
    built = federation()
    built.round()
    for (update,) in built.record.updates:
        batch = update.batch
        assert (batch.scores - (score(None, batch.rollout).float() - 0.5) / 0.2).abs().max() < 1e-6


def test_sampled_clients_are_weighed_by_their_own_prompts():
    built = federation(clients=5, clients_per_round=2)
    built.round()
    indices = [client.index for client in built.record.cohort]
    held = torch.tensor([len(built.clients[i].prompts) for i in indices], dtype=torch.float32)
    assert indices != [0, 1] and held[0] != held[1]
    uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
    assert (built.theta - (held / held.sum()) @ uploads).abs().max() < 1e-6


def test_a_rejected_clients_weight_goes_with_it():
    built = federation()
    with broken_clients(0):
        built.round()
    uploads = torch.stack([upload.thetas[0] for upload in built.record.uploads])
    assert (built.theta - (torch.tensor([5.0, 6.0]) / 11) @ uploads).abs().max() < 1e-6


def test_the_kl_coefficient_adapts_after_the_round_and_serves_the_next():
    built = federation(ppo={"kl_coef": 0.5, "kl_target": 1.0, "kl_horizon": 100})
    assert built.round()["kl"] == 0.0  # the base policy, so κ falls by the clipped error −0.2 · 18 / 100
    assert {update.batch.kl_coef for (update,) in built.record.updates} == {0.5}
    built.round()
    assert {update.batch.kl_coef for (update,) in built.record.updates} == {0.5 * (1 - 0.2 * 0.18)}


def test_the_kl_coefficient_adapts_to_the_clients_that_were_accepted_and_to_their_responses():
    def last_two(kl_target):
        built = federation(ppo={"kl_coef": 0.5, "kl_target": kl_target, "kl_horizon": 100})
        built.round()
        before = built.kl_coef
        with broken_clients(0):
            line = built.round()
        return built, before, line

    _, _, line = last_two(1.0)
    built, before, line = last_two(1.1 * line["kl"])  # so that the error is not clipped
    kl = np.mean([upload.kl for upload in built.record.uploads])
    expected, wrong = (ppo.adapt_kl(before, kl, samples, built.config.ppo) for samples in (12, 18))
    assert built.kl_coef == pytest.approx(expected, rel=1e-12) and abs(expected - wrong) > 1e-4
    assert line["kl"] == pytest.approx(kl) and line["kl_coef"] == before  # what is logged


def test_every_round_samples_its_clients_anew():
    built = federation(clients=5, clients_per_round=2)
    cohorts = []
    for _ in range(4):
        built.round()
        cohorts.append(tuple(client.index for client in built.record.cohort))
    assert len(set(cohorts)) > 1


def server_calls(method, part, **settings):
    """Two rounds of a method: what this part of its server was called with, and the federation."""
    calls, real = [], getattr(method, part)
    watched = lambda vectors, held, server: calls.append((held, server.rng)) or real(vectors, held, server)  # noqa: E731
    built = federation(method=replace(method, **{part: watched}), **settings)
    with broken_clients(*([0] if part == "server_mixing" else [])):
        built.round()
        held = [client.prompts_held for client in built.record.cohort]
        built.round()
    return calls, held, built


def test_a_server_that_picks_lambda_from_gradients_weighs_the_clients_it_sampled():
    calls, held, built = server_calls(FEDCMOO, "server_weights", clients=5, clients_per_round=2)
    assert calls[0][0].tolist() == held and held != [c.prompts_held for c in built.clients[:2]]


def test_a_server_draws_anew_in_every_round():
    draws = []
    for _, rng in server_calls(FEDCMOO, "server_weights")[0]:
        draws.append(rng.random())
    assert len(set(draws)) == 2


def test_a_server_that_mixes_updates_weighs_the_clients_it_accepted():
    calls, held, _ = server_calls(FSMGDA, "server_mixing")
    assert calls[0][0].tolist() == held == [5, 6]


def test_every_round_and_client_draws_anew():
    built = federation()
    batches = []
    for t in (0, 1):
        built.rounds_done = t
        batches += [built.respond([client], purpose).prompts for client in built.clients
                    for purpose in (clients.TRAINING, clients.CALIBRATION)]  # fmt: skip
    uniforms = [clients.stream(0, purpose, t, c).random() for purpose in (2, 3, 4) for t in range(3) for c in range(3)]
    assert len(set(uniforms)) == 27
    assert len({tuple(id(p) for p in batch) for batch in batches}) == len(batches)


def test_streams_with_trailing_zeros_are_streams_of_their_own():
    assert len({clients.stream(0, *keys).random() for keys in ((2,), (2, 0), (2, 0, 0))}) == 3


def test_the_optimizers_rate_is_the_configured_one():
    for optimizer in ("sgd", "adam"):
        slow, fast = (
            federation(optimizer=optimizer, lr=lr, max_grad_norm=1e-6, ppo={"epochs": 1}) for lr in (1e-3, 2e-3)
        )
        start = slow.theta.clone()
        slow.round(), fast.round()
        assert (fast.theta - start).norm() == pytest.approx(2 * float((slow.theta - start).norm()), rel=1e-2)


def test_the_critic_never_sees_the_token_it_judges():
    built = federation()
    rollout = built.respond(built.clients[:1], clients.TRAINING).rollout
    hidden = built.policy.logprobs(rollout)[2]
    changed = rollout.responses.clone()
    t = 2
    changed[:, t:] = (changed[:, t:] + 5) % 46 + 3
    rollout.responses = changed
    again = built.policy.logprobs(rollout)[2]
    assert (hidden[:, : t + 1] - again[:, : t + 1]).abs().max() < 1e-6
    assert np.all((hidden[:, t + 1 :] - again[:, t + 1 :]).abs().amax(-1)[rollout.mask[:, t + 1 :] == 1].numpy() > 1e-6)


# What a round logs, recomputed from the gradients and uploads that pass by


@contextmanager
def recorded(module, name):
    """Inside, every call of a module's function leaves its result in the list."""
    results, real = [], getattr(module, name)

    def through(*args, **kwargs):
        results.append(real(*args, **kwargs))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, through)
        yield results


def gradients_seen(built):
    """One round: its metrics, and the halves [C, K, 2 or 1, M, d] of every client's every step, in float64."""
    with recorded(ppo, "policy_gradients") as results:
        metrics = built.round()
    steps = [found.halves.double() if found.first_half is not None else found.J.double()[None] for found in results]
    K = built.config.ppo.epochs
    return metrics, [steps[c * K : (c + 1) * K] for c in range(len(steps) // K)]


def best_on_a_grid(G, beta=0.0, p=0.5):
    """λ [2] by trying: G is scaled to trace 1, and ‖λ − (p, 1 − p)‖² = 2 (λ₁ − p)²."""
    (a, b), (_, c) = (G / G.trace().clamp_min(1e-300)).tolist()  # all cut away: 0, and p wins
    x = np.linspace(0, 1, 200_001)
    first = x[np.argmin(a * x**2 + 2 * b * x * (1 - x) + c * (1 - x) ** 2 + beta * (x - p) ** 2)]
    return torch.tensor([first, 1 - first])


@pytest.mark.parametrize("rejected", [None, 0])
def test_drift_is_that_of_the_accepted_clients_gradients_in_their_first_step(rejected):
    built = federation(beta=0.02)
    with broken_clients(rejected):
        metrics, seen = gradients_seen(built)
    kept = slice(0 if rejected is None else 1, None)
    w = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)[kept]
    w, seen = w / w.sum(), seen[kept]
    assert torch.allclose(built.grams["weights"], w)
    J = [steps[0].sum(0) for steps in seen]
    lambdas = torch.stack([mgda.solve(mgda.normalise(j @ j.T), 0.02) for j in J])
    mean = w @ lambdas
    lost, step = (sum(w[c] * v[c] @ J[c] for c in range(len(J))) for v in (lambdas - mean, lambdas))
    assert metrics["drift"] == pytest.approx(float(lost.norm() / step.norm()), rel=1e-6)
    assert metrics["drift"] > 0.01


@pytest.mark.parametrize("rejected", [None, 0])
def test_stationarity_is_that_of_the_accepted_clients_mean_gradient_in_the_first_step(rejected):
    built = federation()
    with broken_clients(rejected):
        metrics, seen = gradients_seen(built)
    w = torch.tensor([4.0 * (rejected != 0), 5.0, 6.0], dtype=torch.float64)
    a, b = sum(share * steps[0] for share, steps in zip(w / w.sum(), seen, strict=True))  # [M, d] each
    estimate = 4 * np.mean([float((lam @ a) @ (lam @ b)) for lam in map(best_on_a_grid, (a @ a.T, b @ b.T))])
    assert metrics["stationarity"] == pytest.approx(estimate, rel=1e-3)


def test_the_kept_grams_are_the_inner_products_of_every_step_and_of_the_halves_at_theta_t():
    built = federation(clients=2, ppo={"epochs": 2})
    _, seen = gradients_seen(built)
    for c, steps in enumerate(seen):
        for k, halves in enumerate(steps):
            J = halves.sum(0)
            assert torch.allclose(built.grams["steps"][c, 0, k], J @ J.T, rtol=1e-5)
    for c, h, i in np.ndindex(2, 2, 2):
        for b, n, j in np.ndindex(2, 2, 2):
            product = seen[c][0][h, i] @ seen[b][0][n, j]
            assert float(built.grams["start"][c, h, i, b, n, j]) == pytest.approx(float(product), rel=1e-6, abs=1e-12)


def resolved(built, beta, p=None):
    """λ [C, K, M] of the last round, solved again under this β from what it kept."""
    return torch.stack([
        torch.stack([mgda.solve(mgda.normalise(G), beta, p) for G in steps]) for steps in built.grams["steps"][:, 0]
    ])  # fmt: skip


def mean_and_disagreement(lambdas):
    distances = (lambdas - lambdas.mean(0, keepdim=True)).norm(dim=-1)  # [C, K] from the step's mean over clients
    return [*lambdas.mean((0, 1)).tolist(), float(distances.mean())]


def logged(metrics):
    return [metrics["lambda/even"], metrics["lambda/low"], metrics["lambda/disagreement"]]


def test_lambda_and_disagreement_can_be_solved_again_from_the_kept_grams():
    built = federation(beta=0.05, preference=[0.3, 0.7])
    metrics = built.round()
    assert logged(metrics) == pytest.approx(mean_and_disagreement(resolved(built, 0.05, [0.3, 0.7])), abs=1e-12)


def test_the_kept_grams_tell_the_first_lambda_of_a_run_under_another_beta():
    kept, other = federation(beta=0.01, ppo={"epochs": 1}), federation(beta=3.0, ppo={"epochs": 1})
    kept.round()
    assert logged(other.round()) == pytest.approx(mean_and_disagreement(resolved(kept, 3.0)), abs=1e-12)


def test_on_the_same_grams_a_larger_beta_gives_less_disagreement():
    built = federation()
    built.round()
    small, middle, large = (mean_and_disagreement(resolved(built, beta))[-1] for beta in (0.0, 1.0, 100.0))
    assert small > middle > large > 0.0


@pytest.mark.parametrize(("method", "rejected"), [(FIRM, None), (FIRM, 1), (FSMGDA, None)])
def test_dispersion_and_averaging_residual_are_those_of_the_accepted_clients_mixed_adapters(method, rejected):
    built = federation(method=method, server_lr=0.5)
    with broken_clients(rejected):
        metrics = built.round()
    kept = [c for c in range(3) if c != rejected]
    w = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)[kept]
    w = w / w.sum()
    uploads = torch.stack([upload.thetas for upload in built.record.uploads]).double()
    mixing = [1.0] if method is FIRM else [metrics["lambda/even"], metrics["lambda/low"]]
    thetas = sum(share * run for share, run in zip(mixing, uploads.unbind(1), strict=True))  # [C, d]
    assert metrics["adapter/dispersion"] == pytest.approx(float((thetas - thetas.mean(0)).norm(dim=1).mean()), rel=1e-5)

    parts = [built.policy.adapter.split(theta) for theta in thetas]
    lost = norm = 0.0
    for i in range(0, len(parts[0]), 2):
        A, B = (torch.stack([part[i + k] for part in parts]) for k in (0, 1))
        A_mean, B_mean, mean = (torch.einsum("c,cij->ij", w, X) for X in (A, B, B @ A))
        lost += float((mean - B_mean @ A_mean).square().sum())
        norm += float(mean.square().sum())
    scale = built.policy.adapter.config.scale
    assert scale == 2.0
    assert metrics["adapter/averaging_residual"] == pytest.approx(scale * lost**0.5, rel=1e-4)
    assert metrics["adapter/norm"] == pytest.approx(scale * norm**0.5, rel=1e-4)


# Methods whose server decides


def test_fsmgda_logs_the_lambda_that_its_server_used():
    used = []

    def watched(*args):
        used.append(FSMGDA.server_mixing(*args))
        return used[-1]

    metrics = federation(method=replace(FSMGDA, server_mixing=watched), M=3).round()
    assert [metrics[f"lambda/{name}"] for name in NAMES[:3]] == pytest.approx(used[0].tolist(), abs=1e-12)
    assert len(set(used[0].tolist())) == 3


def test_two_local_trainings_on_two_objectives_are_logged_as_the_server_mixed_them():
    mixing = torch.tensor([0.25, 0.75], dtype=torch.float64)
    method = replace(
        several(torch.eye(4)[:, :2], torch.eye(4)[:, 2:]), server_mixing=lambda updates, held, server: mixing
    )
    built = federation(method=method, M=4, beta=0.02, ppo={"epochs": 1})
    with recorded(ppo, "policy_gradients") as taken:
        metrics = built.round()
    lambdas = torch.stack([
        torch.cat([m * update.steps[0].lam for m, update in zip(mixing, updates, strict=True)])
        for updates in built.record.updates
    ])  # fmt: skip
    assert [metrics[f"lambda/{name}"] for name in NAMES] == pytest.approx(lambdas.mean(0).tolist(), abs=1e-12)

    J = torch.stack([torch.cat([taken[i + r].J for r in (0, 1)]) for i in (0, 2, 4)]).double()  # [C, 4, d]
    w = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64) / 15
    lost, step = (torch.einsum("c,cm,cmd->d", w, v, J).norm() for v in (lambdas - w @ lambdas, lambdas))
    assert metrics["drift"] == pytest.approx(float(lost / step), rel=1e-6)


@pytest.mark.parametrize("method", [LINEAR, MORLHF], ids=lambda method: method.name)
def test_fixed_weights_are_logged_as_the_preference_and_do_not_drift(method):
    metrics = federation(method=method, preference=[0.3, 0.7]).round()
    assert logged(metrics) == pytest.approx([0.3, 0.7, 0.0], abs=1e-12)
    assert metrics["drift"] == pytest.approx(0.0, abs=1e-12)


def test_one_lambda_for_all_clients_and_steps_does_not_drift():
    built = federation(method=fedcmoo(4.0, step=0.1, iterations=3000))
    metrics = built.round()
    used = torch.stack([step.lam for (update,) in built.record.updates for step in update.steps])  # [C·K, M]
    assert len(used) == 9 and torch.equal(used, used[:1].expand(9, 2)) and 0.0 < float(used[0, 0]) < 1.0
    assert logged(metrics) == pytest.approx([*used[0].tolist(), 0.0], abs=1e-12)
    assert metrics["drift"] == pytest.approx(0.0, abs=1e-12)


def test_the_server_is_shown_the_gradients_of_every_clients_first_step():
    shown = []

    def watched(J, *args):
        shown.append(J)
        return FEDCMOO.server_weights(J, *args)

    built = federation(method=replace(FEDCMOO, server_weights=watched))
    built.round()  # so that θ_t is not θ_0, and the critics know something
    built.round()
    first_steps = torch.stack([update.halves.sum(0) for (update,) in built.record.updates])
    assert (shown[1] - first_steps).abs().max() < 1e-5 * first_steps.abs().max()


def test_on_cross_grams_lambda_comes_from_products_of_halves_in_every_step():
    metrics, seen = gradients_seen(federation(gram="cross", beta=0.3, preference=[0.3, 0.7]))
    lambdas, cut = torch.zeros(3, 3, 2, dtype=torch.float64), 0
    for c, steps in enumerate(seen):
        for k, (a, b) in enumerate(steps):
            values, vectors = torch.linalg.eigh(2 * (a @ b.T + b @ a.T))
            lambdas[c, k] = best_on_a_grid((vectors * values.clamp_min(0)) @ vectors.T, beta=0.3, p=0.3)
            cut += bool(values.min() < 0)
    assert logged(metrics) == pytest.approx(mean_and_disagreement(lambdas), abs=1e-5)
    assert cut > 0
