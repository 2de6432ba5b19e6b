"""GSM8K (Cobbe et al. 2021): the number that a text answers with, and the objectives. The files are the user's.

The answer stands behind the last `####`, GSM8K's own mark [paper]; else in the last `\\boxed{}`, else behind the last
"answer is", else it is the last number [ours: the order of the field]. Of 16 * 2 = 32 the result counts; 1.50 is 3/2.
Numbers may have a sign, a currency, a unit, thousands, decimals, a fraction (1 1/2, 1½, \\frac{3}{4}), or a big word (2
million); x2, the 2 of m^2 and 3:30 are none. Left out: numbers in words, powers of ten, and programs: no reply is run.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

BIG = {"": 1, "thousand": 10**3, "million": 10**6, "billion": 10**9}
NUMBER = re.compile(
    r"(?<![^\W_]|\^)(?<!\d[.:/]|\^\{)((?<![\w)%])-\\?[$€£¥]?|^\W*-\s+)?(?:(\d{1,9}) (?=\d+/\d))?"  # sign, 1 of 1 1/2
    r"((?>\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)(?:\.\d{1,40}+)?|\d{1,40}+(?:\.\d{1,40}+)?|(?<!\.)\.\d{1,40}+))"
    r"(?:/(\d{0,40}[1-9]\d{0,40}+)(?!\.\d))?+(?![:/]?\d)(?i: (thousand|million|billion)\b)?"
)
BOXED = re.compile(r"\\(?:boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}")
SAID = re.compile(r"\banswer\b\W{0,9}(?:is\b(?!\s+not\b)|would be\b|:|=)", re.IGNORECASE)


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, in order."""
    return [
        (Fraction(number.replace(",", "")) / int(below or 1) + int(whole or 0)) * BIG[big.lower()] * (-1 if sign else 1)
        for sign, whole, number, below, big in NUMBER.findall(text)
    ]


def stated(segments: Sequence[str]) -> Fraction | None:
    """The first number, or first result, of the last of these segments that has one."""
    for segment in reversed(segments):
        segment = re.sub(r"^\s*[A-Za-z][^\n:.,(]*:\s", "", segment)  # "Step 2: 42" is 42
        for clause in re.split(r"(?<=\w)\s*\(|[;\n]|[,.:]\s", re.sub(r"(?<=\d) (?=\d{3}(?!\d))", ",", segment)):
            calculation, _, result = clause.rpartition("=")
            if values := numbers(result) if len(numbers(calculation)) > 1 else numbers(clause):
                return values[0]
    return None


def answer_of(text: str) -> Fraction | None:
    """The answer that a text gives, None without one; see above."""
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac|[¼-¾⅐-⅞])", " ", re.sub(r"[−–‐‑]", "-", text))  # 1½ is 1 1/2
    text = re.sub(r"[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0]), text).replace("⁄", "/")
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;]|['_\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)  # thousands
    _, *marked = text.split("####")
    if marked:
        return stated(marked)
    last = numbers(text.partition("answers are")[0])[-1:]  # several answers are none
    values = [stated(BOXED.findall(text)), stated(SAID.split(text)[1:]), *last]
    return next((value for value in values if value is not None), None)


def accuracy(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 for a response with the reference's answer, else 0; nothing equals a reference without a number."""
    return [float(answer_of(c) == answer_of(r) is not None) for c, r in zip(completions, answer, strict=True)]


def format(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for a response whose last line is #### and a number, after some reasoning, else 0."""
    cut = [completion.strip().rpartition("\n") for completion in completions]
    return [float(bool(before) and last.startswith("####") and answer_of(last) is not None) for before, _, last in cut]


def length(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 - words / 150, at least 0."""
    return [max(0.0, 1.0 - len(completion.split()) / 150) for completion in completions]
