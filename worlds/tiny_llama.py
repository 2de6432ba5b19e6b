"""What the embedded worlds share: a tiny Llama, its word-level tokenizer, its pre-training, and the cache. [ours]"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]  # token ids 0 to 5
MAX_LENGTH = 128  # positions the model knows
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<assistant> {{ message['content'] }}{{ eos_token }}{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(words: Sequence[str]) -> "transformers.PreTrainedTokenizerFast":
    """A word-level tokenizer with a chat template; white space parts words."""
    ids = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], chat_template=CHAT_TEMPLATE, padding_side="left",
        model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: "transformers.PreTrainedTokenizerFast") -> "transformers.LlamaForCausalLM":
    """A Llama of 0.1 M parameters, its weights drawn from torch's global generator."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1,  # Llama's 0.02 is for wider models; this one learns faster from here
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pretrain(words: list[str], pairs: list[tuple], batch_size: int, lr: float, seed: int, progress: Callable = iter):
    """A fresh (model, tokenizer), trained once on each (question, reply) by the next-word loss on the reply.

    lr is the peak of a one-cycle schedule that ends at zero. `progress` may show the steps, as tqdm does. One thread
    trains, or the weights would depend on the number of threads.
    """
    tokenizer = make_tokenizer(words)
    texts = [f"<bos> <user> {question} <assistant> {answer} <eos>" for question, answer in pairs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, len(texts) // batch_size, pct_start=0.1)
    for start in progress(range(0, len(texts), batch_size)):
        batch = texts[start : start + batch_size]
        encoded = tokenizer(batch, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        tokens = encoded.input_ids  # [B, T]
        replied = (tokens == tokenizer.convert_tokens_to_ids("<assistant>")).cumsum(1)[:, :-1].bool()  # [B, T - 1]
        scored = replied & encoded.attention_mask[:, 1:].bool()  # does position t predict a word of the reply?
        hidden = model.model(tokens).last_hidden_state[:, :-1]  # padding is on the right: never attended to
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), tokens[:, 1:][scored])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return model.eval(), tokenizer


def saved(contents: Mapping[str, Callable], source: str, settings: dict, cache_dir: Path | None = None) -> Path:
    """The directory with NAME/, the checkpoint of a (model, tokenizer), or NAME.jsonl, of rows; see `cached`."""

    def fill(directory: Path) -> None:
        for name, make in contents.items():
            if isinstance(content := make(), tuple):
                for part in content:
                    part.should_save_on_this_rank = lambda _: True  # transformers writes on one of all machines
                    part.save_pretrained(directory / name)
            else:
                (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")

    return cached(fill, source, settings, cache_dir)


def cached(fill: Callable[[Path], None], source: str, settings: dict, cache_dir: Path | None = None) -> Path:
    """The directory that `fill` writes: from the cache, by default `firm-toy` in $XDG_CACHE_HOME or ~/.cache, or new.

    Its key: the settings, the files `source` and this one, and the libraries' versions. A new one is renamed whole.
    """
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firm-toy")
    sources = [Path(file).read_text("utf-8") for file in (source, __file__)]
    key = json.dumps([settings, torch.__version__, transformers.__version__, *sources]).encode()
    entry = root / hashlib.sha256(key).hexdigest()[:16]
    if not entry.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as parent:
            directory = Path(parent, entry.name)
            directory.mkdir()
            fill(directory)
            with contextlib.suppress(OSError):  # another process was faster, and its entry is the same
                directory.rename(entry)
    return entry
