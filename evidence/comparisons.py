"""What the bench measures, part by part: ours, a peer, and the work that both are given. [ours]

    a  our LoRA layer against PEFT's               e  our QP solvers against SLSQP and TorchJD
    b  our sampler against transformers.generate   f  a whole round against TRL's GRPOTrainer, client by client
    c  cohort rollout against client by client     g  what a round costs, by clients, objectives, rank, length
    d  J for M objectives against J for one        h  the tinyllama preset, whole, on stand-ins of the shape; j: 12 GB's
    i  a decode step against memory bandwidth      k  FedMOA's round and memory, with groups and with a critic

A part is a function of a `Bench`, which holds the shape and the device, times, and keeps the rows. Peers are imported
where they are used, so that one that is not installed leaves out its own part only.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PrinterCallback

import baselines
import fedmoa
import firm
import mgda
import ppo
import run
from app.files import read_json
from app.session import quiet_libraries
from clients import ClientConfig
from data import Prompt
from firm import Federation, FIRMConfig, TrainingConfig
from grpo import GRPO, Groups
from lora import LoRALinear
from ppo import PPO, PPOConfig
from rewards import Calibration
from sampler import Decoder, pad_left
from settings import parse

if TYPE_CHECKING:
    from evidence.bench import Bench

CLIENTS, BATCH = 8, 16  # the paper's


def uniforms(N: int, L: int) -> np.ndarray:
    """What N responses of L tokens are drawn with. [N, L]"""
    return np.random.default_rng(1).random((N, L))


def peft_config(bench: Bench, target_modules: str | list[str] = "all-linear"):
    """PEFT's adapter of the bench's rank."""
    from peft import LoraConfig

    return LoraConfig(r=bench.rank, lora_alpha=2 * bench.rank, target_modules=target_modules)


def federation(
    bench: Bench, clients: int = CLIENTS, M: int = 2, rank: int | None = None, L: int | None = None,
    method: firm.Method = firm.FIRM,
) -> Federation:  # fmt: skip
    """A federation on the bench's policy; its rewards cost nothing, so that they do not count."""
    prompts = [Prompt("", (), "", tuple(ids), "all", {}) for ids in bench.prompts(clients * BATCH)]
    shares = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]

    def score(prompts: list[Prompt], rollout, holdings: list) -> Tensor:
        return torch.stack([(rollout.responses % (j + 2) == 0).double().mean(1) for j in range(M)], 1)

    config = TrainingConfig(
        FIRMConfig(clients=clients, batch_size=BATCH), ClientConfig(),
        PPOConfig(micro_batch_size=bench.shape.micro_batch_size),
    )  # fmt: skip
    policy = bench.policy(rank)
    policy.max_new_tokens = L or bench.shape.L
    built = Federation(policy, shares, [f"r{j}" for j in range(M)], score, method, config)
    mean, scale = torch.full((M,), 0.5).double(), torch.full((M,), 0.1).double()
    built.calibration = Calibration(mean, scale, torch.zeros(M, dtype=torch.bool))
    return built


def a_lora_layer(bench: Bench) -> None:
    """Our LoRALinear and PEFT's around equal frozen layers, the MLP's up projection, on one client's batch."""
    from peft import get_peft_model

    s, dtype = bench.shape, getattr(torch, bench.dtype)
    T = s.L + int(np.interp(0.5, *s.lengths))
    base = nn.Linear(s.hidden, s.intermediate, bias=False, device=bench.device, dtype=dtype).requires_grad_(False)
    ours = LoRALinear(base, bench.rank, 2.0, torch.Generator().manual_seed(0))
    peer = get_peft_model(nn.Sequential(base), peft_config(bench, ["0"])).base_model.model[0]
    factors = {ours: list(ours.factors()), peer: [p for p in peer.parameters() if p.requires_grad]}
    x = torch.randn(BATCH, T, s.hidden, device=bench.device, dtype=dtype, requires_grad=True)
    repeats = max(1, int(2e9 / (2 * BATCH * T * s.hidden * s.intermediate)))  # some 2 GFLOP per timing

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(repeats):
                layer(x)

    def both(layer: nn.Module) -> None:
        for _ in range(repeats):
            torch.autograd.grad(layer(x).sum(), [x, *factors[layer]])

    for label, work in (("forward", forward), ("forward + backward", both)):
        name = f"a LoRA layer {label}, our time / PEFT's"
        bench.compare(name, partial(work, ours), partial(work, peer), pairs=max(bench.pairs, 30), inverse=True)


def b_sampler(bench: Bench) -> None:
    """Tokens per second against transformers.generate on the same rows: without an adapter, and with one (PEFT's)."""
    from peft import get_peft_model

    N, L = CLIENTS * BATCH, bench.shape.L
    prompts, policy = bench.prompts(N), bench.policy()
    models = {"no adapter": bench.model(), "PEFT's adapter": get_peft_model(bench.model(), peft_config(bench))}
    kinds = {"eager": None} | ({"static, compiled": "static"} if bench.device == "cuda" else {})
    ids, mask = pad_left(prompts, 0, policy.device)
    for label, model in models.items():
        for kind, cache in kinds.items():
            settings = GenerationConfig(
                do_sample=True, top_k=0, max_new_tokens=L, min_new_tokens=L, pad_token_id=0, eos_token_id=1,
                cache_implementation=cache,
            )  # fmt: skip
            generate = partial(model.generate, input_ids=ids, attention_mask=mask, generation_config=settings)
            name = f"b our sampler / generate, {kind}, {label} there"
            bench.compare(name, partial(policy.sample, prompts, uniforms(N, L)), generate, "tokens/s", work=N * L)


def c_cohort(bench: Bench) -> None:
    """All clients' prompts in one batch against one client after another."""
    N, L = CLIENTS * BATCH, bench.shape.L
    prompts, u = bench.prompts(N), uniforms(N, L)
    cohort, client = bench.policy(), bench.policy()  # each keeps its own decoder

    def client_by_client() -> None:
        for i in range(0, N, BATCH):
            client.sample(prompts[i : i + BATCH], u[i : i + BATCH])

    name = f"c cohort of {CLIENTS} clients / client by client"
    bench.compare(name, partial(cohort.sample, prompts, u), client_by_client, "tokens/s", work=N * L)


def d_jacobian(bench: Bench) -> None:
    """J of M objectives in units of one objective's pass."""
    policy = bench.policy()
    rollout = policy.sample(bench.prompts(BATCH), uniforms(BATCH, bench.shape.L))
    config = PPOConfig(micro_batch_size=bench.shape.micro_batch_size)

    def gradients(M: int) -> Callable[[], object]:
        batch = ppo.prepare(policy, rollout, torch.randn(BATCH, M), 0.1, config)
        learner = ppo.PPO(policy.hidden_size, config, policy.device, M)
        return partial(ppo.policy_gradients, policy, batch, learner.advantages(batch).normalised, config)

    for M in (2, 4):
        bench.compare(f"d J of {M} objectives, time / one objective's", gradients(M), gradients(1), inverse=True)


def e_qp(bench: Bench) -> None:
    """The closed form and the general solver against SciPy's SLSQP and TorchJD's min-norm, 20 Grams a timing."""
    from scipy.optimize import minimize
    from torchjd.aggregation import MGDAWeighting

    rng = np.random.default_rng(0)
    frank_wolfe = MGDAWeighting(epsilon=1e-5, max_iters=10_000)

    def grams(M: int, condition: float) -> list[Tensor]:
        scale = np.geomspace(1.0, condition**-0.5, M)  # of the gradients: the Gram's condition number is its square
        J = [torch.from_numpy(scale[:, None] * rng.standard_normal((M, 50))) for _ in range(20)]
        return [mgda.normalise(x @ x.T) for x in J]

    def slsqp(G: Tensor, beta: float) -> Tensor:
        A, M = G.numpy(), len(G)
        found = minimize(
            lambda x: x @ A @ x + beta / 2 * ((x - 1 / M) ** 2).sum(), np.full(M, 1 / M), method="SLSQP",
            jac=lambda x: 2 * A @ x + beta * (x - 1 / M), bounds=[(0, 1)] * M, options={"ftol": 1e-15, "maxiter": 1000},
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        )  # fmt: skip
        return torch.from_numpy(found.x.clip(0) / found.x.clip(0).sum())

    def solve_all(solve: Callable[[Tensor, float], Tensor], cases: list[Tensor], beta: float) -> list[Tensor]:
        return [solve(G, beta) for G in cases]

    peers = {"SLSQP": (slsqp, 0.01), "TorchJD's MGDA": (lambda G, beta: frank_wolfe(G), 0.0)}
    for M, kind, condition in ((2, "easy", 1.0), (4, "easy", 1.0), (4, "unequal gradients", 1e8)):
        cases, solver = grams(M, condition), "closed form" if M == 2 else "general solver"
        for label, (solve, beta) in peers.items():
            ours, peer = (partial(solve_all, f, cases, beta) for f in (mgda.solve, solve))
            bench.compare(f"e {solver} M={M} {kind} / {label}", ours, peer, "QPs/s", work=len(cases))
            bench.rows[-1]["residuals"] = [
                max(mgda.residual(G, lam.double(), beta) for G, lam in zip(cases, solutions, strict=True))
                for solutions in (ours(), peer())
            ]


def grpo_trainers(bench: Bench, out: str) -> list:
    """TRL's GRPO with PEFT's adapter, a trainer per client, kept between rounds.

    4 prompts × 4 responses of the same length, 2 rewards, 3 steps on them, reference log-probs, no checkpointing,
    batches of 16 (smaller ones are no faster there).
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def share_of_multiples(modulus: int) -> Callable:
        def reward(completion_ids: list[list[int]], **_) -> list[float]:
            return [sum(i % modulus == 0 for i in ids) / len(ids) for ids in completion_ids]

        reward.__name__ = f"multiples_of_{modulus}"  # what TRL logs it as
        return reward

    texts = [" ".join(f"w{i}" for i in p) for p in bench.prompts(CLIENTS * BATCH)]
    settings = dict(
        output_dir=out, per_device_train_batch_size=BATCH, num_generations=Groups.group_size, num_iterations=3,
        max_steps=3,
        max_completion_length=bench.shape.L, generation_kwargs={"min_new_tokens": bench.shape.L}, beta=0.04,
        top_k=0, learning_rate=2e-4, use_cpu=bench.device == "cpu", bf16=bench.dtype == "bfloat16",
        gradient_checkpointing=False, save_strategy="no", report_to="none", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return [
        GRPOTrainer(
            bench.model(), [share_of_multiples(2), share_of_multiples(3)], GRPOConfig(**settings),
            Dataset.from_dict({"prompt": texts[i : i + BATCH]}), processing_class=bench.tokenizer(),
            peft_config=peft_config(bench),
        )
        for i in range(0, len(texts), BATCH)
    ]  # fmt: skip


def f_round(bench: Bench) -> None:
    """A round of FIRM (8 clients × 16 responses, 2 objectives, 3 epochs) against GRPO's by TRL and PEFT.

    GRPO takes one gradient a step and has no critic, FIRM takes M and has one: FIRM with groups of the same size stands
    beside it, and MORLHF with them, which takes one.
    """
    inside = []  # a round's seconds in training steps, which generate too; the rest is the start of a trainer

    def timed(step: Callable) -> Callable:
        def training_step(*args, **kwargs):
            result = []
            inside[-1] += bench.clock(lambda: result.append(step(*args, **kwargs)))
            return result[0]

        return training_step

    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings(action="ignore"):
        trainers = grpo_trainers(bench, out)
    quiet_libraries()
    for trainer in trainers:
        trainer.remove_callback(PrinterCallback)
        trainer.training_step = timed(trainer.training_step)

    def round_of_trl() -> None:
        inside.append(0.0)
        for trainer in trainers:
            trainer.train()

    methods = {"FIRM": firm.FIRM, "FIRM with groups": replace(firm.FIRM, learner=Groups)}
    methods["MORLHF with groups"] = replace(baselines.MORLHF, learner=Groups)
    for label, method in methods.items():
        name = f"f a round of {label} / TRL's GRPO + PEFT, client by client"
        bench.compare(name, federation(bench, method=method).round, round_of_trl, pairs=min(bench.pairs, 10))
    bench.add("f TRL's round, inside its training steps", float(np.median(inside)), "s")


def g_cost(bench: Bench) -> None:
    """A round's time over that of 8 clients, 2 objectives, the rank and length of the others."""
    L = bench.shape.L
    base = federation(bench)
    variants = {
        **{f"{c} clients": {"clients": c} for c in (2, 16)},
        **{f"{M} objectives": {"M": M} for M in (1, 4)},
        **{f"rank {r}": {"rank": r} for r in (4, 64)},
        **{f"{n} tokens": {"L": n} for n in (L // 2, L * 2)},
    }
    for label, setting in variants.items():
        name = f"g {label}: time / {CLIENTS} clients, 2 objectives, rank {bench.rank}, {L} tokens"
        other = federation(bench, **setting)
        bench.compare(name, other.round, base.round, pairs=min(bench.pairs, 5), inverse=True)


def h_preset(bench: Bench, preset: str = "tinyllama") -> None:
    """`run.py --preset PRESET` from local directories: seconds of its 16 rounds by phase, memory, KL afterwards."""
    with tempfile.TemporaryDirectory() as root:
        flags = bench.stand_ins(Path(root))
        config, *_ = parse(["--preset", preset, *flags, *bench.flags, "--profile", "--out", f"{root}/run"])
        if bench.device == "cuda":  # what other parts held shall not count
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        summary = run.train(config, progress=False)
    profile, name = summary["profile"], " ".join([preset, *bench.flags])
    rounds = sum(profile["seconds"].values())
    bench.add(f"h {name}, its {profile['rounds']} rounds", rounds, "s")
    bench.add(f"h {name}, loading, graph capture, evaluation", summary["seconds"] - rounds, "s")
    for phase, seconds in sorted(profile["seconds"].items()):
        bench.add(f"h {name}, {phase}", seconds / profile["rounds"], "s/round")
    bench.add(f"h {name}, peak {profile['memory']}", profile["peak_gib"], "GiB")
    bench.add(f"h {name}, KL of the trained model", summary["kl"]["mean"], "nats")


@torch.no_grad()
def i_decode_step(bench: Bench) -> None:
    """A decode step over the time that reading the weights and the cache once would take, at measured bandwidth."""
    N, L = CLIENTS * BATCH, bench.shape.L
    policy, prompts = bench.policy(), bench.prompts(N)
    u = torch.from_numpy(uniforms(N, L)).to(policy.device)
    with policy.adapter.ready_to_sample():
        policy.sampler.draw(prompts, u)
        decoder = policy.sampler.decoder or Decoder(policy.sampler, N, max(map(len, prompts)), L)
        draw = partial(decoder.run, prompts, u, cuda_graph=decoder.graph is not None)
        prefill = partial(decoder.prefill, prompts)
        times = [(bench.clock(draw) - bench.clock(prefill)) / (L - 1) for _ in range(min(bench.pairs, 10))]
    model = policy.model  # a step reads all but most of the input embedding, and the adapter in the weights' type
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    weights *= torch.finfo(model.dtype).bits // 8
    cache = sum(x.numel() * x.element_size() for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    source = torch.zeros(2**28 if bench.device == "cuda" else 2**24, device=policy.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / min(bench.clock(lambda: target.copy_(source)) for _ in range(10))
    bench.add("i copy bandwidth", bandwidth / 1e9, "GB/s")
    name = f"i decode step of {N} rows, time / bandwidth limit"
    bench.add(name, float(np.median(times)), "s", np.array(times) / ((weights + cache) / bandwidth))


def k_fedmoa(bench: Bench) -> None:
    """FedMOA with its groups against FedMOA with a critic: a round's time in one process, peak memory in two."""
    method = replace(fedmoa.FEDMOA, client_weights=firm.FIRM.client_weights, numbers=firm.FIRM.numbers)
    rounds = [federation(bench, method=replace(method, learner=learner)).round for learner in (GRPO, PPO)]
    bench.compare("k a round of FedMOA, time / with a critic", *rounds, pairs=min(bench.pairs, 10), inverse=True)
    with tempfile.TemporaryDirectory() as root:
        common = ["--preset", "paper", "--method", "fedmoa", "--aggregation", "fedavg", *bench.stand_ins(Path(root))]
        if bench.shape.micro_batch_size:
            common += ["--micro_batch_size", str(bench.shape.micro_batch_size)]
        for label, flags in (("groups", []), ("a critic", ["--advantages", "ppo"])):
            out = Path(root) / label.replace(" ", "-")
            command = [sys.executable, "run.py", *common, *flags, "--rounds", "3", "--profile", "--out", str(out)]
            subprocess.run(command, cwd=Path(run.__file__).parent, check=True, capture_output=True)
            profile = read_json((out / "summary.json").read_text("utf-8"))["profile"]
            bench.add(f"k FedMOA with {label}, peak {profile['memory']}", profile["peak_gib"], "GiB")


PARTS = {
    "a": a_lora_layer, "b": b_sampler, "c": c_cohort, "d": d_jacobian, "e": e_qp, "f": f_round, "g": g_cost,
    "h": h_preset, "i": i_decode_step, "j": partial(h_preset, preset="tinyllama-12gb"), "k": k_fedmoa,
}  # fmt: skip
