"""What `--diagnostics` adds to a round's metrics, from gradients at θ_t that no client sends. [ours]

    drift      how much of the federation's direction is disagreement in λ alone
    grams/     the inner products behind it, and those of every step, from which λ can be solved again

All clients must hold the same objectives. The price: a forward and k backward passes over every batch, and memory for
the gradients of all clients.
"""

import torch
from torch import Tensor

import mgda
import ppo
from clients import Round
from rollout import Policy
from settings import UpdateSettings


def drift(gram: Tensor, lambdas: Tensor, weights: Tensor) -> float:
    """‖Σ w_c J_cᵀ(λ_c − λ̄)‖ / ‖Σ w_c J_cᵀλ_c‖, with λ̄ = Σ w_c λ_c; NaN if the step is zero.

    With unequal λ_c the federation comes to rest where Σ w_c J_cᵀλ_c = 0, which is not Pareto-stationary; this part
    keeps it away. gram [C, M, C, M] of all clients' gradients at one θ, lambdas [C, M], weights [C] of any sum.
    """
    w = (weights / weights.sum())[:, None]
    parts = w * (lambdas - (w * lambdas).sum(0)), w * lambdas
    lost, step = (float(torch.einsum("cm,cmdn,dn->", v, gram, v).clamp_min(0.0).sqrt()) for v in parts)
    return lost / step if step > 0 else float("nan")


def observe(policy: Policy, record: Round, config: UpdateSettings) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A round's drift, and the inner products that it came from; the adapter stays where it is.

    steps [C, trainings, K, k, k]   the Gram matrix JJᵀ of every optimizer step, as it is
    start [C, l, C, l]              of the gradients at θ_t of all clients and their l = trainings · k losses
    weights [C]                     the clients' shares of the average
    """
    clients, w, theta = [part.updates for part in record.arrived.values()], record.shares, policy.adapter.vector()
    policy.adapter.assign(record.message["theta"])
    gradients = [
        [ppo.policy_gradients(policy, u.batch, u.advantages.normalised, config).J for u in of] for of in clients
    ]
    J = torch.stack([torch.cat(of) for of in gradients])  # [C, l, d]
    policy.adapter.assign(theta)
    start = mgda.gram(J.flatten(0, 1)).view(2 * J.shape[:2])
    lam = torch.stack([torch.stack([update.steps[0].lam for update in of]) for of in clients])  # [C, trainings, k]
    first = (record.training_shares[:, None] * lam).flatten(1)  # weights of the losses in the first step [C, l]
    steps = torch.stack([torch.stack([torch.stack([s.gram for s in u.steps]) for u in of]) for of in clients])
    return {"drift": drift(start, first, w)}, {"steps": steps, "start": start, "weights": w}
