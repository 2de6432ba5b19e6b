"""How a setting is declared: a default, one line of help, and what values it may take, all in its dataclass. [ours]

    @dataclass
    class Config(Checked):
        rounds: Count = setting(16, "T, communication rounds")
        lr: NonNegative = setting(2e-4, "client learning rate")
        optimizer: Literal["adam", "sgd"] = setting("adam", "client optimizer")

The limits stand in the type, so a dataclass checks itself whoever makes it: a flag, a file, or a test.
"""

import math
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Limits:
    """low ≤ value ≤ high, or low < value where `above`; numbers must be finite."""

    low: float
    high: float = math.inf
    above: bool = False

    def allow(self, value: float) -> bool:
        """Whether a value keeps within the limits."""
        return (
            -math.inf < value < math.inf
            and (value > self.low if self.above else value >= self.low)
            and value <= self.high
        )

    def __str__(self) -> str:
        if self.high < HUGE:
            return f"must lie between {self.low:g} and {self.high:g}"
        least = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        return f"must be a number {least}" + (f", and at most {HUGE:g}" if self.high == HUGE else "")


HUGE = 1e30  # beyond it 32-bit numbers overflow in one product
Count = Annotated[int, Limits(1)]
Index = Annotated[int, Limits(0)]
Seed = Annotated[int, Limits(0, 2**63 - 1)]
Positive = Annotated[float, Limits(0, HUGE, above=True)]
NonNegative = Annotated[float, Limits(0, HUGE)]
Share = Annotated[float, Limits(0, 1)]


def setting(default: Any, help: str) -> Any:
    """A dataclass field with one line of help."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a hint says; an int is a float, a bool is neither."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(each, inner[0]) for each in value)
    if origin is Literal:
        return isinstance(value, str)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


class Checked:
    """Base of a settings dataclass. Raises ValueError naming the field where a value is none that its type allows."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(value, hints[f.name]):
                raise ValueError(f"{f.name}: {value!r} is of another type; see --help")
            for kind in (hints[f.name], *get_args(hints[f.name])):  # itself, or a member of `Count | None`
                limits = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Limits)), None)
                if limits and value is not None and not limits.allow(value):
                    raise ValueError(f"{f.name}: {value} {limits}")
                if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
                    raise ValueError(f"{f.name}: {value!r} is none of {', '.join(map(str, get_args(kind)))}")
