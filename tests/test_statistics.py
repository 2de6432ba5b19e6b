"""From rows to statements: tests, corrections, tables."""

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="the experiments need SciPy, see requirements-dev.txt")

from experiments import tables  # noqa: E402


def rows(values):
    return [{"seed": seed, "v": float(value)} for seed, value in enumerate(values)]


def test_holm_by_hand():
    # 0.01 · 3, then 0.03 · 2 = 0.06, then max(0.06, 0.04 · 1); a NaN counts as a test
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = tables.holm([0.9, float("nan"), 0.8])
    assert adjusted[0] == 1.0 and np.isnan(adjusted[1]) and adjusted[2] == 1.0


def test_a_paired_difference_is_scipys_paired_t_test():
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    _, d, _ = tables.at_equal_kl(rows(x), rows(y)[::-1], "v")  # paired by seed, whatever the order
    mean, half, p, _ = tables.paired(d)
    test = stats.ttest_rel(x, y)
    assert (mean, p) == pytest.approx(((x - y).mean(), test.pvalue))
    assert (mean - half, mean + half) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert np.isnan(tables.paired(np.ones(3))[2])  # nothing varies


def test_the_least_difference_that_a_test_finds_is_found_in_four_cases_of_five():
    draws = np.random.default_rng(0).normal(size=(4000, 10))
    seen = np.mean([tables.paired(d)[3] for d in draws])
    found = stats.ttest_1samp(draws + seen, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_runs_at_several_kl_coefficients_compare_at_the_middle_of_the_log_kls_that_both_reached():
    def runs(seed, kls, shift):
        return [{"seed": seed, "kl": kl, "v": 2 * np.log(kl) + shift} for kl in kls]

    a = runs(0, [3.0, 1.0, 8.0], 0.3) + runs(1, [1.0, 2.0], 0.5)
    b = runs(0, [2.0, 9.0], 0.0) + runs(1, [3.0, 4.0], 0.0)  # no common KL on seed 1
    kls, d, plain = tables.at_equal_kl(a, b, "v")
    assert kls == [pytest.approx(4.0)] and d.tolist() == [pytest.approx(0.3)]
    shown = tables.differences({"a": a, "b": b}, ["v"], [("a", "b")])
    assert "+0.300" in shown and "common KL on 1 of 2 seeds, at KL 4.0; at equal κ" in shown
    assert plain == [pytest.approx(2 * np.log(24) / 3 + 0.3 - np.log(18)), pytest.approx(np.log(2) + 0.5 - np.log(12))]


def test_a_column_of_differences_is_corrected_over_its_lines():
    rng = np.random.default_rng(0)
    groups = {label: rows(rng.normal(shift, 1.0, 10)) for label, shift in (("a", 0.0), ("b", 1.0), ("c", 0.5))}
    text = tables.differences(groups, ["v"], [("a", "b"), ("a", "c")])
    cells = [line.split(" | ")[1].rstrip(" |") for line in text.splitlines()[2:]]
    differences = [tables.at_equal_kl(groups["a"], groups[label], "v")[1] for label in ("b", "c")]
    tests = [tables.paired(d) for d in differences]
    for cell, d, (mean, half, p, seen), corrected in zip(
        cells, differences, tests, tables.holm([t[2] for t in tests]), strict=True
    ):
        interval = f"{tables.number(mean, '+')} ± {tables.number(half)}"
        assert cell == f"{interval} ({p:.2g}; {corrected:.2g}; {seen:.3f}), {sum(d > 0)} of 10 up"


@pytest.mark.parametrize(
    ("values", "cell"), [
        ([1.0, 3.0, 5.0], f"3.000 ± {stats.t.ppf(0.975, 2) * 2 / np.sqrt(3):.3f}"),
        ([0.05, 0.05, 0.05], "0.05"),  # nothing varies
        ([1.0, 3.0], "2.000"),  # two seeds have no interval worth a line
        ([90.0, np.nan, 96.0], "93.000 (2 of 3)"),
        ([np.nan, np.nan, np.nan], "–"),
        ([69_632.0], "69,632"),
    ],
)  # fmt: skip
def test_a_cell_is_a_mean_with_its_interval(values, cell):
    assert tables.means({"a": rows(values)}, ["v"]).splitlines()[2] == f"| a | {cell} |"
