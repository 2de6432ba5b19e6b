"""GSM8K (Cobbe et al. 2021): what a worded answer comes to, and the objectives. The files are the user's, see data.py.

The answer of a text is the number after its last `####`, GSM8K's own mark [paper]; without one, that in its last
`\\boxed{}`, or else after its last "answer is" or "answer:", or else its last number [ours: in this order]. Two numbers
are equal as fractions, so that 1.50 is 3/2. A number may have

    a sign             -5, −5, -$5, $-5                    thousands    1,450,000
    a currency         $18, €18, \\$18                      decimals     .5, 18.00
    a unit, a percent  18 dollars, 5km, 65% is 65          fractions    3/4, 1 1/2, 1½, \\frac{3}{4}
    a big word         1.5 million

It is no number if it hangs on a letter before it (x2), or if it is an ordinal (2nd). Of `10-3` the second is 3, not -3.

Left out on purpose: numbers in words, times, powers of ten; and programs: nothing that a model writes is ever run.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from data import REFERENCE

WORDS = 150  # a response of so many has length 0
BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w)])-)?\\?[$€£¥]?(?P<sign2>(?<=[$€£¥])-)?"
    r"(?:(?P<mixed>\d+)[ -](?=\d+/\d))?"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/(?P<below>\d+)(?![\d/]))?"
    r"(?!(?:st|nd|rd|th)\b)(?: (?P<big>thousand|million|billion)\b)?",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """The text with one kind of minus, and fractions as a/b."""
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    return re.sub(r"[−–‐‑]", "-", text).replace("⁄", "/")


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, in order."""
    found = []
    for match in NUMBER.finditer(plain(text)):
        below = int(match["below"] or 1)
        if below:
            value = Fraction(match["number"].replace(",", "")) / below + int(match["mixed"] or 0)
            value *= BIG[match["big"].lower()] if match["big"] else 1
            found.append(-value if match["sign"] or match["sign2"] else value)
    return found


def answer_of(text: str) -> Fraction | None:
    """The answer that a text gives, None without one; see above."""
    _, marked, after = text.rpartition(REFERENCE)
    if marked:
        after = re.sub(r"^[\s*:=]*-\s+", "-", plain(after).lstrip())  # "#### - 3"
        return next(iter(numbers(after.partition("\n")[0])), None)
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxed and numbers(boxed[-1]):
        return numbers(boxed[-1])[-1]
    said = re.split(r"answer\s*(?:is|:|=)", text, flags=re.IGNORECASE)
    if len(said) > 1 and numbers(said[-1]):
        return numbers(said[-1])[0]
    return next(reversed(numbers(text)), None)


def accuracy(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 where a response comes to what the reference answer comes to, else 0."""
    return [float(answer_of(c) == answer_of(reference)) for c, reference in zip(completions, answer, strict=True)]


def format(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for a response whose last line is #### and a number, after some reasoning, else 0."""
    made = r".*\S.*\n\s*####\s*\S*\d\S*\s*"
    return [float(bool(re.fullmatch(made, completion, re.DOTALL))) for completion in completions]


def length(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 - words / 150, at least 0."""
    return [max(0.0, 1.0 - len(completion.split()) / WORDS) for completion in completions]
