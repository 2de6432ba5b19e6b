"""The pictures: a method has one colour and one marker everywhere, and labels of one picture stay apart."""

import pytest

from app import plots
from app.plots import Panel, style
from methods import METHODS


def looks(label, position):
    """What of a style can be seen."""
    return tuple(str(style(label, position).get(key)) for key in ("color", "marker", "fillstyle", "linestyle"))


def test_a_method_looks_the_same_everywhere_and_unlike_all_others():
    assert all(len({looks(name, position) for position in range(12)}) == 1 for name in METHODS)
    for part in (0, 1):  # neither the colour nor the marker of another
        assert len({looks(name, 0)[part] for name in METHODS}) == len(METHODS)
    variants = [looks(label, i) for i, label in enumerate(["firm", "firm β=10", "firm β=1", "firm groups"])]
    assert len(set(variants)) == 4 and len({look[:2] for look in variants}) == 1
    assert len({looks(f"objective-{j}", j) for j in range(100)}) == 100


@pytest.mark.parametrize("M", [1, 2, 3])
def test_pictures_are_pngs_for_any_number_of_objectives(M, tmp_path):
    figure, names = {"mean": 0.5, "standard_error": 0.1}, ["a", "b", "c"][:M]
    objective = dict.fromkeys(("before", "after", "gain"), figure) | {"calibration": {"scale": 2.0}}
    summary = {"kl": figure, "objectives": dict.fromkeys(names, objective), "preference": [0.2, 0.8, 0.0][:M]}
    plots.trade_off({"firm": [summary, summary], "mgda": [summary]}, None, names, tmp_path / "pareto.png")
    line = ([0, 1], [0.5, 0.7], [0.1, 0.1])
    plots.panels([Panel("x", "y", f"{i}", {"firm": line, "mgda": line}) for i in range(M)], tmp_path / "panels.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("pareto", "panels"))
