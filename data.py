"""Prompts: files of HH-RLHF, GSM8K or TRL's forms become what the policy reads, and are shared out among clients.

A row of HH-RLHF holds two whole dialogues, `chosen` and `rejected`, that differ in the last reply:

    \\n\\nHuman: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: A joke?\\n\\nAssistant: Knock knock.
    '------------------------- prompt -------------------------' '--- response -'

**The prompt** is everything up to the last `\\n\\nAssistant:` of `chosen` [code: RiC cuts there; paper: HH-RLHF
prompts]. Where the assistant speaks several times in a row, its reply starts at the first of those markers, so
that a prompt always ends by asking [ours]. The policy reads it through its tokenizer's chat template, or, where
there is none, as the plain text above. Prompts too short or too long are dropped and counted [code: RiC keeps
8-256 tokens]; equal prompts are kept once, so that no held-out prompt sits in a client's data too [ours].

A row of GSM8K holds a `question`, and an `answer` that ends in `#### ` and the number. Its prompt is the question in
`question_template`; what checks a response reads the `answer` from the columns (worlds/gsm8k.py).

Rows of TRL's forms hold a `prompt`, a text or chat messages, or `messages`, whose last reply is left out. Messages
reach the chat template as they are, a system's too. A text that begins with `Human:` is a dialogue; any other is one
message of the user's, whatever it quotes, without a last `\\n\\nAssistant:`. [ours]

**Clients.** Any column may say whose a row is (`--split COLUMN`; natural is the column `client`), or its file or subset
(`files`, `subset`). Rows without a value are what is held out from; where there are none, every client gives its share.
`iid` deals the shuffled prompts out like cards. `dirichlet` makes clients differ in what they ask,
after Hsu, Qi & Brown (2019): client c draws a mixture q_c ~ Dirichlet(α K p) over the K subsets (harmless-base,
helpful-base, …), p being each subset's share of all prompts, and fills its quota from it. The factor K [ours] makes
equal subsets draw from Dirichlet(α, …, α), what "Dirichlet α" mostly means. α → 0 gives each client one subset until
that runs out, α → ∞ gives iid. Client sizes stay equal within one prompt, unlike in the other usual recipe (Yurochkin
et al. 2019: each subset is cut into Dirichlet shares), so that α changes what clients hold and not how much. Clients
take turns drawing one prompt each, without replacement; when a subset runs out, everybody's mixture is renormalised
over the rest, so that no one client gets the leftovers, and a client whose subsets are all gone draws from what is
left [ours].

Left out on purpose: streaming (all prompts fit in memory), other formats.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from huggingface_hub import hf_hub_download
from jinja2 import TemplateError

from app.fields import Checked, Count, Positive, setting
from app.loading import reach_hub

REPLY = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}
REFERENCE = "####"  # stands before the number in GSM8K's answers
SPEAKER = {"system": "\n\n", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}  # in plain text
PROMPT_NAMES = ("instruction", "query", "input", "text")  # what a column that is a prompt may be called


@dataclass
class DataConfig(Checked):
    """Which prompts, and how clients share them. Raises ValueError naming the field that is wrong."""

    prompts: list[str] = setting(
        [],
        "files (.jsonl or .jsonl.gz) with rows of HH-RLHF, GSM8K or TRL (prompt, messages): local paths, or files of a "
        "hub dataset as OWNER/REPO/path/in/repo.jsonl.gz",
    )
    question_template: str = setting(
        "{question}\n\nReason step by step, and end with a line of #### and the number that answers the question.",
        "what a GSM8K question is asked with",
    )
    held_out: Count = setting(128, "prompts that no client trains on, for evaluation")
    min_prompt_tokens: Count = setting(1, "drop prompts shorter than this")
    max_prompt_tokens: Count = setting(256, "drop prompts longer than this")
    split: str = setting(
        "dirichlet", "how clients share the prompts: iid, at random; dirichlet, unequal over subsets; files, subset or "
        "the name of a column, a client for each value; natural, the column client"
    )  # fmt: skip
    dirichlet_alpha: Positive = setting(1.0, "split=dirichlet: small = each client sees one subset, large = iid")

    def __post_init__(self):
        super().__post_init__()
        low, high = self.min_prompt_tokens, self.max_prompt_tokens
        if high < low:
            raise ValueError(f"max_prompt_tokens: {high} must be at least min_prompt_tokens, {low}")
        if "{question}" not in self.question_template:
            raise ValueError("question_template: it must hold {question}, where the question goes")


@dataclass(frozen=True)
class Prompt:
    """One prompt in the forms its readers need."""

    text: str  # plain dialogue ending in "\n\nAssistant:", what reward functions receive
    messages: tuple[dict, ...]  # the same as chat messages; the last is the user's
    rendered: str  # what the policy reads
    token_ids: tuple[int, ...]  # `rendered`, tokenized
    subset: str  # where it is from: the row's "subset", else the name of its file (see subset_of)
    columns: dict  # the rows' other columns, given to reward functions by keyword; None where a row lacks one
    file: str = ""  # as --prompts names it

    @property
    def task(self) -> str:
        """Which task it belongs to: the row's "task", or "all" where the data names none."""
        return "all" if (task := self.columns.get("task")) is None else str(task)

    def owner(self, split: str) -> Any:
        """What --split tells clients apart by: its file, its subset, its value in a column. None where it has none."""
        if split in ("files", "subset"):
            return self.file if split == "files" else self.subset
        value = self.columns.get("client" if split == "natural" else split)
        if isinstance(value, float) and value.is_integer():  # as pandas writes integers in a column with gaps
            return int(value)
        return None if value == "" else value


def locate(file: str) -> Path:
    """The local path of a file, fetched from the hub (a dataset repository) where it is not here.

    Raises ValueError if it is neither a local file nor one that the hub hands out.
    """
    if Path(file).is_file():
        return Path(file)
    if Path(file).is_dir():
        raise ValueError(f"{file} is a directory: name the .jsonl or .jsonl.gz files in it")
    parts = file.split("/")
    if len(parts) < 3 or {"", ".", "..", "~"} & set(parts) or Path(parts[0]).is_dir():
        raise ValueError(f"{file}: no such file; pass an existing .jsonl or .jsonl.gz file")
    reach_hub(file)
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"{file}: not a local file, and the hub gives none ({reason}); pass the path of a local copy"
        ) from error


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unzipped where it begins as gzip does, whatever its name."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped or path.suffix == ".gz" else open(path, "rb")


def read_rows(file: str, fields: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE:LINE", row) for every row of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises ValueError, naming file and line, for what cannot be read or lacks one of `fields` as a string.
    """
    path, number = locate(file), 0
    try:
        with opened(path) as lines:  # decoded line by line, to name it
            for raw in lines:
                line = raw.decode("utf-8-sig" if number == 0 else "utf-8")
                number += 1
                where = f"{file}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if "\\u" in line:
                        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half of a pair of surrogates is no text
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: malformed JSON ({error.msg}); expected an object a line") from error
                except RecursionError as error:
                    raise ValueError(f"{where}: nested too deep; expected a plain object") from error
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"{where}: a lone surrogate, {error.object[error.start]!r}; drop the row"
                    ) from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
                for name in fields:
                    if not isinstance(row.get(name), str):
                        raise ValueError(f"{where}: no text in {name!r}; HH-RLHF rows hold a dialogue there")
                yield where, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}:{number + 1}: not in UTF-8 ({error}); convert it to JSON lines in UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}:{number + 1}: damaged or cut short ({error}); fetch the file again") from error
    except PermissionError as error:
        raise ValueError(f"{file}: may not be read; check its permissions") from error


def dialogue_of(row: dict, template: str, where: str) -> tuple[str, tuple[dict, ...], dict]:
    """A row's prompt as a plain dialogue ending in "\\n\\nAssistant:" and as chat messages, and its other columns.

    Raises ValueError, naming file and line, for a row of no known form, with the nearest one.
    """
    without = lambda *names: {k: v for k, v in row.items() if k not in ("prompt", "messages", *names)}  # noqa: E731
    for name in ("prompt", "messages"):
        if isinstance(row.get(name), list):
            messages = messages_of(row[name], f"{where}: in {name!r}")
            text = "".join(SPEAKER[m["role"]] + m["content"] for m in messages) + REPLY
            if messages[0]["role"] == "system":
                text = text.removeprefix(SPEAKER["system"])
            return text, messages, without()
    text = row["prompt"].strip() if isinstance(row.get("prompt"), str) else ""
    if text := f"\n\n{text}".removesuffix(REPLY).strip():
        if not text.startswith("Human:"):  # no dialogue, whatever it quotes
            return f"\n\nHuman: {text}{REPLY}", ({"role": "user", "content": text},), without()
        text, _ = split_dialogue(text + REPLY)
        if (messages := to_messages(text))[-1]["content"]:
            return text, messages, without()
    if "question" in row and "chosen" not in row:
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("question", "answer")):
            raise ValueError(
                f"{where}: no text in 'question' or 'answer'; GSM8K rows hold both, a question alone is a 'prompt'"
            )
        if not re.search(rf"{REFERENCE}[^\n]*\d", row["answer"]):
            raise ValueError(f"{where}: no {REFERENCE} and number in 'answer', in which GSM8K's answers end")
        text = f"\n\nHuman: {template.replace('{question}', row['question'].strip())}{REPLY}"
        return text, to_messages(text), without("question")
    if not isinstance(row.get("chosen"), str):
        if isinstance(row.get("prompt"), str):
            raise ValueError(f"{where}: 'prompt' asks nothing; drop the row")
        texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
        lists = [
            name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        near = next((name for name in PROMPT_NAMES if name in texts), texts[0] if texts else None)
        old, new = (lists[0], "messages") if lists else (near, "prompt")
        raise ValueError(
            f"{where}: no prompt in a row of {', '.join(map(repr, row)) or 'no columns'}; write "
            '{"prompt": "How are you?"}' + (f", as by renaming {old!r} to {new!r}" if old else "")
        )
    try:
        text, _ = split_dialogue(row["chosen"])
    except ValueError as error:
        raise ValueError(f"{where}: in 'chosen', {error}") from error
    return text, to_messages(text), without("chosen", "rejected")


def messages_of(found: list, where: str) -> tuple[dict, ...]:
    """Chat messages up to the user's last. Raises ValueError for anything but roles and texts, or without a user."""
    messages = [{key: m.get(key) if isinstance(m, dict) else None for key in ("role", "content")} for m in found]
    if not all(isinstance(m["content"], str) and m["role"] in [*SPEAKER] for m in messages):
        raise ValueError(f"{where}: a message is no role (system, user, assistant) with a text as its content")
    while messages and (messages[-1]["role"] != "user" or not messages[-1]["content"].strip()):
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: no message of the user's says anything, so there is nothing to answer")
    return tuple(messages)


def split_dialogue(text: str) -> tuple[str, str]:
    """A dialogue cut into (prompt ending in "\\n\\nAssistant:", response), as the module docstring says.

    Raises ValueError where no assistant turn answers somebody.
    """
    if text.lstrip().startswith(("Human:", "Assistant:")):
        text = "\n\n" + text.lstrip()
    markers = list(MARKER.finditer(text))
    while markers and markers[-1][1] == "Human":  # asked after the last reply
        markers.pop()
    if not markers:
        raise ValueError(f"there is no {REPLY!r} turn to tell where the prompt ends")
    while markers and markers[-1][1] == "Assistant":
        reply = markers.pop()
    if not markers and not text[: reply.start()].strip():
        raise ValueError(f"nobody speaks before the first {REPLY!r}: there is no prompt")
    return text[: reply.end()], text[reply.end() :]


def to_messages(prompt: str) -> tuple[dict, ...]:
    """A plain dialogue as chat messages. Consecutive turns of one speaker become one message (many templates
    insist on alternation); text before the first marker counts as the user's; empty turns stay, as "".
    """
    lead, *turns = MARKER.split(prompt.removesuffix(REPLY))
    messages = [{"role": "user", "content": lead.strip()}] if lead.strip() else []
    for speaker, content in zip(turns[0::2], turns[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLE[speaker]:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
        else:
            messages.append({"role": ROLE[speaker], "content": content.strip()})
    return tuple(messages)


def subset_of(file: str) -> str:
    """What a file holds, by its name: "harmless-base" for .../harmless-base/train.jsonl.gz, "own" for .../own.jsonl.

    A split's name (train, test, …) says nothing about the content, so the folder's stands in for it.
    """
    path = PurePosixPath(file.replace("\\", "/"))
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return path.parent.name or name if re.fullmatch(r"train\d*|test|valid(ation)?|eval|dev", name) else name


def load_prompts(
    files: list[str], tokenizer, min_tokens: int = 1, max_tokens: int = 256, context_room: int | None = None,
    template: str = "{question}",
) -> tuple[list[Prompt], dict[str, int]]:  # fmt: skip
    """Reads, deduplicates, renders, tokenizes and filters prompts; template: what a GSM8K question is asked with.

    context_room: tokens that the policy's context leaves for a prompt, a limit beside max_tokens (None: no limit).
    Returns the prompts kept, in file order, and counts: rows, duplicates, too_short, too_long, kept.
    Raises ValueError (with file and line where there is one) for unreadable input, or when nothing is kept.
    """
    if not files:
        raise ValueError("prompts names no file: pass at least one .jsonl or .jsonl.gz file")
    counts = dict.fromkeys(("rows", "duplicates", "too_short", "too_long", "kept"), 0)
    found: dict[str, tuple] = {}
    for file in files:
        for where, row in read_rows(file):
            counts["rows"] += 1
            text, messages, columns = dialogue_of(row, template, where)
            if text in found:
                counts["duplicates"] += 1
                continue
            rendered = _render(tokenizer, messages, where) if tokenizer.chat_template else text
            subset = subset_of(file) if (named := row.get("subset")) is None else str(named)
            found[text] = (messages, rendered, subset, columns, file)
    names = {name: None for *_, columns, _ in found.values() for name in columns}
    for *_, columns, _ in found.values():  # so that every call of a reward function gets the same ones
        columns |= {name: None for name in names if name not in columns}
    limit = max_tokens if context_room is None else min(max_tokens, context_room)
    all_ids = _tokenize(tokenizer, [rendered for _, rendered, *_ in found.values()])
    prompts = []
    read = set()
    for token_ids, (text, (messages, rendered, *others)) in zip(all_ids, found.items(), strict=True):
        if token_ids in read:  # texts that differ only in what the template or the tokenizer drops
            counts["duplicates"] += 1
        elif len(token_ids) < min_tokens:
            counts["too_short"] += 1
        elif len(token_ids) > limit:
            counts["too_long"] += 1
        else:
            prompts.append(Prompt(text, messages, rendered, token_ids, *others))
        read.add(token_ids)
    counts["kept"] = len(prompts)
    if not prompts:
        raise ValueError(_nothing_left(counts, [len(ids) for ids in all_ids], min_tokens, max_tokens, limit))
    return prompts, counts


def _render(tokenizer, messages: tuple[dict, ...], where: str) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where}: the chat template refuses this dialogue ({error}); drop the row") from error


def _tokenize(tokenizer, rendered: list[str]) -> list[tuple[int, ...]]:
    """A template writes its own special tokens; plain text gets the tokenizer's, but no EOS: it goes on."""
    if not rendered:
        return []
    plain = not tokenizer.chat_template
    rows = tokenizer(rendered, add_special_tokens=plain, verbose=False)["input_ids"]
    for ids in rows if plain else []:
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
    return [tuple(ids) for ids in rows]


def _nothing_left(counts: dict, lengths: list[int], min_tokens: int, max_tokens: int, limit: int) -> str:
    reasons = []
    if counts["too_long"]:
        remedy = f"raise max_prompt_tokens ({max_tokens})"
        if limit < max_tokens:
            remedy = "the context has no room for more, ask for shorter responses"
        reasons.append(f"{counts['too_long']} have more than {limit} tokens (shortest: {min(lengths)}): {remedy}")
    if counts["too_short"]:
        remedy = f"lower min_prompt_tokens ({min_tokens})"
        reasons.append(f"{counts['too_short']} have too few tokens (longest: {max(lengths)}): {remedy}")
    return f"prompts: none is left of {counts['rows']} rows; " + ("; ".join(reasons) or "pass files that hold some")


def split_held_out(
    prompts: list[Prompt], n: int, seed: int, kind: Callable[[Prompt], Any] = lambda prompt: prompt.subset
) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held_out): n prompts set aside, of each kind in proportion to its size (largest remainders).

    held_out comes shuffled, train in its old order; equal arguments give equal results.
    Raises ValueError if nothing would be left to train on.
    """
    if len(prompts) <= n:
        raise ValueError(f"held_out is {n}, but there are only {len(prompts)} prompts: lower it or pass more")
    sizes = Counter(map(kind, prompts))
    exact = {subset: n * size / len(prompts) for subset, size in sizes.items()}
    quota = {subset: int(share) for subset, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda subset: quota[subset] - exact[subset])
    for subset in by_remainder[: n - sum(quota.values())]:
        quota[subset] += 1
    held_out = []
    for i in np.random.default_rng(np.random.SeedSequence([seed, 1])).permutation(len(prompts)).tolist():
        if quota[kind(prompts[i])]:
            quota[kind(prompts[i])] -= 1
            held_out.append(i)
    train = sorted(set(range(len(prompts))) - set(held_out))
    return [prompts[i] for i in train], [prompts[i] for i in held_out]


def share_out(
    prompts: list[Prompt], clients: int, config: DataConfig, seed: int
) -> tuple[list[list[Prompt]], list[Prompt]]:
    """(each client's prompts, held-out prompts), as the settings say. Raises ValueError where there are too few."""
    if config.split not in ("iid", "dirichlet"):
        return split_by(config.split, prompts, clients, config.held_out, seed)
    train, held_out = split_held_out(prompts, config.held_out, seed)
    return split_clients(train, clients, config.split, config.dirichlet_alpha, seed), held_out


def split_by(
    name: str, prompts: list[Prompt], clients: int, n: int, seed: int
) -> tuple[list[list[Prompt]], list[Prompt]]:
    """(shares, held_out): a client for each file, subset, or value of a column, in ascending order of it. The n
    held-out prompts are drawn from those without a value, each subset in proportion, or else from all clients alike.

    Raises ValueError where there is no such column, or another number of clients.
    """
    column = "client" if name == "natural" else name
    own = lambda prompt: prompt.owner(name)  # noqa: E731
    odd = next((own(p) for p in prompts if isinstance(own(p), (bool, float, list, dict))), None)
    if odd is not None:
        raise ValueError(f"split: a row's {column} is {odd!r}; a client needs a number or a name there")
    owned, free = [p for p in prompts if own(p) is not None], [p for p in prompts if own(p) is None]
    owners = sorted({own(p) for p in owned}, key=lambda owner: (isinstance(owner, str), owner))  # numbers first
    if not owners:
        columns = sorted({name for p in prompts for name in p.columns})
        raise ValueError(
            f"split: no row has a {column!r}; choose iid, dirichlet, files, subset"
            + (f" or a column ({', '.join(columns)})" if columns else "")
        )
    if len(owners) != clients:
        raise ValueError(
            f"clients: by {column} there are {len(owners)}, not {clients}; add --clients {len(owners)} (a duplicate "
            "counts for the first one that has it, a prompt that is too long for nobody)"
        )
    if free and len(free) < n:
        raise ValueError(f"held_out is {n}, but only {len(free)} prompts have no {column}: lower it or pass more")
    if free:
        held_out = split_held_out(free, n, seed)[1] if len(free) > n else free
    else:
        owned, held_out = split_held_out(owned, n, seed, own)
    shares = {owner: [] for owner in owners}
    for prompt in owned:
        shares[own(prompt)].append(prompt)
    if empty := [str(owner) for owner, share in shares.items() if not share]:
        raise ValueError(f"held_out: {n} leaves client {empty[0]} no prompt; lower it")
    return list(shares.values()), held_out


def split_clients(
    prompts: list[Prompt], clients: int, split: str = "dirichlet", alpha: float = 1.0, seed: int = 0
) -> list[list[Prompt]]:
    """Shares prompts out: each to exactly one client, sizes equal within one prompt; see the module docstring.

    Raises ValueError for fewer prompts than clients.
    """
    if not 1 <= clients <= len(prompts):
        raise ValueError(f"clients is {clients}: it must be from 1 to the number of prompts, {len(prompts)}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    order = rng.permutation(len(prompts)).tolist()
    if split == "iid":
        return [[prompts[i] for i in order[c::clients]] for c in range(clients)]

    pools: dict[str, list[int]] = {subset: [] for subset in sorted({prompt.subset for prompt in prompts})}
    for i in order:
        pools[prompts[i].subset].append(i)
    left = np.array([len(pool) for pool in pools.values()])  # [subsets]
    concentration = np.maximum(alpha * len(left) * left / len(prompts), 1e-6)  # the draw below allows no zero
    mixtures = rng.dirichlet(concentration, size=clients)  # [C, subsets]
    shares: list[list[Prompt]] = [[] for _ in range(clients)]
    for turn, u in enumerate(rng.random(len(prompts))):
        client = turn % clients
        weight = mixtures[client] * (left > 0)
        if not weight.sum():  # all that this client asks for has been given out
            weight = left.astype(float)
        edges = np.cumsum(weight)
        subset = int(np.searchsorted(edges, u * edges[-1], side="right"))
        left[subset] -= 1
        shares[client].append(prompts[list(pools.values())[subset].pop()])
    return shares
