"""From rows to statements: tests, corrections, tables, curves."""

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="the experiments need SciPy, see requirements-dev.txt")

from evidence import statistics  # noqa: E402


def test_holm_by_hand():
    # 0.01 · 3, then 0.03 · 2 = 0.06, then max(0.06, 0.04 · 1)
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_never_exceeds_one_and_keeps_nan():
    adjusted = statistics.holm([0.9, float("nan"), 0.8])
    assert adjusted[0] == 1.0 and np.isnan(adjusted[1]) and adjusted[2] == 1.0


def test_a_paired_difference_is_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 10))
    rows = [[{"seed": s, "v": v} for s, v in enumerate(values)] for values in (x, y)]
    mean, half, p = statistics.paired(rows[0], rows[1][::-1], "v")  # paired by seed, whatever the order
    test = stats.ttest_rel(x, y)
    low, high = test.confidence_interval(0.95)
    assert (mean, p) == pytest.approx(((x - y).mean(), test.pvalue))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_difference_that_never_varies_is_not_tested():
    rows = [[{"seed": s, "v": v} for s in range(3)] for v in (1.0, 0.0)]
    assert statistics.paired(*rows, "v")[0] == 1.0 and np.isnan(statistics.paired(*rows, "v")[2])


def test_holms_family_leaves_out_other_settings_of_our_own_method():
    rng = np.random.default_rng(0)
    groups = {
        label: [{"seed": s, "v": v} for s, v in enumerate(rng.normal(shift, 1.0, 10))]
        for label, shift in (("firm", 0.0), ("firm β=1", 1.0), ("mgda", 1.0), ("linear", 0.5))
    }
    test = statistics.against(groups, "firm", "v")
    p = [statistics.paired(groups["firm"], groups[label], "v")[2] for label in ("mgda", "linear")]
    assert test["firm β=1"][1] == "" and test["firm"] == ("", "")
    assert [test[label][1] for label in ("mgda", "linear")] == [f"{q:.2g}" for q in statistics.holm(p)]


def test_a_table_has_a_line_per_group(tmp_path, capsys):
    rows = {("a", 1): [{"kl": 1.0}, {"kl": 3.0}], ("b", 2): [{"kl": 2.0}, {"kl": 2.0}]}
    statistics.table(tmp_path, "x", ["name", "n"], rows, ["kl"])
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert lines[0] == "| name | n | KL (nats per response) |" and lines[3] == "| b | 2 | 2.000 |"
    half = stats.t.ppf(0.975, 1) * np.sqrt(2) / np.sqrt(2)
    assert lines[2] == f"| a | 1 | 2.000 ± {half:.3f} |"


def test_a_key_that_all_groups_share_is_no_column(tmp_path, capsys):
    rows = {("firm", b): [{"kl": 1.5}] for b in (0, 1)}
    statistics.table(tmp_path, "x", ["method", "β"], rows, ["kl"])
    assert (tmp_path / "x.md").read_text().splitlines()[2] == "| 0 | 1.500 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(16, "16"), (1234, "1,234"), (2.0, "2.000"), (0.0512, "0.0512"), (1.25, "1.250"), (123.4, "123")],
)
def test_numbers_are_written_alike(value, text):
    assert statistics.number(value) == text


def test_what_is_zero_by_construction_is_left_out():
    groups = {"firm": [{"v": 0.1}, {"v": 0.0}], "linear": [{"v": 0.0}, {"v": 1e-17}], "soups": [{"v": float("nan")}]}
    assert list(statistics.measured(groups, "v")) == ["firm"]


def test_a_curves_points_are_means_with_their_intervals():
    groups = {("a", x): [{"v": float(x + s)} for s in (0, 2)] for x in (1, 4, 8)}
    (panel,) = statistics.curves(groups, "x", ["v"])
    x, y, half = panel.lines["a"]
    assert (panel.ticks, x, y) == (["1", "4", "8"], [0, 1, 2], [2.0, 5.0, 9.0])
    assert half == pytest.approx([stats.t.ppf(0.975, 1) * np.sqrt(2) / np.sqrt(2)] * 3)


def test_curves_that_share_an_x_stand_beside_each_other_and_single_points_on_their_names():
    both = {(label, x): [{"v": 1.0}] for label in "ab" for x in (1, 2)}
    lines = statistics.curves(both, "x", ["v"])[0].lines
    assert lines["a"][0][0] < 0 < lines["b"][0][0] and lines["a"][0][1] < 1 < lines["b"][0][1]
    lines = statistics.points({label: [{"v": 1.0}] for label in "ab"}, ["v"])[0].lines
    assert (lines["a"][0], lines["b"][0]) == ([0], [1])
