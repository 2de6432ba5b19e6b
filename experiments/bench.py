"""Our parts against well-known peers, side by side in one process. [ours]

docs/bench.md has the commands. Weights are random, responses never end early. Ours and the peer run in turn: the
machine's other load falls on both. A ratio is the median over the pairs of the peer's time over ours (ours over the
peer's if the name says "our time /"), with a bootstrapped 95 % interval that holds for one process. A missing peer
leaves out its part only.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers as hf
from torch import nn

import ppo
from app.files import write_text
from app.loading import pretrained
from app.session import Session
from experiments.lab import commit
from rewards import RULES
from sampler import pad_left
from settings import Config
from worlds import tiny_llama

BATCH, RANK, N = 16, 16, 128  # the paper's; N responses of its 8 clients
TWO = ("length", "brevity")  # rewards that cost nothing, for ours and the peers
HH_LENGTHS = ((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (18, 22, 29, 90, 151, 204, 256))  # quantiles of 675 HH-RLHF prompts
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary; clients, L, micro-batch, prompt lengths
    "tiny": ((64, 128, 2, 4, 4, 198), 8, 12, 16, ((0, 1), (9, 14))),
    "stories260k": ((64, 172, 5, 8, 4, 512), 8, 48, 4, HH_LENGTHS),
    "smollm2": ((576, 1536, 30, 9, 3, 49_152), 2, 32, 16, ((0, 1), (64, 64))),
    "tinyllama": ((2048, 5632, 22, 32, 4, 32_000), 8, 128, 4, HH_LENGTHS),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size")  # fmt: skip
RESULTS = Path(__file__).parents[1] / "results" / "bench.json"
Comparison = tuple[str, Callable, Callable, int]  # name; ours; the peer; tokens of a run if the value is a rate


class Bench:
    """Random weights and prompts of one shape, as files in `root`, and what is loaded from them."""

    def __init__(self, shape: str, device: str, dtype: str, root: Path) -> None:
        self.sizes, clients, self.L, micro_batch_size, lengths = SHAPES[shape]
        self.shape, self.device, self.dtype, self.root = shape, device, getattr(torch, dtype), root
        words, rng = range(len(tiny_llama.SPECIAL), self.sizes[-1]), np.random.default_rng(0)
        self.tokenizer = tiny_llama.make_tokenizer([f"w{i}" for i in words])
        self.tokenizer.model_max_length = 2048
        widths = np.interp(rng.random(5 * N), *lengths).round().astype(int) - 3  # the template adds three tokens
        texts = self.tokenizer.batch_decode([rng.choice(words, width) for width in widths])
        rows = [json.dumps({"chosen": f"\n\nHuman: {text}\n\nAssistant: w9"}) + "\n" for text in texts]
        write_text(root / "prompts.jsonl", "".join(rows))
        sizes = dict(zip(SIZES, self.sizes, strict=True)) | {"max_position_embeddings": 2048}
        config = hf.LlamaConfig(**sizes, pad_token_id=0, eos_token_id=2)
        torch.manual_seed(0)
        for part in (hf.LlamaForCausalLM(config).to(self.dtype), self.tokenizer):
            part.save_pretrained(root / "llama")
        self.settings = {"model": f"{root}/llama", "prompts": [f"{root}/prompts.jsonl"], "split": "iid", "held_out": 32}
        self.settings |= {"objectives": [f"rule:{rule}" for rule in TWO], "micro_batch_size": micro_batch_size}
        self.settings |= {"device": device, "dtype": dtype, "max_new_tokens": self.L, "clients": clients}

    def model(self) -> hf.PreTrainedModel:
        """The policy's model as a peer has it."""
        return pretrained("AutoModelForCausalLM", self.settings["model"], self.settings["dtype"], self.device)[0]

    def session(self, **changes) -> Session:
        """Ours: policy and clients, with two rules that cost nothing. Responses do not end before L."""
        session = Session(Config(**self.settings | changes), progress=False)
        session.policy.sampler.eos = session.policy.sampler.eos[:0]
        return session


def with_peft(model: nn.Module) -> nn.Module:
    """The model with PEFT's adapter, of our rank and scale."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def sampler(bench: Bench) -> Iterator[Comparison]:
    """Our sampler against transformers.generate, without and with PEFT's adapter."""
    session, L = bench.session(), bench.L
    prompts = [p.token_ids for share in session.prompts_of for p in share][:N]
    u = np.random.default_rng(1).random((len(prompts), L))
    ours = partial(session.policy.sample, prompts, u)
    config = hf.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=L, min_new_tokens=L, pad_token_id=0)
    ids, mask = pad_left(prompts, 0, bench.device)
    for label, model in (("no", bench.model()), ("PEFT's", with_peft(bench.model()))):
        generate = partial(model.generate, input_ids=ids, attention_mask=mask, generation_config=config)
        yield f"our sampler / generate, {label} adapter there", ours, generate, u.size


def jacobian(bench: Bench) -> Iterator[Comparison]:
    """J on a client's groups of 4: of M objectives in passes of one; a prompt read once against with every response."""
    session = bench.session(advantages="group")
    session.federation.calibrate()
    ((_, batch, _),) = session.federation.batches(session.federation.clients[:1])
    policy, rollout = session.policy, batch.rollout

    def gradients(M: int) -> Callable[[], object]:
        advantages = torch.randn(*rollout.mask.shape, M, device=session.device)
        return partial(ppo.policy_gradients, policy, batch, advantages, session.config)

    for M in (2, 4):
        yield f"J of {M} objectives, our time / one objective's", gradients(M), gradients(1), 0
    plain = patch.object(policy, "shares_prompts", False)(gradients(2))
    yield "J on groups, a prompt read once / with every response", gradients(2), plain, 0


def trl_trainers(bench: Bench) -> Iterator:
    """TRL's GRPO with PEFT's adapter, a trainer per client: 4 prompts × 4 responses, 3 steps on them, equal rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(bench.root), per_device_train_batch_size=BATCH, num_generations=4, num_iterations=3, max_steps=3,
        max_completion_length=bench.L, generation_kwargs={"min_new_tokens": bench.L}, beta=0.04, learning_rate=2e-4,
        use_cpu=bench.device == "cpu", bf16=bench.dtype == torch.bfloat16, report_to="none", top_k=0,
        gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    texts = [[p.text for p in share] for share in bench.session().prompts_of]
    gc.collect()  # the session's model
    for share in texts:
        data, model = Dataset.from_dict({"prompt": share}), with_peft(bench.model())
        trainer = GRPOTrainer(model, [*map(RULES.get, TWO)], config, data, processing_class=bench.tokenizer)
        trainer.remove_callback(hf.PrinterCallback)
        yield trainer


def a_round(bench: Bench) -> Iterator[Comparison]:
    """A round (16 responses a client, 2 objectives, 3 epochs) against TRL's, which is as MORLHF's with groups."""
    trainers, grouped = list(trl_trainers(bench)), {"advantages": "group"}
    methods = {"FIRM": {}, "FIRM with groups": grouped, "MORLHF with groups": grouped | {"method": "morlhf"}}
    for label, changes in methods.items():
        ours, peer = bench.session(**changes).federation.round, lambda: [trainer.train() for trainer in trainers]
        yield f"a round of {label} / TRL's GRPO + PEFT, client by client", ours, peer, 0


PARTS = {"sampler": sampler, "jacobian": jacobian, "round": a_round}


def measured(comparisons: Iterable[Comparison], pairs: int) -> Iterator[dict]:
    """A row per comparison: pairs of runs in turn, after one of each to warm up; the first place alternates."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for name, ours, peer, tokens in comparisons:
        ours(), peer(), wait()
        seconds = np.empty((pairs, 2))
        for i, j in product(range(pairs), (0, 1)):
            side, started = (i + j) % 2, time.perf_counter()
            (ours, peer)[side]()
            wait()
            seconds[i, side] = time.perf_counter() - started
        ratios = seconds[:, 0] / seconds[:, 1] if "our time /" in name else seconds[:, 1] / seconds[:, 0]
        medians = np.median(np.random.default_rng(0).choice(ratios, (2000, pairs)), axis=1)
        value, interval = float(np.median(seconds[:, 0])), np.quantile(medians, [0.025, 0.975]).tolist()
        row = {"name": name, "value": tokens / value if tokens else value, "unit": "tokens/s" if tokens else "s"}
        yield row | {"ratio": float(np.median(ratios)), "interval": interval, "pairs": pairs}


def save(row: dict, out: Path) -> None:
    """Put a row into the list on disk, in place of that of the same device, type and name."""
    present = json.loads(out.read_text("utf-8")) if out.is_file() else []
    table = {(r["device"], r["dtype"], r["name"]): r for r in (*present, row)}
    write_text(out, json.dumps([table[key] for key in sorted(table)], indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=["tiny", "stories260k"], choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="else all")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of runs per comparison")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    about = {"device": chosen.device, "dtype": chosen.dtype, "commit": commit()}
    for shape, part in product(chosen.shapes, chosen.only or PARTS):
        with tempfile.TemporaryDirectory() as root:
            bench = Bench(shape, chosen.device, chosen.dtype, Path(root))
            try:
                for row in measured(PARTS[part](bench), chosen.pairs):
                    save(row | about | {"name": f"{row['name']}, {shape}"}, RESULTS)
                    print(row, flush=True)
            except ImportError as error:
                print(f"{part}: {error}; pip install -r requirements-bench.txt")


if __name__ == "__main__":
    main()
