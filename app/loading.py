"""Checkpoints as others made them: loaded whole, or refused in one line. [ours]"""

from __future__ import annotations

import hashlib
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

if TYPE_CHECKING:  # transformers' models take seconds to import: whoever mistypes a flag need not wait for them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUFFERS = ("masked_bias", "inv_freq")  # that older checkpoints hold and no model reads any more


@contextmanager
def in_one_line(what: str, remedy: str) -> Iterator[None]:
    """Inside, whatever a model's own code raises becomes one line of ValueError: what, the error, a remedy."""
    try:
        yield
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise ValueError(f"{what} ({reason}); {remedy}") from error


def reach_hub(name: str) -> None:
    """Say that a name is looked for on the hub. Where that cannot be reached, its cache alone is asked, at once: its
    client would go on trying for most of a minute, without a word.
    """
    if constants.HF_HUB_OFFLINE:
        return
    print(f"{name} is not here; looking for it on {constants.ENDPOINT}", file=sys.stderr)
    try:
        if not urllib.request.getproxies():  # else only the proxy can be reached
            address = urllib.parse.urlsplit(constants.ENDPOINT)
            socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError as error:
        print(f"it cannot be reached ({error}); only what it gave before is used", file=sys.stderr)
        constants.HF_HUB_OFFLINE = True
        close_session()


@contextmanager
def named(field: str) -> Iterator[None]:
    """Inside, a ValueError gets the name of the setting that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def pretrained(
    kind: str, where: str, what: str, remedy: str, dtype: str = "float32", device: str | torch.device = "cpu",
    new_head: bool = False, **settings: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """A model of transformers' class `kind` and its tokenizer, with dropout set to zero; `what` a reader would call it.

    where: a directory or a hub name; remedy: what to do where it is none; new_head: whether all but the body may be
    fresh, a pooler too; settings: of its config. Raises ValueError for a checkpoint that is missing or damaged, that
    holds other weights than its config says, or weights that are not finite.
    """
    import transformers

    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise ValueError(f"{where} cannot be loaded (it holds no config.json); {remedy}")
    if not Path(where).is_dir():
        reach_hub(where)
    with in_one_line(f"{where} cannot be loaded or downloaded", remedy):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        config = transformers.AutoConfig.from_pretrained(where, **settings)
        for part in (config, config.get_text_config(decoder=True)):  # the latter is a part of models that see or hear
            for key in vars(part):
                if "drop" in key and isinstance(getattr(part, key), float):
                    setattr(part, key, 0.0)
        model, info = getattr(transformers, kind).from_pretrained(
            where, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    lacks, odd = set(info["missing_keys"]), {key for key in info["unexpected_keys"] if not key.endswith(BUFFERS)}
    if new_head:
        body = "" if model.base_model is model else f"{model.base_model_prefix}."
        lacks, odd = {key for key in lacks if key.startswith(body) and "pooler" not in key}, set()
    for names, fault in ((lacks, "lacks"), (odd, "holds, beyond what its config says,")):
        if names:
            raise ValueError(f"{where} is no {what}: it {fault} {min(names)}; {remedy}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{where} is no {what}: {name} is not finite; {remedy}")
    return model.to(device), tokenizer


def check_ids(texts: Iterable[Sequence[int]], model: PreTrainedModel) -> None:
    """Raise ValueError where tokenised texts have ids that the model does not embed."""
    words, largest = model.get_input_embeddings().num_embeddings, max((max(ids, default=0) for ids in texts), default=0)
    if largest >= words:
        raise ValueError(f"its tokenizer made the id {largest}, and it embeds {words}; use its own tokenizer")


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of named weights, from the sums of their bits: the same on every device."""
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16)
        digest.update(f"{name} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()
