"""Text tables: the leaf that every report rests on. [ours]"""

from collections.abc import Sequence


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
