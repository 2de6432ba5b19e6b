"""The pictures: a method has one colour and one marker everywhere, and labels of one picture stay apart."""

from itertools import combinations

import matplotlib.colors
import numpy as np
import pytest

from app import plots
from app.plots import METHOD_NAMES, Panel, style

# Machado, Oliveira and Fernandes (2009): what full protanopia and deuteranopia make of linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def cielab(colour, vision):
    """CIE L*a*b* (D65) of a colour as seen."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    t = np.array(to_xyz) @ seen / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def looks(found):
    """What of a style can be seen."""
    return tuple(str(found.get(key)) for key in ("color", "marker", "fillstyle", "linestyle"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, instead of files."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def seen_in(figure):
    """label -> (colour, marker) of every line with a name."""
    found = {}
    for ax in figure.axes:
        for container in ax.containers:
            found[container.get_label()] = (container[0].get_color(), container[0].get_marker())
    return found


def test_no_two_methods_share_a_colour_or_a_marker():
    styles = [style(name, 0) for name in METHOD_NAMES]
    assert len({s["color"] for s in styles}) == len({s["marker"] for s in styles}) == len(METHOD_NAMES)


def test_a_method_looks_the_same_at_every_position():
    assert all(style(name, 0) == style(name, position) for name in METHOD_NAMES for position in range(12))


def test_eight_methods_in_a_picture_look_different_from_each_other(drawn):
    lines = {name: ([0, 1], [0, 1], None) for name in METHOD_NAMES + ["firm β=1"]}
    assert len(lines) >= 8
    plots.panels([Panel("x", "y", "", lines)], None)
    handles = drawn[0].legends[0].legend_handles
    assert len({looks(style(label, i)) for i, label in enumerate(lines)}) == len(lines) == len(handles)


def test_a_methods_look_does_not_depend_on_the_picture(drawn, tmp_path):
    line = ([0, 1], [0, 1], [0.1, 0.1])
    plots.panels([Panel("x", "y", "", {"soups": line})], tmp_path)
    plots.panels([Panel("x", "y", "", {name: line for name in METHOD_NAMES})], tmp_path)
    group = {"mean": np.zeros((2, 2)), "error": np.ones((2, 2)), "p": [0.1, 0.9]}
    group |= {key: np.zeros(2) for key in ("kl", "kl_error", "gain", "gain_error")}
    plots.pareto({"linear": group, "soups": group}, np.zeros(2), None, ["a", "b"], tmp_path)
    points = {label: (np.zeros(2), np.ones(2)) for label in ("base model", "soups")}
    plots.front(np.array([[0, 1], [1, 0]]), points, ["a", "b"], tmp_path)
    assert len({seen_in(figure)["soups"] for figure in drawn}) == 1 and len(drawn) == 4


def test_the_base_model_looks_the_same_in_every_picture(drawn, tmp_path):
    points = {label: (np.zeros(2), np.ones(2)) for label in ("base model", "firm")}
    plots.front(np.array([[0, 1], [1, 0]]), points, ["a", "b"], tmp_path)
    assert seen_in(drawn[0])["base model"] == (plots.BASE["color"], plots.BASE["marker"])


def test_variants_share_their_methods_colour_and_marker_and_stay_apart():
    variants = ["firm", "firm β=10", "firm β=1", "firm β=0.1", "firm cross"]
    styles = [style(label, i) for i, label in enumerate(variants)]
    assert len({looks(s) for s in styles}) == len(variants)
    assert {s["marker"] for s in styles} == {style("firm", 0)["marker"]}
    assert "fillstyle" not in styles[0] and all("fillstyle" in s for s in styles[1:])
    darker = [s["color"] for s in styles[1:] if s["color"] != styles[0]["color"]]
    hues = [matplotlib.colors.rgb_to_hsv(matplotlib.colors.to_rgb(c))[0] for c in (styles[0]["color"], *darker)]
    assert darker and hues == pytest.approx([hues[0]] * len(hues))


def test_ten_lines_that_are_no_methods_all_differ_in_colour_and_marker():
    styles = [style(f"objective-{j}", j) for j in range(10)]
    assert len({s["color"] for s in styles}) == len({s["marker"] for s in styles}) == 10


def test_a_hundred_lines_still_differ_in_the_pair():
    assert len({looks(style(f"objective-{j}", j)) for j in range(100)}) == 100


@pytest.mark.parametrize("palette", [plots.METHOD_COLOURS, plots.COLOURS], ids=["methods", "others"])
@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_colour_blind_readers(palette, vision):
    seen = [cielab(colour, vision) for colour in palette]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15  # a just noticeable difference is 2.3


def test_a_picture_is_a_png_with_a_panel_for_each_content(tmp_path):
    line = ([0, 1], [0.5, 0.7], [0.1, 0.1])
    contents = [Panel("x", "y", f"{i}", {"firm": line, "mgda": line}, ticks=["a", "b"]) for i in range(4)]
    plots.panels(contents, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "p.png.tmp").exists()


@pytest.mark.parametrize("M", [1, 2, 3])
def test_the_trade_off_is_drawn_for_any_number_of_objectives(M, tmp_path):
    points = {key: np.full((2, M), 0.5) for key in ("mean", "error")} | {"p": [0.2, 0.8]}
    points |= {key: np.ones(2) for key in ("kl", "kl_error", "gain", "gain_error")}
    plots.pareto({"firm": points}, np.zeros(M), None, ["a", "b", "c"][:M], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
