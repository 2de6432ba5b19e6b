"""How the parts are wired: a client's update and a server's round, recomputed plainly with settings that tell apart."""

import numpy as np
import pytest
import torch
from test_firm import federation, score

import firm
import mgda
from firm import FIRM, FIRMConfig
from ppo import PPOConfig

# No two settings are alike, and none is a value at which it would not show.
PPO = PPOConfig(
    epochs=2, clip_range=0.1, value_clip=0.3, gamma=0.9, gae_lambda=0.6, critic_lr=0.05, kl_coef=0.7, kl_target=0.5,
    kl_horizon=100, entropy_coef=0.05, missing_eos_penalty=0.4,
)  # fmt: skip
CONFIG = FIRMConfig(
    lr=0.05, optimizer="sgd", beta=0.3, preference=[0.3, 0.7], max_grad_norm=0.02, clients=3, batch_size=6
)
KL_COEF = 0.9  # not the initial one


@pytest.fixture
def world():
    """A federation whose adapter is away from zero, one client whose critic knows something, and its batch."""
    torch.manual_seed(0)
    built = federation()
    built.theta = built.theta + 0.2 * torch.randn(built.theta.shape)
    built.policy.adapter.assign(built.theta)
    client = built.clients[1]
    torch.nn.init.normal_(client.critic.weight, std=0.1)
    _, rollout = built.rollout([client], 0, firm.TRAINING)
    return built, client, rollout, (score(None, rollout).float() - 0.5) / 0.2


def token_logprobs(model, prompt, response):
    """log π of every response token, from the model's own logits, one row at a time; and the entropy there."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    picked = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
    return picked, -(logp.exp() * logp).sum(-1)


def rows_of(rollout):
    """Prompt and response token lists, without padding."""
    for i in range(len(rollout)):
        prompt = rollout.prompts[i][rollout.prompt_mask[i] == 1].tolist()
        yield prompt, rollout.responses[i][rollout.mask[i] == 1].tolist()


def plain_update(built, client, rollout, scores):
    """One client's update after the formulas of ppo.py and firm.py, row by row and token by token."""
    adapter, model = built.policy.adapter, built.policy.model
    adapter.assign(built.theta)
    weight, bias = client.critic.weight.detach().clone(), client.critic.bias.detach().clone()
    rows = list(rows_of(rollout))
    old, ref, adv, ret, val = [], [], [], [], []
    with torch.no_grad():
        for (prompt, response), s in zip(rows, scores, strict=True):
            logp = token_logprobs(model, prompt, response)[0]
            with adapter.disabled():
                base = token_logprobs(model, prompt, response)[0]
            hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            state = hidden[len(prompt) - 1 : -1]  # what is known before each response token
            reward = (-KL_COEF * (logp - base))[:, None].repeat(1, 2)
            reward[-1] += s - (0.0 if response[-1] == 2 else PPO.missing_eos_penalty)
            value = state @ weight.T + bias
            after = torch.cat([value[1:], torch.zeros(1, 2)])
            delta = reward + PPO.gamma * after - value
            advantage = torch.stack([
                sum((PPO.gamma * PPO.gae_lambda) ** (u - t) * delta[u] for u in range(t, len(response)))
                for t in range(len(response))
            ])  # fmt: skip
            results = (logp, base, advantage, advantage + value, value)
            for store, item in zip((old, ref, adv, ret, val), results, strict=True):
                store.append(item)
    every = torch.cat(adv)
    whitened = [(a - every.mean(0)) / every.std(0, correction=0).clamp_min(0.1) for a in adv]
    n = len(every)
    critic = torch.nn.Linear(weight.shape[1], 2)
    with torch.no_grad():
        critic.weight.copy_(weight)
        critic.bias.copy_(bias)
    fit = torch.optim.Adam(critic.parameters(), lr=PPO.critic_lr)
    lambdas = []
    for _ in range(PPO.epochs):
        losses, value_loss = torch.zeros(2), 0.0
        for (prompt, response), o, a, r, v in zip(rows, old, whitened, ret, val, strict=True):
            logp, entropy = token_logprobs(model, prompt, response)
            ratio = (logp - o).exp()[:, None]
            clipped = ratio.clamp(1 - PPO.clip_range, 1 + PPO.clip_range)
            losses = losses - (torch.minimum(ratio * a, clipped * a) + PPO.entropy_coef * entropy[:, None]).sum(0) / n
            hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            new = critic(hidden[len(prompt) - 1 : -1].detach())
            near = v + (new - v).clamp(-PPO.value_clip, PPO.value_clip)
            value_loss = value_loss + 0.5 * torch.maximum((new - r) ** 2, (near - r) ** 2).sum() / n
        J = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.parameters, retain_graph=True)])
            for loss in losses
        ])  # fmt: skip
        G = (J @ J.T).double()
        lam = mgda.solve(G / G.trace(), CONFIG.beta, CONFIG.preference)
        lambdas.append(lam)
        gradient = lam.float() @ J
        assert gradient.norm() > CONFIG.max_grad_norm  # the clip must show
        adapter.assign(adapter.vector() - CONFIG.lr * gradient * CONFIG.max_grad_norm / gradient.norm())
        fit.zero_grad()
        value_loss.backward()
        fit.step()
    kl = torch.stack([(o - b).sum() for o, b in zip(old, ref, strict=True)])
    return adapter.vector(), torch.stack(lambdas), kl, critic


def test_a_local_update_is_the_formulas_row_by_row(world):
    built, client, rollout, scores = world
    theta, lambdas, kl, critic = plain_update(built, client, rollout, scores)
    client.critic_optimizer = torch.optim.Adam(client.critic.parameters(), lr=PPO.critic_lr)
    upload, log = firm.local_update(client, built.policy, built.theta, rollout, scores, KL_COEF, FIRM, CONFIG, PPO)
    moved = (theta - built.theta).norm()
    assert (upload - theta).norm() < 1e-3 * moved
    assert (log["lambda"] - lambdas).abs().max() < 1e-4
    assert (log["kl"] - kl).abs().max() < 1e-4
    assert (client.critic.weight - critic.weight).abs().max() < 1e-3


def test_the_update_uses_the_clients_own_theta_not_what_the_last_client_left(world):
    built, client, rollout, scores = world
    first = firm.local_update(client, built.policy, built.theta, rollout, scores, KL_COEF, FIRM, CONFIG, PPO)[0]
    assert not torch.equal(built.policy.adapter.vector(), built.theta)
    fresh = federation().clients[1]
    again = firm.local_update(fresh, built.policy, built.theta, rollout, scores, KL_COEF, FIRM, CONFIG, PPO)[0]
    # Another critic, so another update; but from the same start: far nearer to it than two updates in a row would be.
    assert (again - built.theta).norm() < 1.01 * PPO.epochs * CONFIG.lr * CONFIG.max_grad_norm
    assert (first - built.theta).norm() < 1.01 * PPO.epochs * CONFIG.lr * CONFIG.max_grad_norm


def spied_round(built):
    """One round, and every call of `local_update` in it: (client index, kl_coef, scores, upload)."""
    calls, real = [], firm.local_update

    def spy(client, policy, theta, batch, scores, kl_coef, *rest):
        upload, log = real(client, policy, theta, batch, scores, kl_coef, *rest)
        calls.append((client.index, kl_coef, scores, upload, batch))
        return upload, log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firm, "local_update", spy)
        metrics = built.round()
    return metrics, calls


def test_clients_train_on_calibrated_scores_of_their_own_rows():
    _, calls = spied_round(federation())
    for _, _, scores, _, batch in calls:
        assert (scores - (score(None, batch).float() - 0.5) / 0.2).abs().max() < 1e-6


def test_sampled_clients_are_weighed_by_their_own_prompts():
    built = federation(clients=5, clients_per_round=2)
    _, calls = spied_round(built)
    indices = [index for index, *_ in calls]
    held = torch.tensor([len(built.clients[i].prompts) for i in indices], dtype=torch.float32)
    assert indices != [0, 1] and held[0] != held[1]
    uploads = torch.stack([upload for *_, upload, _ in calls])
    assert (built.theta - (held / held.sum()) @ uploads).abs().max() < 1e-6


def test_a_rejected_clients_weight_goes_with_it(monkeypatch):
    real = firm.local_update

    def broken(client, *args):
        upload, log = real(client, *args)
        return (upload * float("nan") if client.index == 0 else upload), log

    monkeypatch.setattr(firm, "local_update", broken)
    built = federation()
    _, calls = spied_round(built)
    uploads = torch.stack([upload for *_, upload, _ in calls])[1:]
    assert (built.theta - (torch.tensor([5.0, 6.0]) / 11) @ uploads).abs().max() < 1e-6


def test_the_kl_coefficient_adapts_after_the_round_and_serves_the_next():
    built = federation(ppo={"kl_coef": 0.5, "kl_target": 1.0, "kl_horizon": 100})
    first, calls = spied_round(built)
    assert {kl_coef for _, kl_coef, *_ in calls} == {0.5}
    assert first["kl"] == 0.0  # the base policy, so κ falls by the clipped error −0.2 · 18 / 100
    _, calls = spied_round(built)
    assert {round(kl_coef, 9) for _, kl_coef, *_ in calls} == {round(0.5 * (1 - 0.2 * 0.18), 9)}


def test_every_round_and_client_draws_anew():
    built = federation()
    batches = [built.rollout([client], t, purpose)[0][0] for client in built.clients for t in (0, 1)
               for purpose in (firm.TRAINING, firm.CALIBRATION)]  # fmt: skip
    uniforms = [firm.stream(0, purpose, t, c).random() for purpose in (2, 3, 4) for t in range(3) for c in range(3)]
    assert len(set(uniforms)) == 27
    assert len({tuple(id(p) for p in batch) for batch in batches}) == len(batches)


def test_streams_with_trailing_zeros_are_streams_of_their_own():
    assert len({firm.stream(0, *keys).random() for keys in ((2,), (2, 0), (2, 0, 0))}) == 3


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
    _, rollout = built.rollout(built.clients[:1], 0, firm.TRAINING)
    hidden = built.policy.logprobs(rollout)[2]
    changed = rollout.responses.clone()
    t = 2
    changed[:, t:] = (changed[:, t:] + 5) % 46 + 3
    rollout.responses = changed
    again = built.policy.logprobs(rollout)[2]
    assert (hidden[:, : t + 1] - again[:, : t + 1]).abs().max() < 1e-6
    assert np.all((hidden[:, t + 1 :] - again[:, t + 1 :]).abs().amax(-1)[rollout.mask[:, t + 1 :] == 1].numpy() > 1e-6)
