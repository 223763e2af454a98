"""Intervals and paired tests against independent computations."""

import math
import random

import pytest
from scipy import stats

from posttrain.evaluation import mcnemar, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 500), (500, 500), (231, 500), (487, 500), (3, 7)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_is_scipys_wilson(right, n, confidence):
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = wilson(right, n, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("right", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_an_impossible_count_is_refused(right, n):
    with pytest.raises(ValueError):
        wilson(right, n)


@pytest.mark.parametrize(("both", "gained", "lost"), [(0, 0, 0), (5, 1, 0), (10, 9, 2), (0, 30, 30), (100, 250, 10), (3, 2, 2)])
def test_the_p_value_is_the_binomial_tests(both, gained, lost):
    before = [True] * both + [False] * gained + [True] * lost
    after = [True] * both + [True] * gained + [False] * lost
    order = random.Random(0).sample(range(len(before)), len(before))
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar([before[i] for i in order], [after[i] for i in order]) == pytest.approx(expected, rel=1e-9)


def test_thousands_of_changed_answers_do_not_overflow():
    p = mcnemar([False] * 3000 + [True] * 2800, [True] * 3000 + [False] * 2800)
    assert p == pytest.approx(stats.binomtest(3000, 5800).pvalue, rel=1e-9)
    tiny = mcnemar([False] * 5000, [True] * 5000)
    assert math.isfinite(tiny)
    assert tiny >= 0


def test_a_paired_test_needs_pairs():
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([True], [True, False])
