"""GSM8K (Cobbe et al. 2021): what a worded answer comes to, and the objectives. The files are the user's, see data.py.

The answer of a text is the number after its last `####`, GSM8K's own mark [paper]; without one, that in its last
`\\boxed{}`, or else after its last "answer is" or "answer:", or else its last number [ours: in this order]. Two numbers
are equal as fractions, so that 1.50 is 3/2. A number may have

    a sign             -5, −5, -$5, $-5                    thousands    1,450,000
    a currency         $18, €18, \\$18, USD 18             decimals     .5, 18.00
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
NUMBER = re.compile(  # ++ and ?+ do not backtrack: 12th is no 1
    r"(?<!\w)(?<!\d\.)(?P<sign>(?<![\w)%])-)?\\?[$€£¥]?(?P<sign2>(?<=[$€£¥])-)?"
    r"(?:(?P<mixed>\d++) (?=\d+/\d))?"
    r"(?P<number>\d{1,3}+(?:,\d{3})++(?!\d)(?:\.\d++)?+|\d++(?:\.\d++)?+|\.\d++)(?:/(?P<below>\d++)(?!/))?"
    r"(?!(?:st|nd|rd|th)\b)(?: (?P<big>thousand|million|billion)\b)?",
    re.IGNORECASE,
)
LONGEST = 40  # characters: what is longer is no number but noise


def plain(text: str) -> str:
    """The text with one kind of minus, fractions as a/b, without markup and names of currencies."""
    text = re.sub(r"\.{2,}", " ", re.sub(r"[*_`~]", "", text)).replace("{,}", ",")
    text = re.sub(r"\b(USD|EUR|GBP|US|Rs\.?)\s?(?=[\d$])", " ", text)
    apart = lambda before, fraction: f"{before} {fraction}" if before else fraction  # noqa: E731 - 1½ is 1 1/2
    text = re.sub(r"(\d?)\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", lambda m: apart(m[1], f"{m[2]}/{m[3]}"), text)
    text = re.sub(r"(\d?)([¼-¾⅐-⅞])", lambda m: apart(m[1], unicodedata.normalize("NFKC", m[2])), text)
    return re.sub(r"[−–‐‑]", "-", text).replace("⁄", "/")


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, in order."""
    found = []
    for match in NUMBER.finditer(plain(text)):
        below = int(match["below"] or 1) if len(match[0]) <= LONGEST else 0
        if below:
            value = Fraction(match["number"].replace(",", "")) / below + int(match["mixed"] or 0)
            value *= BIG[match["big"].lower()] if match["big"] else 1
            found.append(-value if match["sign"] or match["sign2"] else value)
    return found


def answer_of(text: str) -> Fraction | None:
    """The answer that a text gives, None without one; see above."""
    _, *marked = text.split(REFERENCE)
    if marked:
        last = next((part for part in reversed(marked) if part.strip()), "")  # `#### 18 ####` is 18
        line = plain(last).strip().partition("\n")[0]
        line = line.rpartition("=")[2] if numbers(line.rpartition("=")[2]) else line  # `#### 3 + 4 = 7` is 7
        return next(iter(numbers(re.sub(r"^\s*:?\s*-\s+", "-", line))), None)  # `#### - 3` is -3
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxed and numbers(boxed[-1]):
        return numbers(boxed[-1])[-1]
    said = re.split(r"\banswer\b\W*?\s*(?:is\b(?!n)|:|=)", plain(text), flags=re.IGNORECASE)
    if len(said) > 1 and numbers(said[-1]):
        return numbers(said[-1])[0]
    return next(reversed(numbers(text)), None)


def accuracy(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 where a response comes to what the reference answer comes to, else 0.

    Raises ValueError for a reference without a number, which would be equal to no answer at all.
    """
    references = [answer_of(reference) for reference in answer]
    if None in references:
        raise ValueError(f"there is no number in the reference answer {answer[references.index(None)]!r}")
    return [float(answer_of(c) == reference) for c, reference in zip(completions, references, strict=True)]


def format(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for a response whose last line is #### and a number, after some reasoning, else 0."""
    values = []
    for completion in completions:
        reasoning, _, last = completion.strip().rpartition("\n")
        values.append(float(bool(reasoning.strip()) and last.startswith(REFERENCE) and answer_of(last) is not None))
    return values


def length(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 - words / 150, at least 0."""
    return [max(0.0, 1.0 - len(completion.split()) / WORDS) for completion in completions]
