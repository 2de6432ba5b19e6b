"""Phases: every second counted once, and nothing done while no stopwatch runs."""

import pytest

from app import stopwatch
from app.stopwatch import Stopwatch, phase


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""
    time = [0.0]
    monkeypatch.setattr(stopwatch, "now", lambda: time[0])

    def advance(seconds):
        time[0] += seconds

    return advance


def test_an_inner_phase_stops_the_outer_ones_clock(clock):
    @phase("inner")
    def inner():
        clock(5.0)

    @phase("outer")
    def outer():
        clock(1.0)
        inner()
        clock(2.0)

    with Stopwatch() as watch:
        clock(10.0)
        outer()
        outer()
    assert watch.seconds == {"other": 10.0, "outer": 6.0, "inner": 10.0}


def test_an_error_in_a_phase_ends_it(clock):
    @phase("broken")
    def broken():
        clock(1.0)
        raise KeyError

    with Stopwatch() as watch:
        with pytest.raises(KeyError):
            broken()
        clock(3.0)
    assert watch.seconds == {"broken": 1.0, "other": 3.0}


def test_a_function_may_call_itself(clock):
    @phase("deep")
    def deep(n):
        clock(1.0)
        return deep(n - 1) if n else "done"

    with Stopwatch() as watch:
        assert deep(3) == "done"
    assert watch.seconds["deep"] == 4.0


def test_without_a_stopwatch_a_phase_never_looks_at_the_clock(monkeypatch):
    monkeypatch.setattr(stopwatch, "now", lambda: pytest.fail("looked at the clock"))

    @phase("free")
    def free(x):
        return x + 1

    assert free(1) == 2
