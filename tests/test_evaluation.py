"""Intervals and paired tests against independent computations."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from posttrain.evaluate import EvalResult
from posttrain.evaluation import (
    bootstrap,
    chance_of,
    chance_of_zero_variance,
    clopper_pearson,
    forecast,
    judged_in_both,
    mcnemar,
    paired_difference,
    pass_at_k,
    permutation,
    rate,
    wilson,
)


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


def tail(k, n, p):
    """P(X >= k) for X ~ Binomial(n, p), term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("both", "gained", "lost"), [(0, 0, 0), (5, 1, 0), (10, 9, 2), (0, 30, 30), (100, 250, 10), (3, 2, 2)])
def test_the_p_value_is_the_binomial_tests(both, gained, lost):
    before = [True] * both + [False] * gained + [True] * lost
    after = [True] * both + [True] * gained + [False] * lost
    order = random.Random(0).sample(range(len(before)), len(before))
    expected = min(1.0, 2 * tail(max(gained, lost), gained + lost, 0.5))
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


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 500), (500, 500), (231, 500), (1, 512), (3, 7)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_at_the_ends_of_the_exact_interval_what_was_seen_has_the_tails_chance(right, n, confidence):
    found = clopper_pearson(right, n, confidence)
    chance = (1 - confidence) / 2
    assert found.low == 0 if right == 0 else tail(right, n, found.low) == pytest.approx(chance, rel=1e-6)
    assert found.high == 1 if right == n else 1 - tail(right + 1, n, found.high) == pytest.approx(chance, rel=1e-6)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    answers = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)


def test_pass_at_k_is_unbiased_and_more_than_the_answers_there_are_is_refused():
    p, n = 0.13, 9
    for k in (1, 4, 9):
        mean = sum(stats.binom.pmf(right, n, p) * pass_at_k(n, right, k) for right in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    with pytest.raises(ValueError, match="takes 10 or more"):
        pass_at_k(9, 3, 10)


@pytest.mark.parametrize("rewards", [[1, 1, 1, 2, 2, 3], [0.5] * 6, [1, 2, 3, 4, 5, 6], [None, 1, 1, 2, None, 1], [None] * 6])
def test_the_chance_of_zero_variance_is_the_share_of_subsets_without_two_different_rewards(rewards):
    for size in range(1, 7):
        subsets = list(itertools.combinations(rewards, size))
        silent = [len({reward for reward in subset if reward is not None}) < 2 for subset in subsets]
        assert chance_of_zero_variance(rewards, size) == pytest.approx(sum(silent) / len(subsets), abs=1e-15)
    with pytest.raises(ValueError, match="groups of 7"):
        chance_of_zero_variance(rewards, 7)


def test_right_throughout_and_wrong_throughout_are_what_is_silent_of_a_verdict():
    verdicts = [1.0] * 5 + [0.0] * 11
    assert chance_of(5, 16, 4) + chance_of(11, 16, 4) == pytest.approx(chance_of_zero_variance(verdicts, 4), abs=1e-15)


def test_one_answer_a_question_gives_wilsons_interval():
    values = [1.0] * 30 + [0.0] * 70
    found, expected = rate(values, 1), wilson(30, 100)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_answers_that_agree_within_a_question_count_as_one_and_independent_ones_as_many():
    agreeing = [1.0] * 30 + [0.0] * 70
    expected = wilson(30, 100)
    assert (rate(agreeing, 8).low, rate(agreeing, 8).high) == pytest.approx((expected.low, expected.high), abs=0.002)
    rng = np.random.default_rng(0)
    independent = list(rng.binomial(8, 0.3, size=5000) / 8)
    found, many = rate(independent, 8), wilson(round(sum(independent) * 8), 40_000)
    assert (found.high - found.low) == pytest.approx(many.high - many.low, rel=0.05)


def test_nothing_right_is_no_certainty():
    for found in (rate([0.0] * 40, 8), bootstrap([0.0] * 40)):
        assert found.low == found.value == 0
        assert 0.05 < found.high < 0.1
    assert bootstrap([0.0] * 40, bounds=(-1.0, 1.0)).low < -0.05


def test_the_bootstrap_of_many_values_is_students_interval():
    values = list(np.random.default_rng(0).normal(2.0, 1.0, size=400))
    found = bootstrap(values, bounds=(-10.0, 10.0), rounds=8000)
    expected = stats.t.interval(0.95, 399, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.008)
    assert bootstrap(values) == bootstrap(values)


def test_the_forecast_of_a_few_groups_is_wider_than_what_is_known_of_the_mean():
    chances = [0.9, 0.1, 0.5, 0.4, 0.7, 0.8, 0.2, 0.6] * 8
    few, many, known = forecast(chances, 16), forecast(chances, 100_000, rounds=200), bootstrap(chances)
    assert few.high - few.low > 2 * (known.high - known.low)
    assert (many.low, many.high) == pytest.approx((known.low, known.high), abs=0.02)
    assert forecast([0.0] * 32, 16).high > 0
    assert forecast([1.0] * 32, 16).low < 1


def test_the_permutation_test_counts_the_signs():
    rng = np.random.default_rng(1)
    before = rng.binomial(8, 0.4, size=14) / 8
    after = before + rng.choice([-0.125, 0.125, 0.25], size=14)
    differences = after - before
    sums = [abs(sum(np.multiply(signs, differences))) for signs in itertools.product((1, -1), repeat=14)]
    exact = sum(one >= abs(sum(differences)) - 1e-9 for one in sums) / 2**14
    assert permutation(list(before), list(after)) == pytest.approx(exact, abs=1e-12)
    assert permutation(list(before), list(after), rounds=8000) == pytest.approx(exact, rel=0.2)


def test_few_differences_have_their_exact_p_value_and_none_has_1():
    assert permutation([0.0] * 4, [0.5] * 4) == pytest.approx(2 / 16, abs=1e-12)
    assert permutation([0.25, 0.5], [0.25, 0.5]) == 1.0


def test_only_questions_that_were_judged_in_both_are_compared():
    before, after = [None, False, False, True, True], [True, True, None, True, False]
    assert judged_in_both(before, after) == [(False, True), (True, True), (True, False)]
    assert mcnemar(before, after) == mcnemar([False, True, True], [True, True, False])
    assert paired_difference(before, after) == paired_difference([False, True, True], [True, True, False])


def test_an_answer_that_was_not_judged_is_not_wrong():
    accuracy = EvalResult([], [], [True, None, False, None, True]).accuracy
    assert (accuracy.right, accuracy.n) == (2, 3)


def test_the_signs_test_of_yes_and_no_is_mcnemars():
    before = [0.0] * 20 + [1.0] * 30
    after = [1.0] * 14 + [0.0] * 6 + [0.0] * 4 + [1.0] * 26
    assert permutation(before, after) == pytest.approx(mcnemar([b == 1 for b in before], [a == 1 for a in after]), abs=0.005)


def pairs(both, gained, lost, neither):
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return before, [True] * (both + gained) + [False] * (lost + neither)


def test_the_paired_interval_covers_on_average_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = []
    for both, gained, lost in ((0.3, 0.2, 0.1), (0.6, 0.1, 0.05), (0.25, 0.25, 0.25), (0.1, 0.3, 0.1), (0.1, 0.1, 0.3), (0.5, 0.2, 0.2)):
        for counts in rng.multinomial(60, [both, gained, lost, 1 - both - gained - lost], size=1000):
            found = paired_difference(*pairs(*counts))
            held.append(found.low <= gained - lost <= found.high)
    assert 0.94 < np.mean(held) < 0.97


def test_the_paired_interval_of_uncorrelated_answers_adds_squares():
    found = paired_difference(*pairs(25, 25, 25, 25))
    one = wilson(50, 100)
    assert found.high == pytest.approx(math.hypot(one.high - 0.5, 0.5 - one.low), abs=1e-12)


@pytest.mark.parametrize("cells", [(0, 0, 4, 96), (40, 9, 2, 49), (100, 0, 0, 0), (0, 100, 0, 0), (10, 0, 0, 0)])
def test_the_paired_interval_turns_with_the_pair_and_stays_within_1(cells):
    before, after = pairs(*cells)
    found, turned = paired_difference(before, after), paired_difference(after, before)
    assert (found.low, found.value, found.high) == pytest.approx((-turned.high, -turned.value, -turned.low), abs=1e-12)
    assert -1 <= found.low <= found.value <= found.high <= 1


def test_four_lost_questions_of_a_hundred_prove_nothing():
    before, after = pairs(0, 0, 4, 96)
    assert mcnemar(before, after) > 0.05
    assert paired_difference(before, after).high > 0
