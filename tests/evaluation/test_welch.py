"""Welch's t-test, compared with SciPy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT.evaluation.welch import incomplete_beta, t_test_p, welch_test

stats = pytest.importorskip("scipy.stats")
special = pytest.importorskip("scipy.special")

LOSSES = [1.4321, 1.4402, 1.4287, 1.4511, 1.4399, 1.4301]
# SciPy warns about samples whose values differ only in their last digits.
SAMPLES = st.lists(st.integers(5_000, 50_000).map(lambda n: n / 10_000), min_size=2, max_size=12, unique=True)


@settings(max_examples=100, deadline=None)
@given(SAMPLES, SAMPLES)
def test_t_degrees_of_freedom_and_p_are_those_of_scipy(first: list[float], second: list[float]) -> None:
    test = welch_test(first, second)
    assert test is not None
    expected = stats.ttest_ind(second, first, equal_var=False)
    assert test.t == pytest.approx(expected.statistic, rel=1e-7, abs=1e-9)
    assert test.degrees_of_freedom == pytest.approx(expected.df, rel=1e-7)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("degrees_of_freedom", [1, 1.3, 2, 4, 7.7, 30, 300, 10_000])
def test_small_and_large_p_values_are_exact(degrees_of_freedom: float) -> None:
    # scipy.special.stdtr and ours agree to about 1e-11; the logarithms of large gamma functions limit both.
    for t in (0.01, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0, 1e4):
        expected = 2 * special.stdtr(degrees_of_freedom, -t)
        assert t_test_p(t, degrees_of_freedom) == pytest.approx(expected, rel=1e-9)
        assert t_test_p(-t, degrees_of_freedom) == t_test_p(t, degrees_of_freedom)
    assert t_test_p(0.0, degrees_of_freedom) == 1
    assert t_test_p(1e200, degrees_of_freedom) == 0


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (3.0, 0.5), (0.5, 8.0), (20.0, 30.0)])
def test_the_incomplete_beta_function_is_that_of_scipy(a: float, b: float) -> None:
    for x in (0.0, 1e-9, 0.1, 0.4, 0.6, 0.95, 1.0):
        assert incomplete_beta(a, b, x, 1 - x) == pytest.approx(special.betainc(a, b, x), rel=1e-11)


def test_samples_without_a_spread_have_no_p_value() -> None:
    assert welch_test(LOSSES, [1.5]) is None
    assert welch_test([1.5], LOSSES) is None
    assert welch_test([1.5, 1.5], [1.6, 1.6, 1.6]) is None
    assert welch_test([1.5, 1.5], LOSSES) is not None
