"""What the embedded worlds share: a tiny Llama, its word-level tokenizer, its pre-training, and the cache. [ours]"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]  # token ids 0 to 5
SUMS = ".sums.json"  # of a cache entry's files
MAX_LENGTH = 128  # positions the model knows
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<assistant> {{ message['content'] }}{{ eos_token }}{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(words: Sequence[str]):
    """A word-level `PreTrainedTokenizerFast` with a chat template; words are what white space parts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE, padding_side="left", model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer):
    """A Llama of 0.1 M parameters, its weights drawn from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, **special,
        initializer_range=0.1,  # Llama's 0.02 is for wider models; this one learns faster from here
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(
    words: Sequence[str], pairs: Sequence[tuple[str, str]], batch_size: int, lr: float, seed: int, progress: bool = True
):
    """Train the model on (question, reply) pairs, each once, next-word loss on the replies; returns (model, tokenizer).

    lr is the peak of a one-cycle schedule that ends at zero. One thread, so that the weights do not depend on how many
    there are; torch's global generator is left as found.
    """
    import torch
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer, steps = make_tokenizer(words), len(pairs) // batch_size
    texts = [f"<bos> <user> {question} <assistant> {answer} <eos>" for question, answer in pairs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for step in tqdm(range(steps), "pre-training the embedded world, once", leave=False, disable=not progress):
        batch = texts[step * batch_size : (step + 1) * batch_size]
        encoded = tokenizer(batch, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        tokens, mask = encoded.input_ids, encoded.attention_mask.bool()  # [B, T]
        replied = (tokens == tokenizer.convert_tokens_to_ids("<assistant>")).cumsum(1)[:, :-1].bool()  # [B, T - 1]
        scored = replied & mask[:, 1:]  # does position t predict a word of the reply?
        hidden = model.model(tokens).last_hidden_state[:, :-1]  # padding is on the right: never attended to
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), tokens[:, 1:][scored])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return model.eval(), tokenizer


def cached(make: Callable[[Path], None], world: str, settings: dict, cache_dir: Path | None = None) -> Path:
    """The directory that `make` fills: from the cache, or made now.

    The cache (default: `firm-toy` in $XDG_CACHE_HOME or ~/.cache) is keyed by the settings, the files of the world and
    this one, and the libraries' versions. A new entry is made aside and renamed when complete: of two processes one
    wins, both go on. A damaged entry is made anew. Raises ValueError where the cache cannot be written.
    """
    import torch
    import transformers

    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firm-toy")
    sources = [Path(file).read_text("utf-8") for file in (world, __file__)]
    key = json.dumps([settings, torch.__version__, transformers.__version__, *sources])
    entry = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    if entry.is_dir() and not whole(entry):
        print(f"note: {entry} is damaged and made anew")
        shutil.rmtree(entry, ignore_errors=True)
    if not entry.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as aside:
                made = Path(aside, "made")
                made.mkdir()
                make(made)
                (made / SUMS).write_text(json.dumps(sums(made)), "utf-8")
                made.rename(entry)
        except OSError as error:
            if not entry.is_dir():  # else another process was faster, and its entry is the same
                raise ValueError(f"cannot write the cache {root} ({error.strerror}): set XDG_CACHE_HOME") from error
    return entry


def sums(directory: Path) -> dict[str, str]:
    """The checksums of all files in a directory but the list of them."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != SUMS)
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def whole(entry: Path) -> bool:
    """Whether an entry of the cache is as it was made."""
    try:
        return json.loads((entry / SUMS).read_text("utf-8")) == sums(entry)
    except (OSError, ValueError):
        return False
