"""Prompts: rows of HH-RLHF, TRL or GSM8K become what the policy reads, and are shared out among clients.

A row of HH-RLHF holds two whole dialogues, `chosen` and `rejected`, that differ in the last reply:

    \\n\\nHuman: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: A joke?\\n\\nAssistant: Knock knock.
    '------------------------- prompt -------------------------' '--- response -'

The prompt is everything up to the last `\\n\\nAssistant:` of `chosen` [code: RiC cuts there; paper: HH-RLHF prompts],
or up to the first of several in a row [ours]. Other forms:

    {"prompt": text}          TRL. A text that begins with "Human:" is a dialogue, any other is one user message
    {"prompt": messages}      TRL. The last message is the user's
    {"messages": messages}    what follows the user's last message is left out
    {"question", "answer"}    GSM8K. QUESTION says how to answer; rewards find the reference in the column `answer`

The policy reads its tokenizer's chat template, or the plain text if there is none. Prompts that are too long are
dropped [code: RiC keeps 8-256 tokens]. Equal prompts are kept once, or one could be held out and trained on [ours].

Left out on purpose: streaming, tool calls, pictures, and prompts that end in the beginning of an answer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from settings import DataSettings

REPLY = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}
SPEAKER = {"system": "\n\n", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}  # of a role, in plain text
REFERENCE = "####"  # stands before the number in GSM8K's answers
QUESTION = "{}\n\nReason step by step, and end with a line of #### and the number that answers the question."
FORMS = '{"prompt": text or messages}, {"messages": messages}, {"chosen": dialogue}, {"question": text, "answer": text}'

Messages = tuple[dict[str, str], ...]  # {"role": …, "content": …} each
Shares = tuple[list[list["Prompt"]], list["Prompt"]]  # the prompts of each client, and the held-out ones


@dataclass(frozen=True)
class Prompt:
    """One prompt in the forms its readers need."""

    text: str  # plain dialogue ending in "\n\nAssistant:", what reward functions receive
    messages: Messages  # the same as chat messages; the last is the user's
    token_ids: tuple[int, ...]  # what the policy reads
    subset: str  # the row's column `subset`, else named after its file (subset_of)
    columns: dict  # the row's other columns, which reward functions get by keyword; None if the row lacks one
    file: str = ""  # that the row is from

    @property
    def task(self) -> str:
        """The row's column `task`, or "all" if it has none."""
        return text_of(self.columns.get("task")) or "all"

    def owner(self, split: str) -> str | None:
        """What `--split` tells clients apart by: the file, the subset, or the value in a column; None without one."""
        return {"files": self.file, "subset": self.subset}.get(split) or text_of(self.columns.get(split))


def text_of(value: object) -> str | None:
    """A column's value as a text; None for a gap. Pandas writes the integers of a column with gaps as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value in (None, "") or value != value else str(value)  # NaN differs from itself


def split_dialogue(text: str) -> tuple[str, str]:
    """A dialogue cut into (prompt, response). Raises ValueError if the assistant answers nobody."""
    text = re.sub(r"^\s*(?=(Human|Assistant):)", "\n\n", text)
    turns, reply = list(MARKER.finditer(text)), None
    while turns and turns[-1][1] == "Human":  # asked after the last reply
        turns.pop()
    while turns and turns[-1][1] == "Assistant":
        reply = turns.pop()
    if reply is None or not text[: reply.start()].strip():
        raise ValueError(f"no {REPLY!r} answers anybody in the dialogue, so it holds no prompt")
    return text[: reply.end()], text[reply.end() :]


def to_messages(prompt: str) -> Messages:
    """A plain dialogue as chat messages; text before the first marker is the user's, empty turns stay.

    Consecutive turns of one speaker become one message, since many templates insist on alternation.
    """
    lead, *turns = MARKER.split(prompt.removesuffix(REPLY))
    messages = [{"role": "user", "content": lead.strip()}] if lead.strip() else []
    for speaker, content in zip(turns[0::2], turns[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLE[speaker]:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
        else:
            messages.append({"role": ROLE[speaker], "content": content.strip()})
    return tuple(messages)


def from_text(prompt: str) -> tuple[str, Messages]:
    """TRL's `prompt` as a text, with or without a last "\\n\\nAssistant:"."""
    text = f"\n\n{prompt.strip()}".removesuffix(REPLY).strip()
    one_message = [{"role": "user", "content": text}]  # even if it quotes a dialogue
    return from_chat(to_messages(f"\n\n{text}") if text.startswith("Human:") else one_message)


def from_chat(chat: Sequence) -> tuple[str, Messages]:
    """TRL's `prompt` as messages."""
    messages = plain_messages(chat)
    role, content = messages[-1].values()
    if role != "user":
        raise ValueError(f"the prompt must end with a user message, not with the {role}'s {content!r:.40}")
    text = "".join(SPEAKER[message["role"]] + message["content"] for message in messages) + REPLY
    return text.removeprefix(SPEAKER["system"]) if messages[0]["role"] == "system" else text, messages


def from_messages(chat: Sequence) -> tuple[str, Messages]:
    """The messages of a whole chat, up to the user's last."""
    users = [i for i, message in enumerate(plain_messages(chat), start=1) if message["role"] == "user"]
    return from_chat(chat[: users[-1]] if users else chat)


def plain_messages(chat: Sequence) -> Messages:
    """Role and text of each message. Raises ValueError for a message that is less than that, or more."""
    for message in chat:
        match message:
            case {"role": "system" | "user" | "assistant", "content": str(text)} if text.strip():
                if not message.get("tool_calls"):
                    continue
        raise ValueError(f"a message needs a role of {', '.join(SPEAKER)}, a text, no tool_calls: {message!r:.80}")
    return tuple({"role": message["role"], "content": message["content"]} for message in chat)


def from_question(question: str, answer: str) -> tuple[str, Messages]:
    """GSM8K. A reward function would find an answer without a number only in mid-training."""
    if not question.strip() or not re.search(rf"{REFERENCE}[^\n]*\d", answer):
        raise ValueError(f"GSM8K's rows hold a question, and an answer that ends in {REFERENCE} and a number")
    return from_text(QUESTION.format(question.strip()))


def dialogue_of(row: dict) -> tuple[str, Messages, dict]:
    """(plain text, messages, other columns) of a row. Raises ValueError for a row of no known form."""
    match row:
        case {"prompt": str(text)} if text.strip():
            dialogue, used = from_text(text), ()
        case {"prompt": [_, *_] as chat}:
            dialogue, used = from_chat(chat), ()
        case {"messages": [_, *_] as chat}:
            dialogue, used = from_messages(chat), ()
        case {"chosen": str(text)}:
            prompt, _ = split_dialogue(text)
            dialogue, used = (prompt, to_messages(prompt)), ("chosen", "rejected")
        case {"question": str(text), "answer": str(answer)}:
            dialogue, used = from_question(text, answer), ("question",)
        case _:
            raise ValueError(f"no prompt in the columns {', '.join(map(str, row))}; forms that are read: {FORMS}")
    return *dialogue, {name: value for name, value in row.items() if name not in ("prompt", "messages", *used)}


def subset_of(file: str) -> str:
    """A subset's name: that of its file, or of the folder if the file is named after a split (train, test, …)."""
    path = PurePosixPath(file)
    name = re.sub(r"\.(jsonl|csv|gz)\b", "", path.name)
    return path.parent.name or name if re.fullmatch(r"train\d*|test|valid(ation)?|eval|dev", name) else name


def prompts_from(
    rows: Iterable[tuple[str, dict]], tokenizer, max_tokens: int = 256, context: int | None = None
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of rows ("FILE:LINE", row), in their order, and counts: rows, duplicates, too_long, kept.

    context: tokens that the policy's context leaves for a prompt beside its response (None: any number).
    Raises ValueError, naming FILE:LINE, for a row without a prompt or that the template refuses; and if none is left.
    """
    n_rows, drafts, rendered = 0, {}, []  # drafts: prompts without token ids, by text
    chat, template = bool(tokenizer.chat_template), tokenizer.apply_chat_template
    for where, row in rows:
        n_rows += 1
        try:
            text, messages, columns = dialogue_of(row)
            if text in drafts:
                continue
            rendered.append(template(list(messages), tokenize=False, add_generation_prompt=True) if chat else text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; mend or drop the row") from error
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"{where}: the chat template refuses this dialogue ({error}); drop the row") from error
        file = where.rpartition(":")[0]
        drafts[text] = Prompt(text, messages, (), text_of(row.get("subset")) or subset_of(file), columns, file)
    # A template writes its own special tokens. Plain text gets the tokenizer's, without EOS, since it goes on.
    rendered_ids = tokenizer(rendered, add_special_tokens=not chat, verbose=False)["input_ids"] if rendered else []
    names = {name: None for draft in drafts.values() for name in draft.columns}  # every reward call gets the same ones
    limit = max_tokens if context is None else min(max_tokens, context)
    by_ids = {}  # texts may differ only in what the template or the tokenizer drops
    for draft, ids in zip(drafts.values(), rendered_ids, strict=True):
        ids = tuple(ids[:-1] if not chat and ids[-1:] == [tokenizer.eos_token_id] else ids)
        by_ids.setdefault(ids, replace(draft, token_ids=ids, columns=names | draft.columns))
    prompts = [prompt for ids, prompt in by_ids.items() if len(ids) <= limit]
    if not prompts:
        shortest = f"the shortest has {min(map(len, by_ids), default=0)} tokens, and {limit} fit"
        remedy = "raise max_prompt_tokens" if limit == max_tokens else "lower max_new_tokens"
        raise ValueError(f"prompts: 0 of {n_rows} rows can be used; {shortest}; {remedy} or pass others")
    dropped = {"duplicates": n_rows - len(by_ids), "too_long": len(by_ids) - len(prompts)}
    return prompts, {"rows": n_rows, **dropped, "kept": len(prompts)}


def share_out(prompts: list[Prompt], n_clients: int, settings: DataSettings, seed: int, apart: bool = False) -> Shares:
    """The prompts by `--split`: iid; dirichlet; files, subset or a column's name, which give each value a client.

    apart: the clients are told by their number in a column, and some or all of them are elsewhere.
    Equal arguments give equal results. Raises ValueError for too few prompts or another number of clients.
    """
    n = settings.held_out
    if apart:
        return split_by(settings.split, prompts, n_clients, n, seed, {str(c): [] for c in range(n_clients)})
    if len(prompts) < n + n_clients:
        raise ValueError(f"held_out: {n} and {n_clients} clients need more than {len(prompts)} different prompts")
    if settings.split not in ("iid", "dirichlet"):
        return split_by(settings.split, prompts, n_clients, n, seed)
    train, held_out = hold_out(prompts, [prompt.subset for prompt in prompts], n, seed)
    if settings.split == "dirichlet":
        return split_dirichlet(train, n_clients, settings.dirichlet_alpha, seed), held_out
    order = np.random.default_rng(np.random.SeedSequence([seed, 2])).permutation(len(train)).tolist()
    return [[train[i] for i in order[client::n_clients]] for client in range(n_clients)], held_out


def hold_out(prompts: list[Prompt], kinds: list[str], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held_out): n prompts set aside, of each kind in proportion (largest remainders); held_out is shuffled."""
    sizes = Counter(kinds)
    exact = {kind: n * size / len(prompts) for kind, size in sizes.items()}
    quota = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda kind: quota[kind] - exact[kind])
    for kind in by_remainder[: n - sum(quota.values())]:
        quota[kind] += 1
    held_out = []
    for i in np.random.default_rng(np.random.SeedSequence([seed, 1])).permutation(len(prompts)).tolist():
        if quota[kinds[i]]:
            quota[kinds[i]] -= 1
            held_out.append(i)
    train = sorted(set(range(len(prompts))) - set(held_out))
    return [prompts[i] for i in train], [prompts[i] for i in held_out]


def split_dirichlet(prompts: list[Prompt], n_clients: int, alpha: float, seed: int) -> list[list[Prompt]]:
    """Clients that differ in what they ask, after Hsu, Qi & Brown (2019); sizes are equal within one prompt.

    Client c draws a mixture q_c ~ Dirichlet(α K p) over the K subsets (harmless-base, helpful-base, …), and fills its
    quota from q_c; p holds each subset's share of all prompts. The factor K [ours] makes equal subsets draw from
    Dirichlet(α, …, α), the usual meaning of "Dirichlet α". α → 0 gives each client one subset, α → ∞ gives iid.
    Clients take turns and draw one prompt each. When a subset runs out, every mixture is renormalised over the rest, so
    no one client gets all the leftovers [ours]. In Yurochkin et al. (2019) α also changes how much a client holds.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    pools: dict[str, list[int]] = {subset: [] for subset in sorted({prompt.subset for prompt in prompts})}
    for i in rng.permutation(len(prompts)).tolist():
        pools[prompts[i].subset].append(i)
    left = np.array([len(pool) for pool in pools.values()])  # [subsets]
    concentration = np.maximum(alpha * len(left) * left / len(prompts), 1e-6)  # the draw below allows no zero
    mixtures = rng.dirichlet(concentration, size=n_clients)  # [C, subsets]
    shares: list[list[Prompt]] = [[] for _ in range(n_clients)]
    for turn, u in enumerate(rng.random(len(prompts))):
        client = turn % n_clients
        weight = mixtures[client] * (left > 0)
        if not weight.sum():  # all that this client asks for has been given out
            weight = left.astype(float)
        edges = np.cumsum(weight)
        subset = int(np.searchsorted(edges, u * edges[-1], side="right"))
        left[subset] -= 1
        shares[client].append(prompts[list(pools.values())[subset].pop()])
    return shares


def split_by(
    name: str, prompts: list[Prompt], n_clients: int, n: int, seed: int, apart: dict[str, list[Prompt]] | None = None
) -> Shares:
    """One client for each file, subset, or value of a column, in ascending order, whole numbers first.

    The n held-out prompts come from the rows without a value, each subset in proportion; if all rows have one, every
    client gives in proportion. Raises ValueError for another number of clients, or too little to hold out.
    """
    free = [prompt for prompt in prompts if prompt.owner(name) is None]
    owned, held_out = [prompt for prompt in prompts if prompt.owner(name) is not None], free
    if not free and not apart:
        owned, held_out = hold_out(owned, [prompt.owner(name) for prompt in owned], n, seed)
    elif len(free) > n:
        _, held_out = hold_out(free, [prompt.subset for prompt in free], n, seed)
    shares: dict[str, list[Prompt]] = apart or {}
    for prompt in owned:
        shares.setdefault(prompt.owner(name), []).append(prompt)
    if len(shares) != n_clients:
        choices = ", ".join(["iid, dirichlet, files, subset", *prompts[0].columns])
        raise ValueError(f"split: {len(shares)} clients by {name}, not {n_clients}; set clients, or split by {choices}")
    if len(held_out) < n and not (apart and owned):
        raise ValueError(f"held_out: {n} prompts, but only {len(free)} have no {name}; lower it or pass more")
    owners = sorted(shares, key=lambda owner: (0, int(owner), owner) if owner.isdecimal() else (1, 0, owner))
    return [shares[owner] for owner in owners], held_out


def objectives_of(specs: Sequence[str], names: Sequence[str], tasks: Sequence[str]) -> list[list[int]]:
    """The numbers of every client's objectives, by --client_objectives; tasks: each client's.

    A client goes by its number, else by its task, else it holds all. Raises ValueError for an unclear spec.
    """
    numbers, lists = [str(client) for client in range(len(tasks))], {}
    for spec in specs:
        who, _, listed = spec.rpartition("=")
        chosen = listed.split(",")
        unclear = who in lists or (who in tasks) == (who in numbers)
        if unclear or not set(chosen) <= set(names) or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"client_objectives: {spec!r}; write WHO=NAME,NAME once for a client (0 to {len(tasks) - 1}) "
                f"or a task ({', '.join(sorted(set(tasks)))}), with objectives from {', '.join(names)}"
            )
        lists[who] = [names.index(name) for name in chosen]
    everything = list(range(len(names)))
    held = [lists.get(client, lists.get(task, everything)) for client, task in zip(numbers, tasks, strict=True)]
    if idle := set(everything).difference(*held):
        raise ValueError(f"client_objectives: no client holds {names[min(idle)]}; leave it out of the objectives")
    return held
