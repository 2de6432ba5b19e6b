"""Our parts against well-known peers, side by side in one process. [ours]

    pip install -r requirements-bench.txt
    python -m evidence.bench                              # the CPU's two shapes: tiny and stories260k
    python -m evidence.bench --device cuda --dtype bfloat16 --shapes tinyllama
    python -m evidence.bench --only a c --pairs 5                  # some parts, in a hurry

Models have random weights of a given shape, built from a config: nothing is downloaded, and time does not depend on
what a weight says (responses are kept from ending early, on both sides). Every comparison runs ours and the peer's in
turn, so that what else the machine does falls on both; the figure is the median of the ratios of the pairs, with a
bootstrapped 95 % interval, which holds for one process (another may allocate its memory otherwise). On shared CPU cores
the ratios mean something and the seconds do not.

    a  our LoRA layer against PEFT's               e  our QP solvers against SLSQP and TorchJD
    b  our sampler against transformers.generate   f  a whole round against TRL's GRPOTrainer, client by client
    c  cohort rollout against client by client     g  what a round costs, by clients, objectives, rank, length
    d  J for M objectives against M passes         h  the tinyllama preset, whole, on stand-ins of the shape; j: 12 GB's
    i  a decode step against memory bandwidth

Rows go to results/bench.json, where a run replaces those of its own device, type and names.
"""

import argparse
import contextlib
import gc
import io
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import baselines
import firm
import mgda
import ppo
import run
from app.report import write
from data import Prompt
from firm import Federation, FIRMConfig
from lora import LoRAConfig, LoRALinear
from ppo import PPOConfig
from rollout import Policy, RolloutConfig
from sampler import Decoder, pad_left
from settings import parse

RESULTS = Path(__file__).parents[1] / "results" / "bench.json"
CLIENTS, BATCH = 8, 16  # the paper's
HH_LENGTHS = (
    (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0),
    (18, 22, 29, 90, 151, 204, 256),
)  # quantiles of 675 HH-RLHF prompts


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, its responses' length L, the micro-batches that suit it, its prompts' (quantiles, tokens)."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    L: int
    micro_batch_size: int | None = None
    lengths: tuple[tuple[float, ...], tuple[int, ...]] = HH_LENGTHS


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 128, 2, 4, 4, 198, 12, None, ((0.0, 1.0), (9, 14))),
        Shape("stories260k", 64, 172, 5, 8, 4, 512, 48, 2),
        Shape("tinyllama", 2048, 5632, 22, 32, 4, 32_000, 128, 4),
    )
}


@dataclass
class Bench:
    """One shape on one device, and the rows that its comparisons leave."""

    shape: Shape
    device: str
    dtype: str
    pairs: int
    rank: int = 16
    flags: tuple[str, ...] = ()  # of run.py, for h and j

    def __post_init__(self) -> None:
        self.rows: list[dict] = []

    # ---- what is measured ----------------------------------------------------------------------------------

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """As many words as the vocabulary has; pad and EOS are its first two."""
        words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, self.shape.vocabulary))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

    def model(self) -> PreTrainedModel:
        """Random weights, the same at every call."""
        s = self.shape
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate,
            num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
            max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype)).eval()

    def policy(self, rank: int | None = None, cuda_graph: bool = True) -> Policy:
        """A policy with an adapter away from zero, whose responses never end before L."""
        lora, settings = LoRAConfig(lora_rank=rank or self.rank), RolloutConfig(cuda_graph=cuda_graph)
        policy = Policy(self.model(), self.tokenizer(), lora, settings)
        theta = policy.adapter.vector()
        policy.adapter.assign(theta + 0.01 * torch.randn(theta.shape, device=theta.device))
        policy.sampler.eos = policy.sampler.eos[:0]
        return policy

    def prompts(self, n: int) -> list[list[int]]:
        """Random tokens, of the shape's lengths."""
        rng = np.random.default_rng(0)
        lengths = np.interp(rng.random(n), *self.shape.lengths).round().astype(int)
        return [rng.integers(2, self.shape.vocabulary, length).tolist() for length in lengths]

    # ---- how -----------------------------------------------------------------------------------------------

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds of one call, GPU included."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def compare(
        self, name: str, ours: Callable[[], object], theirs: Callable[[], object], unit: str = "s",
        work: float | None = None, pairs: int | None = None, inverse: bool = False,
    ) -> None:  # fmt: skip
        """Pairs of runs in turn, after one of each to warm up, the first place alternating.

        The ratio is theirs / ours in time, how many times faster we are; inverse: ours / theirs. `work` per run makes
        a rate of the value, in `unit`.
        """
        ours(), theirs()
        times = []
        for i in range(pairs or self.pairs):
            if i % 2:
                b, a = self.clock(theirs), self.clock(ours)
            else:
                a, b = self.clock(ours), self.clock(theirs)
            times.append((a, b))
        ours_s, theirs_s = np.array(times).T
        ratios = ours_s / theirs_s if inverse else theirs_s / ours_s
        value = float(np.median(ours_s))
        self.add(name, work / value if work else value, unit, ratios)

    def row(self, name: str, value: float | None, unit: str) -> dict:
        """A row without a ratio; null is what was not measured."""
        return {
            "name": f"{name}, {self.shape.name}", "device": self.device, "dtype": self.dtype, "value": value,
            "unit": unit, "ratio": None, "interval": None, "pairs": 0,
        }  # fmt: skip

    def add(self, name: str, value: float, unit: str, ratios: np.ndarray | None = None) -> None:
        """One row, with the median of the ratios and its interval where there are any."""
        row = self.row(name, value, unit)
        if ratios is not None:
            rng = np.random.default_rng(0)
            medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
            row |= {
                "ratio": float(np.median(ratios)),
                "interval": np.quantile(medians, [0.025, 0.975]).tolist(),
                "pairs": len(ratios),
            }
        self.rows.append(row)
        print(line(row), flush=True)


def line(row: dict) -> str:
    """A row for the terminal."""
    figure = lambda x: "not measured" if x is None else f"{x:.4g}"  # noqa: E731
    text = f"{row['name']:66}{figure(row['value']):>14} {row['unit']:10}"
    if row["ratio"] is not None:
        low, high = row["interval"]
        text += f"{row['ratio']:>8.3g} ({low:.3g} to {high:.3g}, {row['pairs']} pairs)"
    return text


# ---- the comparisons -----------------------------------------------------------------------------------------


def a_lora_layer(bench: Bench) -> None:
    """Our LoRALinear and PEFT's around equal frozen layers, the MLP's up projection, on one client's batch."""
    import peft

    s, dtype = bench.shape, getattr(torch, bench.dtype)
    T = s.L + int(np.interp(0.5, *s.lengths))
    base = nn.Linear(s.hidden, s.intermediate, bias=False, device=bench.device, dtype=dtype).requires_grad_(False)
    ours = LoRALinear(base, bench.rank, 2.0, torch.Generator().manual_seed(0))
    wrapped = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=bench.rank, lora_alpha=2 * bench.rank, target_modules=["0"])
    )
    theirs = wrapped.base_model.model[0]
    x = torch.randn(BATCH, T, s.hidden, device=bench.device, dtype=dtype, requires_grad=True)
    repeats = max(1, int(2e9 / (2 * BATCH * T * s.hidden * s.intermediate)))  # some 2 GFLOP per timing

    def forward(layer: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def repeat() -> None:
            for _ in range(repeats):
                layer(x)

        return repeat

    def both(layer: nn.Module) -> Callable[[], None]:
        factors = layer.factors() if layer is ours else (p for p in layer.parameters() if p.requires_grad)
        wanted = [x, *factors]

        def repeat() -> None:
            for _ in range(repeats):
                torch.autograd.grad(layer(x).sum(), wanted)

        return repeat

    for name, work in (("forward", forward), ("forward + backward", both)):
        bench.compare(
            f"a LoRA layer {name}, our time / PEFT's",
            work(ours),
            work(theirs),
            pairs=max(bench.pairs, 30),
            inverse=True,
        )


def b_sampler(bench: Bench) -> None:
    """Tokens per second against transformers.generate on the same rows: without an adapter, and with one (PEFT's)."""
    import peft

    N, L = CLIENTS * BATCH, bench.shape.L
    prompts, u = bench.prompts(N), np.random.default_rng(1).random((N, L))
    policy = bench.policy()
    bare = bench.model()
    wrapped = peft.get_peft_model(
        bench.model(), peft.LoraConfig(r=bench.rank, lora_alpha=2 * bench.rank, target_modules="all-linear")
    )
    ids, mask = pad_left(prompts, 0, policy.device)
    kinds = {"eager": None} | ({"static, compiled": "static"} if bench.device == "cuda" else {})
    for model, label in ((bare, "no adapter there"), (wrapped, "PEFT's adapter there")):
        for kind, cache in kinds.items():
            settings = GenerationConfig(
                do_sample=True, top_k=0, max_new_tokens=L, min_new_tokens=L, pad_token_id=0, eos_token_id=1,
                cache_implementation=cache,
            )  # fmt: skip
            generate = lambda m=model, s=settings: m.generate(  # noqa: E731
                input_ids=ids, attention_mask=mask, generation_config=s
            )
            bench.compare(
                f"b our sampler / generate, {kind}, {label}", lambda: policy.sample(prompts, u), generate, "tokens/s",
                work=N * L,
            )  # fmt: skip


def c_cohort(bench: Bench) -> None:
    """All clients' prompts in one batch against one client after another."""
    N, L = CLIENTS * BATCH, bench.shape.L
    prompts, u = bench.prompts(N), np.random.default_rng(1).random((N, L))
    together, apart = bench.policy(), bench.policy()  # each keeps its own decoder

    def client_by_client() -> None:
        for i in range(0, N, BATCH):
            apart.sample(prompts[i : i + BATCH], u[i : i + BATCH])

    bench.compare(
        f"c cohort of {CLIENTS} clients / client by client", lambda: together.sample(prompts, u), client_by_client,
        "tokens/s", work=N * L,
    )  # fmt: skip


def d_jacobian(bench: Bench) -> None:
    """J of M objectives in units of one objective's pass, and against M separate passes."""
    policy = bench.policy()
    rollout = policy.sample(bench.prompts(BATCH), np.random.default_rng(1).random((BATCH, bench.shape.L)))
    config = PPOConfig(micro_batch_size=bench.shape.micro_batch_size)
    logp, _, _ = policy.logprobs_in_pieces(rollout, config.micro_batch_size)

    def gradients(M: int, times: int = 1) -> Callable[[], None]:
        advantages = torch.randn(*logp.shape, M, device=policy.device)

        def repeat() -> None:
            for _ in range(times):
                ppo.policy_gradients(policy, rollout, logp, advantages, config)

        return repeat

    for M in (2, 4):
        bench.compare(f"d J of {M} objectives, time / one objective's", gradients(M), gradients(1), inverse=True)
        bench.compare(f"d J of {M} objectives / {M} separate passes", gradients(M), gradients(1, M))


def e_qp(bench: Bench) -> None:
    """The closed form and the general solver against SciPy's SLSQP and TorchJD's min-norm, 20 Grams a timing."""
    from scipy.optimize import minimize
    from torchjd.aggregation import MGDAWeighting

    rng = np.random.default_rng(0)

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

    frank_wolfe = MGDAWeighting(epsilon=1e-5, max_iters=10_000)
    peers = {"SLSQP": (slsqp, 0.01), "TorchJD's MGDA": (lambda G, beta: frank_wolfe(G), 0.0)}
    for M, kind, condition in ((2, "easy", 1.0), (4, "easy", 1.0), (4, "unequal gradients", 1e8)):
        cases = grams(M, condition)
        for peer, (solve, beta) in peers.items():
            solver = "closed form" if M == 2 else "general solver"
            ours, theirs = ((lambda f=f: [f(G, beta) for G in cases]) for f in (mgda.solve, solve))  # noqa: B023
            worst = [
                max(mgda.residual(G, lam.double(), beta) for G, lam in zip(cases, solutions, strict=True))
                for solutions in (ours(), theirs())
            ]
            bench.compare(f"e {solver} M={M} {kind} / {peer}", ours, theirs, "QPs/s", work=len(cases))
            bench.rows[-1]["residuals"] = worst
            print(f"{'':8}largest residual {worst[0]:.1e}, there {worst[1]:.1e}")


def federation(bench: Bench, clients: int, M: int, rank: int, L: int, method: firm.Method = firm.FIRM) -> Federation:
    """A federation on the bench's policy; its rewards cost nothing, so that they do not count."""
    lists = bench.prompts(clients * BATCH)
    shares = [
        [Prompt("", (), "", tuple(p), "all", {}) for p in lists[i : i + BATCH]] for i in range(0, len(lists), BATCH)
    ]

    def score(prompts: list[Prompt], rollout) -> Tensor:
        return torch.stack([(rollout.responses % (j + 2) == 0).double().mean(1) for j in range(M)], 1)

    config = FIRMConfig(clients=clients, batch_size=BATCH)
    ppo_config = PPOConfig(micro_batch_size=bench.shape.micro_batch_size)
    names = [f"r{j}" for j in range(M)]
    return Federation(
        bench.policy(rank), shares, names, score, lambda r: (r - 0.5) / 0.1, config, ppo_config, L, method
    )


def f_round(bench: Bench) -> None:
    """A round of FIRM (8 clients × 16 responses, 2 objectives, 3 epochs) against GRPO's by TRL and PEFT.

    There: a trainer per client, kept between rounds; 8 prompts × 2 responses of the same length, 2 rewards, 3 steps on
    them, reference log-probs, no checkpointing, batches of 16 (smaller ones are no faster there). GRPO takes one
    gradient a step and has no critic, FIRM takes M: MORLHF, which takes one, stands beside it.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    ours = federation(bench, CLIENTS, 2, bench.rank, bench.shape.L)
    texts = [" ".join(f"w{i}" for i in p) for p in bench.prompts(CLIENTS * BATCH)]

    def reward(completion_ids: list[list[int]], modulus: int) -> list[float]:
        return [sum(i % modulus == 0 for i in ids) / len(ids) for ids in completion_ids]

    def even(prompts, completions, completion_ids, **_):
        return reward(completion_ids, 2)

    def thirds(prompts, completions, completion_ids, **_):
        return reward(completion_ids, 3)

    def trainer(c: int, out: str) -> GRPOTrainer:
        settings = GRPOConfig(
            output_dir=out, per_device_train_batch_size=BATCH, num_generations=2, num_iterations=3, max_steps=3,
            max_completion_length=bench.shape.L, generation_kwargs={"min_new_tokens": bench.shape.L}, beta=0.04,
            top_k=0, learning_rate=2e-4, use_cpu=bench.device == "cpu", bf16=bench.dtype == "bfloat16",
            gradient_checkpointing=False, save_strategy="no", report_to="none", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        return GRPOTrainer(
            bench.model(), [even, thirds], settings, Dataset.from_dict({"prompt": texts[c * BATCH : (c + 1) * BATCH]}),
            processing_class=bench.tokenizer(),
            peft_config=LoraConfig(r=bench.rank, lora_alpha=2 * bench.rank, target_modules="all-linear"),
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), quiet_threads():
        trainers = [trainer(c, out) for c in range(CLIENTS)]
    run.quiet_libraries()

    inside = []  # seconds of their training steps, which generate too; the rest is the start of a trainer

    def timed(step: Callable) -> Callable:
        def training_step(*args, **kwargs):
            result = []
            inside[-1] += bench.clock(lambda: result.append(step(*args, **kwargs)))
            return result[0]

        return training_step

    for client in trainers:
        client.training_step = timed(client.training_step)

    def theirs() -> None:
        inside.append(0.0)
        with contextlib.redirect_stdout(io.StringIO()), quiet_threads():
            for client in trainers:
                client.train()

    pairs = min(bench.pairs, 10)
    bench.compare("f a round of FIRM / TRL's GRPO + PEFT, client by client", ours.round, theirs, pairs=pairs)
    one_loss = federation(bench, CLIENTS, 2, bench.rank, bench.shape.L, baselines.MORLHF)
    bench.compare("f a round of MORLHF / TRL's GRPO + PEFT, client by client", one_loss.round, theirs, pairs=pairs)
    bench.add("f TRL's round, inside its training steps", float(np.median(inside)), "s")


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Trainers set threads and warn as they like; afterwards all is as it was."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def g_cost(bench: Bench) -> None:
    """A round's time over that of 8 clients, 2 objectives, the rank and length of the others."""
    L, r = bench.shape.L, bench.rank
    base = federation(bench, CLIENTS, 2, r, L)
    variants = {
        **{f"{c} clients": (c, 2, r, L) for c in (2, 16)},
        **{f"{M} objectives": (CLIENTS, M, r, L) for M in (1, 4)},
        **{f"rank {k}": (CLIENTS, 2, k, L) for k in (4, 64)},
        **{f"{n} tokens": (CLIENTS, 2, r, n) for n in (L // 2, L * 2)},
    }
    for label, setting in variants.items():
        other = federation(bench, *setting)
        bench.compare(
            f"g {label}: time / {CLIENTS} clients, 2 objectives, rank {r}, {L} tokens", other.round, base.round,
            pairs=min(bench.pairs, 5), inverse=True,
        )  # fmt: skip


CHAT = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"


def stand_ins(bench: Bench, root: Path) -> list[str]:
    """The flags that put random weights in the place of what the tinyllama presets name; writes them below root."""
    large = bench.shape.name == "tinyllama"
    size = {"n_embd": 1280, "n_layer": 36, "n_head": 20} if large else {"n_embd": 32, "n_layer": 2, "n_head": 2}
    tokenizer = bench.tokenizer()
    tokenizer.chat_template = CHAT
    bench.model().save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    tokenizer.chat_template = None
    for name in ("helpful", "harmless"):
        config = GPT2Config(**size, num_labels=1, pad_token_id=0)
        GPT2ForSequenceClassification(config).to(getattr(torch, bench.dtype)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    with open(root / "prompts.jsonl", "w", encoding="utf-8") as file:
        for ids in bench.prompts(5 * CLIENTS * BATCH):
            asked = f"\n\nHuman: {' '.join(f'w{i}' for i in ids[:-1])}\n\nAssistant:"
            file.write(json.dumps({"chosen": asked + " yes", "rejected": asked + " no"}) + "\n")
    objectives = [f"{name}=hf:{root / name}" for name in ("helpful", "harmless")]
    return [
        "--model", str(root / "policy"), "--prompts", str(root / "prompts.jsonl"), "--objectives", *objectives,
        "--dtype", bench.dtype, "--reward_dtype", bench.dtype, "--device", bench.device,
        "--max_new_tokens", str(bench.shape.L), "--held_out", "32", "--eval_samples", "2",
    ]  # fmt: skip


def h_preset(bench: Bench, preset: str = "tinyllama") -> None:
    """`run.py --preset tinyllama` from local directories: seconds of its 16 rounds by phase, memory, KL afterwards."""
    with tempfile.TemporaryDirectory() as root:
        flags = stand_ins(bench, Path(root))
        config, *_ = parse(["--preset", preset, *flags, *bench.flags, "--profile", "--out", f"{root}/run"])
        if bench.device == "cuda":  # what other parts held shall not count
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        summary = run.train(config, progress=False)
    profile = summary["profile"]
    rounds = sum(profile["seconds"].values())
    preset = " ".join([preset, *bench.flags])
    bench.add(f"h {preset}, its {profile['rounds']} rounds", rounds, "s")
    bench.add(f"h {preset}, loading, graph capture, evaluation", summary["seconds"] - rounds, "s")
    for phase, seconds in sorted(profile["seconds"].items()):
        bench.add(f"h {preset}, {phase}", seconds / profile["rounds"], "s/round")
    bench.add(f"h {preset}, peak {profile['memory']}", profile["peak_gib"], "GiB")
    bench.add(f"h {preset}, KL of the trained model", summary["kl"]["mean"], "nats")


def j_preset_12gb(bench: Bench) -> None:
    """The preset for 12 GB cards, as in h."""
    h_preset(bench, "tinyllama-12gb")


@torch.no_grad()
def i_decode_step(bench: Bench) -> None:
    """A decode step over the time that reading the weights and the cache once would take, at measured bandwidth."""
    N, L = CLIENTS * BATCH, bench.shape.L
    policy, prompts = bench.policy(), bench.prompts(N)
    u = torch.from_numpy(np.random.default_rng(1).random((N, L))).to(policy.device)
    with policy.adapter.ready_to_sample():
        policy.sampler.draw(prompts, u)
        decoder = policy.sampler.decoder or Decoder(policy.sampler, N, max(map(len, prompts)), L)

        def steps() -> None:
            decoder.prefill(prompts)
            for _ in range(L - 1):
                if decoder.graph:
                    decoder.graph.replay()
                else:
                    decoder.advance()
                    decoder.choose()

        once = lambda: decoder.prefill(prompts)  # noqa: E731
        times = [(bench.clock(steps) - bench.clock(once)) / (L - 1) for _ in range(min(bench.pairs, 10))]
    model = policy.model  # a step reads all but most of the input embedding, and the adapter in the weights' type
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    weights *= torch.finfo(model.dtype).bits // 8
    cache = sum(x.numel() * x.element_size() for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    source = torch.zeros(2**28 if bench.device == "cuda" else 2**24, device=policy.device)
    target = torch.empty_like(source)
    copies = [bench.clock(lambda: target.copy_(source)) for _ in range(10)]
    bandwidth = 2 * source.numel() * 4 / min(copies)
    limit = (weights + cache) / bandwidth
    bench.add("i copy bandwidth", bandwidth / 1e9, "GB/s")
    bench.add(
        f"i decode step of {N} rows, time / bandwidth limit", float(np.median(times)), "s", np.array(times) / limit
    )


PARTS = {
    "a": a_lora_layer,
    "b": b_sampler,
    "c": c_cohort,
    "d": d_jacobian,
    "e": e_qp,
    "f": f_round,
    "g": g_cost,
    "h": h_preset,
    "i": i_decode_step,
    "j": j_preset_12gb,
}


ON_A_GPU = (  # what is promised for TinyLlama's shape on a GPU: null in the list until somebody has measured it
    "a LoRA layer forward, our time / PEFT's",
    "a LoRA layer forward + backward, our time / PEFT's",
    "b our sampler / generate, eager, no adapter there",
    "b our sampler / generate, static, compiled, no adapter there",
    f"c cohort of {CLIENTS} clients / client by client",
    "d J of 2 objectives, time / one objective's",
    "d J of 4 objectives, time / one objective's",
    "f a round of FIRM / TRL's GRPO + PEFT, client by client",
    "h tinyllama, its 16 rounds",
    "h tinyllama, loading, graph capture, evaluation",
    "h tinyllama, peak GPU memory",
    "h tinyllama, KL of the trained model",
    "h tinyllama-12gb, peak GPU memory",
    f"i decode step of {CLIENTS * BATCH} rows, time / bandwidth limit",
)


def keep(rows: list[dict], out: Path) -> None:
    """Puts rows into the list on disk, in place of those of the same name, device and type."""
    key = lambda row: (row["device"], row["dtype"], row["name"])  # noqa: E731
    kept = {key(row): row for row in (json.loads(out.read_text("utf-8")) if out.is_file() else [])}
    kept |= {key(row): row for row in rows if row["value"] is not None or key(row) not in kept}
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, json.dumps(sorted(kept.values(), key=key), indent=1) + "\n")


def main() -> int:
    """The command line. Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=["tiny", "stories260k"], choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="a to j; on a CPU a to g")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of runs per comparison")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for ours and the peers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of run.py, for h and j; comes last")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: cuda was asked for, but torch sees no GPU; use --device cpu")
    if arguments.pairs < 2:
        parser.error("pairs: ask for at least 2")
    torch.set_num_threads(arguments.threads)
    run.quiet_libraries()
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    print(f"{hardware}, torch {torch.__version__}, {arguments.dtype}, {arguments.threads} CPU thread(s)")
    waiting = Bench(SHAPES["tinyllama"], "cuda", "bfloat16", 0)
    keep([waiting.row(name, None, "") for name in ON_A_GPU], arguments.out)
    failed = False
    for shape in arguments.shapes:
        for part in arguments.only or (list(PARTS) if arguments.device == "cuda" else list("abcdefg")):
            bench = Bench(
                SHAPES[shape], arguments.device, arguments.dtype, arguments.pairs, flags=tuple(arguments.flags)
            )
            if part == "e" and shape != arguments.shapes[0]:
                continue  # the QP knows nothing of shapes
            try:
                PARTS[part](bench)
            except ImportError as error:
                print(f"{part}: not measured, {error}; pip install -r requirements-bench.txt")
            except Exception as error:  # a peer may fail as it likes; the other parts go on
                print(f"{part}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
            keep(bench.rows, arguments.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
