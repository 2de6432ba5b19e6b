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
    [
        (16, "16"),
        (1234, "1,234"),
        (2.0, "2.000"),
        (0.0512, "0.0512"),
        (1.25, "1.250"),
        (123.4, "123"),
        (float("nan"), "–"),
    ],
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


def curve_of(kls, gains, seeds=6, noise=0.0, rng=None):
    """Rows of a curve of three points, each seed with a noise of its own in the gain."""
    shift = noise * (rng or np.random.default_rng(0)).normal(size=seeds)
    return [[{"kl": kl, "worst_gain": gain + s} for s in shift] for kl, gain in zip(kls, gains, strict=True)]


def test_two_curves_on_one_line_have_no_gap_at_equal_kl_however_far_each_goes():
    further, nearer = curve_of((4.0, 2.0, 1.0), (0.8, 0.4, 0.2)), curve_of((2.0, 1.0, 0.5), (0.4, 0.2, 0.1))
    low, high, gap, *interval = statistics.gap_at_equal_kl(further, nearer)
    assert (low, high) == (1.0, 2.0) and [gap, *interval] == pytest.approx([0.0] * 3, abs=1e-12)


def test_the_gap_at_equal_kl_is_the_height_between_parallel_curves_whatever_the_order_of_the_points():
    above, below = curve_of((1.0, 4.0, 2.0), (0.3, 0.9, 0.5)), curve_of((3.0, 1.0, 2.0), (0.6, 0.2, 0.4))
    assert statistics.gap_at_equal_kl(above, below)[2] == pytest.approx(0.1)


def test_the_interval_of_the_gap_is_that_of_paired_seeds():
    # Equal noise in both curves cancels; in one of them it is the noise of a mean of seeds.
    rng, seeds = np.random.default_rng(1), 40
    below = curve_of((1.0, 2.0, 3.0), (0.2, 0.4, 0.6), seeds)
    noisy = curve_of((1.0, 2.0, 3.0), (0.3, 0.5, 0.7), seeds, noise=0.2, rng=rng)
    shifts = [row["worst_gain"] - 0.3 for row in noisy[0]]
    _, _, gap, low, high = statistics.gap_at_equal_kl(noisy, below)
    assert gap == pytest.approx(0.1 + np.mean(shifts))
    assert high - low == pytest.approx(2 * 1.96 * np.std(shifts) / np.sqrt(seeds), rel=0.15)
    same = [[row | {"worst_gain": row["worst_gain"] - 0.1} for row in rows] for rows in noisy]
    assert statistics.gap_at_equal_kl(noisy, same)[2:] == pytest.approx((0.1, 0.1, 0.1))


def test_curves_that_share_no_kl_have_no_gap():
    gap = statistics.gap_at_equal_kl(curve_of((1.0, 2.0), (0.1, 0.2)), curve_of((3.0, 4.0), (0.1, 0.2)))[2]
    assert np.isnan(gap)
