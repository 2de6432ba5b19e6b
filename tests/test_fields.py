"""A settings dataclass refuses what its types do not allow, and names the field."""

from dataclasses import dataclass
from typing import Literal

import pytest
from transformers import HfArgumentParser

from app.fields import Checked, Count, NonNegative, Positive, Share, setting


@dataclass
class Example(Checked):
    """One field of every kind."""

    rounds: Count = setting(2, "rounds")
    few: Count | None = setting(None, "some of them")
    lr: NonNegative = setting(0.0, "rate")
    temperature: Positive = setting(1.0, "temperature")
    gamma: Share = setting(1.0, "discount")
    names: list[str] = setting(["a"], "names")
    kind: Literal["x", "y"] = setting("x", "kind")


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("few", 0), ("lr", -1.0), ("lr", float("nan")), ("lr", float("inf")), ("temperature", 0.0),
     ("gamma", 1.1), ("kind", "z"), ("rounds", "2"), ("rounds", True), ("rounds", 2.0), ("lr", "x"), ("lr", 10**400),
     ("lr", None), ("names", "a"), ("names", [1]), ("kind", 1), ("few", [])],
)  # fmt: skip
def test_a_value_outside_the_limits_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        Example(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 1), ("few", 3), ("few", None), ("lr", 0.0), ("lr", 2), ("gamma", 0.0), ("kind", "y")],
)
def test_a_value_at_the_limits_is_taken(field, value):
    assert getattr(Example(**{field: value}), field) == value


def test_two_instances_do_not_share_a_list():
    Example().names.append("b")
    assert Example().names == ["a"]


def test_every_field_is_a_flag_of_its_bare_type():
    (example,) = HfArgumentParser(Example).parse_args_into_dataclasses(
        ["--rounds", "3", "--few", "1", "--lr", "0.5", "--names", "p", "q", "--kind", "y"], look_for_args_file=False
    )
    assert example == Example(rounds=3, few=1, lr=0.5, names=["p", "q"], kind="y")
