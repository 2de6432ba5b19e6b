"""Our parts against well-known peers, side by side in one process. [ours]

    pip install -r requirements-bench.txt
    python -m evidence.bench                              # the CPU's two shapes: tiny and stories260k
    python -m evidence.bench --device cuda --dtype bfloat16 --shapes tinyllama
    python -m evidence.bench --only a c --pairs 5         # some parts, in a hurry

Models have random weights of a given shape, built from a config: nothing is downloaded, and time does not depend on
what a weight says (responses are kept from ending early, on both sides). Every comparison runs ours and the peer's in
turn, so that what else the machine does falls on both; the figure is the median of the ratios of the pairs, with a
bootstrapped 95 % interval, which holds for one process (another may allocate its memory otherwise). On shared CPU cores
the ratios mean something and the seconds do not.

Here is how it is measured; what is measured, the parts a to k, is in `comparisons.py`. Rows go to results/bench.json,
where a run replaces those of its own device, type and names.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from app.files import write_text
from app.session import quiet_libraries
from evidence.comparisons import BATCH, CLIENTS, PARTS
from evidence.lab import commit
from lora import LoRAConfig
from rollout import Policy, RolloutConfig

RESULTS = Path(__file__).parents[1] / "results" / "bench.json"
CHAT = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
HH_LENGTHS = ((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (18, 22, 29, 90, 151, 204, 256))  # quantiles of 675 HH-RLHF prompts


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
    "tiny": Shape("tiny", 64, 128, 2, 4, 4, 198, 12, None, ((0, 1), (9, 14))),
    "stories260k": Shape("stories260k", 64, 172, 5, 8, 4, 512, 48, 2),
    "tinyllama": Shape("tinyllama", 2048, 5632, 22, 32, 4, 32_000, 128, 4),
}


@dataclass
class Bench:
    """One shape on one device, and the rows that its comparisons leave."""

    shape: Shape
    device: str
    dtype: str
    pairs: int
    rank: int = 16
    flags: tuple[str, ...] = ()  # of run.py, for parts h and j
    rows: list[dict] = field(default_factory=list)

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """As many words as the vocabulary has; pad and EOS are its first two."""
        words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, self.shape.vocabulary))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

    def model(self) -> transformers.PreTrainedModel:
        """Random weights, the same at every call."""
        s = self.shape
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate,
            num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
            max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        with torch.device(self.device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype)).eval()

    def policy(self, rank: int | None = None) -> Policy:
        """A policy with an adapter away from zero, whose responses never end before L."""
        policy = Policy(self.model(), self.tokenizer(), LoRAConfig(lora_rank=rank or self.rank), RolloutConfig())
        theta = policy.adapter.vector()
        policy.adapter.assign(theta + 0.01 * torch.randn(theta.shape, device=theta.device))
        policy.sampler.eos = policy.sampler.eos[:0]
        return policy

    def prompts(self, n: int) -> list[list[int]]:
        """n prompts of random tokens, of the shape's lengths."""
        rng = np.random.default_rng(0)
        lengths = np.interp(rng.random(n), *self.shape.lengths).round().astype(int)
        return [rng.integers(2, self.shape.vocabulary, length).tolist() for length in lengths]

    def stand_ins(self, root: Path) -> list[str]:
        """The flags that name random weights, written to root, in the place of the files of the tinyllama presets."""
        large = self.shape.name == "tinyllama"  # the two reward models then have GPT-2 large's
        size = {"n_embd": 1280, "n_layer": 36, "n_head": 20} if large else {"n_embd": 32, "n_layer": 2, "n_head": 2}
        tokenizer = self.tokenizer()
        tokenizer.chat_template = CHAT
        self.model().save_pretrained(root / "policy")
        tokenizer.save_pretrained(root / "policy")
        tokenizer.chat_template = None
        objectives = {name: root / name for name in ("helpful", "harmless")}
        for directory in objectives.values():
            config = transformers.GPT2Config(**size, num_labels=1, pad_token_id=0)
            transformers.GPT2ForSequenceClassification(config).to(getattr(torch, self.dtype)).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        with open(root / "prompts.jsonl", "w", encoding="utf-8") as file:
            for ids in self.prompts(5 * CLIENTS * BATCH):
                asked = f"\n\nHuman: {' '.join(f'w{i}' for i in ids[:-1])}\n\nAssistant:"
                file.write(json.dumps({"chosen": asked + " yes", "rejected": asked + " no"}) + "\n")
        return [
            "--model", str(root / "policy"), "--prompts", str(root / "prompts.jsonl"),
            "--objectives", *(f"{name}=hf:{directory}" for name, directory in objectives.items()),
            "--dtype", self.dtype, "--reward_dtype", self.dtype, "--device", self.device,
            "--max_new_tokens", str(self.shape.L), "--held_out", "32", "--eval_samples", "2",
        ]  # fmt: skip

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds of one call, GPU included."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    def compare(
        self, name: str, ours: Callable[[], object], peer: Callable[[], object], unit: str = "s",
        work: float | None = None, pairs: int | None = None, inverse: bool = False,
    ) -> None:  # fmt: skip
        """Pairs of runs in turn, after one of each to warm up, the first place alternating.

        The ratio is peer / ours in time, how many times faster we are; inverse: ours / peer. `work` per run makes a
        rate of the value, in `unit`.
        """
        ours(), peer()
        seconds = {ours: [], peer: []}
        for i in range(pairs or self.pairs):
            for side in (peer, ours) if i % 2 else (ours, peer):
                seconds[side].append(self.clock(side))
        our_seconds, peer_seconds = np.array(list(seconds.values()))
        value = float(np.median(our_seconds))
        ratios = our_seconds / peer_seconds if inverse else peer_seconds / our_seconds
        self.add(name, work / value if work else value, unit, ratios)

    def add(self, name: str, value: float, unit: str, ratios: np.ndarray | None = None) -> None:
        """One row, with the median of the ratios and its interval where there are any."""
        row = {
            "name": f"{name}, {self.shape.name}", "device": self.device, "dtype": self.dtype, "value": value,
            "unit": unit, "ratio": None, "interval": None, "pairs": 0,
        }  # fmt: skip
        text = f"{row['name']:66}{value:>14.4g} {unit:10}"
        if ratios is not None:
            medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
            low, high = np.quantile(medians, [0.025, 0.975]).tolist()
            row |= {"ratio": float(np.median(ratios)), "interval": [low, high], "pairs": len(ratios)}
            text += f"{row['ratio']:>8.3g} ({low:.3g} to {high:.3g}, {len(ratios)} pairs)"
        self.rows.append(row)
        print(text, flush=True)


def keep(rows: list[dict], out: Path) -> None:
    """Puts rows into the list on disk, in place of those of the same name, device and type; each says its commit."""
    key = lambda row: (row["device"], row["dtype"], row["name"])  # noqa: E731
    kept = {key(row): row for row in (json.loads(out.read_text("utf-8")) if out.is_file() else [])}
    kept |= {key(row): row | {"commit": commit()} for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(sorted(kept.values(), key=key), indent=1) + "\n")


def main() -> int:
    """The command line. Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", default=["tiny", "stories260k"], choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="a to k; on a CPU a to g and k")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of runs per comparison")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for ours and the peers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of run.py, for h and j; comes last")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: cuda was asked for, but torch sees no GPU; use --device cpu")
    if options.pairs < 2:
        parser.error("pairs: ask for at least 2")
    torch.set_num_threads(options.threads)
    quiet_libraries()
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    print(f"{hardware}, torch {torch.__version__}, {options.dtype}, {options.threads} CPU thread(s)")
    failed = False
    for shape in options.shapes:
        for part in options.only or (PARTS if options.device == "cuda" else "abcdefgk"):
            if part == "e" and shape != options.shapes[0]:
                continue  # the QP knows nothing of shapes
            bench = Bench(SHAPES[shape], options.device, options.dtype, options.pairs, flags=tuple(options.flags))
            try:
                PARTS[part](bench)
            except ImportError as error:
                print(f"{part}: not measured, {error}; pip install -r requirements-bench.txt")
            except Exception as error:  # a peer may fail as it likes; the other parts go on
                print(f"{part}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
            keep(bench.rows, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
