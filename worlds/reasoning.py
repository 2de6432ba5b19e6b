"""The second embedded world: two small tasks whose answers can be checked, and clients that differ. [ours]

    mathematics   what is 3 + 4 - 2 ?        7 , 5 so 5 .         the running values, then the answer
    code          make 14 from 3 4 2 .       3 4 mul 2 add .      a stack program: a number pushes itself, add, sub and
                                                                  mul take two and push one

A problem has two operations (easy) or more (hard: four in mathematics, three in code) on numbers from 1 to 6. A program
may use each given number once at most, in any order, and leaves one value: that which was asked for, if it is right.

The objectives, for a reply of n words:

    accuracy   1 if the answer, or what the program leaves, is the reference answer, else 0
    format     1 if it is a well-made reply, right or wrong, else 0: running values, and the last of them as the answer;
               a program that leaves one value
    length     1 - n / 11, at least 0

They conflict: `so 5 .` is short, but a model that skips the running values is mostly wrong.

A fifth of all sets of numbers is held out: no client and no pre-training sees these numbers, in any order. The
pre-trained model is right one time in three: it skips the running values, stops one operation early, and miscounts.

Eight clients differ by task, by difficulty, and by data: half are careful, half are poor. In a poor client's data a
share of the reference answers, `severity`, is systematically wrong: the value one operation before the end, a slip that
can be learnt. A client's accuracy alone cannot tell hard problems from poor data. The held-out references are right.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from worlds import tiny_llama

MAX_WORDS = 11  # a reply with its EOS is 12 tokens
TASKS = ("mathematics", "code")
SIZES = {("mathematics", "easy"): 2, ("mathematics", "hard"): 4, ("code", "easy"): 2, ("code", "hard"): 3}  # operations
CLIENTS = tuple((*kind, data) for kind, data in product(SIZES, ("careful", "poor")))
HIGHEST = 6  # of the numbers given; what comes out of them is from 0 to LIMIT
LIMIT = 40
OPERATIONS = {"+": int.__add__, "-": int.__sub__}
INSTRUCTIONS = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}
WORDS = ("what", "is", "make", "from", "so", "?", ".", ",")
VOCABULARY = [*WORDS, *OPERATIONS, *INSTRUCTIONS, *map(str, range(LIMIT + 1))]
SKIPS, STOPS_EARLY = 0.3, 0.2  # slips of the pre-training corpus: no running values (mathematics), an operation short
HELD_OUT = 32  # problems of each task and difficulty
PROMPTS = 192  # of each client


@dataclass(frozen=True)
class Problem:
    """Numbers, and the operations between them, from left to right."""

    task: str
    numbers: tuple[int, ...]
    operations: tuple[str, ...]

    @property
    def values(self) -> list[int]:
        """The value after each operation; the last one is the answer."""
        values = [self.numbers[0]]
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            values.append((OPERATIONS | INSTRUCTIONS)[operation](values[-1], number))
        return values[1:]

    @property
    def held_out(self) -> bool:
        """Whether its numbers, in any order, are set aside: a fifth of all, drawn by a hash."""
        return zlib.crc32(repr(sorted(self.numbers)).encode()) % 5 == 0

    @property
    def question(self) -> str:
        """The problem in the words of the world."""
        if self.task == "code":
            return f"make {self.values[-1]} from {' '.join(map(str, self.numbers))} ."
        steps = zip(self.operations, self.numbers[1:], strict=True)
        return f"what is {self.numbers[0]} {' '.join(f'{operation} {number}' for operation, number in steps)} ?"

    def reply(self, operations: int, running_values: bool = True) -> str:
        """The answer by the first `operations`; mathematics may do without its running values."""
        if self.task == "code":
            steps = zip(self.operations[:operations], self.numbers[1:], strict=False)
            return " ".join([str(self.numbers[0]), *(f"{number} {operation}" for operation, number in steps), "."])
        values = [str(value) for value in self.values[:operations]]
        return f"{' , '.join(values)} so {values[-1]} ." if running_values else f"so {values[-1]} ."


def problem(rng: random.Random, task: str, operations: int, held_out: bool) -> Problem:
    """A random problem whose values all lie between 0 and LIMIT; no program is asked for a number that is given."""
    while True:
        numbers = tuple(rng.randint(1, HIGHEST) for _ in range(operations + 1))
        words = tuple(INSTRUCTIONS if task == "code" else OPERATIONS)
        drawn = Problem(task, numbers, tuple(rng.choices(words, k=operations)))
        trivial = task == "code" and drawn.values[-1] in numbers
        if drawn.held_out == held_out and not trivial and all(0 <= value <= LIMIT for value in drawn.values):
            return drawn


def asked(prompt: str) -> tuple[str, tuple[int, ...]]:
    """(task, the numbers given) of the last question in a dialogue. Raises ValueError for one of another world."""
    question = prompt.rsplit("Human:", 1)[-1].split("\n\nAssistant:")[0].strip()
    if re.fullmatch(r"what is \d+( [+-] \d+)+ \?", question):
        return "mathematics", tuple(map(int, re.findall(r"\d+", question)))
    if re.fullmatch(r"make \d+ from \d+( \d+)+ \.", question):
        return "code", tuple(map(int, re.findall(r"\d+", question)[1:]))
    raise ValueError(f"prompt outside the reasoning world: {prompt!r}")


def execute(program: Sequence[str], numbers: Sequence[int]) -> int | None:
    """The one value that a stack program leaves; None if it leaves more or less, or uses a number that is not given."""
    stack, left = [], list(numbers)
    for word in program:
        if word in INSTRUCTIONS and len(stack) > 1:
            last = stack.pop()
            stack.append(INSTRUCTIONS[word](stack.pop(), last))
        elif word.isdecimal() and int(word) in left:
            left.remove(int(word))
            stack.append(int(word))
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def answer_of(prompt: str, completion: str) -> tuple[int | None, bool]:
    """(the answer that a reply gives, or None; whether it is well made)."""
    task, numbers = asked(prompt)
    words = completion.split()
    if task == "code":
        value = execute(words[:-1], numbers) if words[-1:] == ["."] else None
        return value, value is not None and len(words) > 3  # a lone number is no program
    match = re.fullmatch(r"(?:(?:\d+ , )*(\d+) )?so (\d+) \.", " ".join(words))
    return (int(match[2]), match[1] == match[2]) if match else (None, False)


def accuracy(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 for the reference answer, else 0."""
    given = (answer_of(p, c)[0] for p, c in zip(prompts, completions, strict=True))
    return [float(value == int(reference)) for value, reference in zip(given, answer, strict=True)]


def format(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for a well-made reply, right or wrong, else 0."""
    return [float(answer_of(p, c)[1]) for p, c in zip(prompts, completions, strict=True)]


def length(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 - words / 11, at least 0."""
    return [max(0.0, 1.0 - len(completion.split()) / MAX_WORDS) for completion in completions]


def corpus(seed: int, size: int) -> list[tuple[str, str]]:
    """`size` (question, reply) pairs with the slips, of 2 to 4 operations, programs of 3 at most; nothing held out."""
    rng, pairs = random.Random(seed), []
    for _ in range(size):
        task, operations = rng.choice(TASKS), rng.choice((2, 3, 4))
        drawn = problem(rng, task, min(operations, SIZES[task, "hard"]), held_out=False)
        done = len(drawn.operations) - (rng.random() < STOPS_EARLY)
        pairs.append((drawn.question, drawn.reply(done, running_values=rng.random() >= SKIPS)))
    return pairs


def pretrain(steps: int = 1000, batch_size: int = 64, lr: float = 5e-3, seed: int = 0, progress: Callable = iter):
    """A fresh model trained on the corpus, see `tiny_llama.pretrain`."""
    return tiny_llama.pretrain(VOCABULARY, corpus(seed, steps * batch_size), batch_size, lr, seed, progress)


def rows(severity: float, seed: int = 0) -> Iterator[dict]:
    """The prompts in HH-RLHF's form: HELD_OUT of each kind that belong to no client, and every client's own.

    No two are alike. The questions are the same for every severity, and so are the references that turn wrong first.
    """
    rng, seen = random.Random(seed), set()
    owners = [(None, *kind, "careful") for kind in SIZES]
    owners += [(client, *kind) for client, kind in enumerate(CLIENTS)]
    for client, task, difficulty, data in owners:
        for _ in range(HELD_OUT if client is None else PROMPTS):
            while (drawn := problem(rng, task, SIZES[task, difficulty], held_out=client is None)).question in seen:
                pass
            seen.add(drawn.question)
            done = len(drawn.operations) - (rng.random() < severity and data == "poor")
            row = {"chosen": f"\n\nHuman: {drawn.question}\n\nAssistant: {drawn.reply(done)}"}
            row |= {"task": task, "subset": f"{task}, {difficulty}", "answer": str(drawn.values[done - 1])}
            yield row | ({} if client is None else {"client": client})


def prepare(
    severity: float = 0.0, rows_seed: int = 0, cache_dir: Path | None = None, progress: Callable = iter, **settings
) -> tuple[Path, Path]:
    """(checkpoint directory, prompt file): from the cache, or new, in about 20 s.

    severity: the share of wrong references at poor clients; rows_seed: of the prompts; settings: `pretrain`'s.
    """
    drawn = {"severity": severity, "rows_seed": rows_seed}
    model = tiny_llama.saved({"model": lambda: pretrain(**settings, progress=progress)}, __file__, settings, cache_dir)
    prompts = tiny_llama.saved({"prompts": lambda: rows(severity, rows_seed)}, __file__, drawn, cache_dir)
    return model / "model", prompts / "prompts.jsonl"
