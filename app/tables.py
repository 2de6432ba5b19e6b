"""Text tables, and means with their errors: the leaf that every report rests on. [ours]"""

import math
from collections.abc import Sequence

from torch import Tensor


def clustered(values: Tensor) -> dict[str, float]:
    """Mean and its standard error clustered by prompt. values [n, S], S responses to each of n prompts.

    The S responses to one prompt are averaged first, since they are not independent evidence about other prompts.
    """
    by_prompt = values.double().mean(1)
    n = len(by_prompt)
    error = float(by_prompt.std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": float(by_prompt.mean()), "standard_error": error}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of one text table, the first column left, the others right, two spaces apart at least."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def plus_minus(figure: dict[str, float], sign: str = "+", digits: int = 3) -> str:
    """A figure and its standard error."""
    return f"{figure['mean']:{sign}.{digits}f} ± {figure['standard_error']:.{digits}f}"
