"""The pictures: a method has one colour and one marker everywhere, and labels of one picture stay apart."""

import numpy as np
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
    points = {key: np.full((2, M), 0.5) for key in ("mean", "error")} | {"p": [0.2, 0.8]}
    points |= {key: np.ones(2) for key in ("kl", "kl_error", "gain", "gain_error")}
    plots.pareto({"firm": points}, np.zeros(M), None, ["a", "b", "c"][:M], tmp_path / "pareto.png")
    line = ([0, 1], [0.5, 0.7], [0.1, 0.1])
    plots.panels([Panel("x", "y", f"{i}", {"firm": line, "mgda": line}) for i in range(M)], tmp_path / "panels.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("pareto", "panels"))
