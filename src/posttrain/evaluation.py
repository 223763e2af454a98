"""Statistics of an evaluation: how sure is an accuracy, did it really change, and what would groups of G completions
show? SciPy computes.

n questions. Answered once, k of them right: Wilson's or Clopper and Pearson's interval, and McNemar's exact test.
Answered several times: questions are what was drawn at random, so intervals and tests work on one value a question.
evaluate.py asks the questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Proportion:
    """k right of n, with its interval."""

    right: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.n

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(right: int, n: int, confidence: float = 0.95) -> Proportion:
    """Wilson's score interval (1927, eq. 6): unlike p +- 2 standard errors it stays within 0 and 1 and is not empty at
    0 of n."""
    _check_count(right, n)
    low, high = _score_interval(right / n, n, confidence)
    return Proportion(right, n, low, high)


def _score_interval(p: float, n: float, confidence: float) -> tuple[float, float]:
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    spread = z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    # exactly 0 and 1 at the ends: rounding must not pass them
    return 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half


def clopper_pearson(right: int, n: int, confidence: float = 0.95) -> Proportion:
    """The exact interval (Clopper and Pearson 1934): it covers at least as often as it says, for every p and n."""
    _check_count(right, n)
    low, high = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
    return Proportion(right, n, float(low), float(high))


def _check_count(right: int, n: int) -> None:
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} right of {n} is not a proportion")


# Several answers a question


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n answers, `right` of which are right, hold a right one: 1 - C(n - right, k) / C(n, k).

    The unbiased estimate of pass@k from n answers to a question (Chen et al. 2021, arXiv:2107.03374, eq. 1). Raises
    ValueError for k above n.
    """
    _check_count(right, n)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers to a question: it takes {k} or more")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def chance_of(count: int, n: int, size: int) -> float:
    """The chance that `size` of n things, sampled without replacement, all belong to the `count` of a kind."""
    return math.comb(count, size) / math.comb(n, size)


def chance_of_zero_variance(rewards: Sequence[float | None], size: int) -> float:
    """The chance that no two of `size` completions, sampled from these without replacement, got different rewards: a
    zero-variance group.

    The unbiased estimate of how often a training group of that size has zero variance. None: not scored, and so not
    compared.
    """
    n = len(rewards)
    if not 1 <= size <= n:
        raise ValueError(f"groups of {size} cannot be judged by {n} completions of a prompt: it takes {size} or more")
    counts = Counter(rewards)
    unscored = counts.pop(None, 0)
    nothing_scored = math.comb(unscored, size)
    zero_variance = sum(math.comb(count + unscored, size) - nothing_scored for count in counts.values()) + nothing_scored
    return zero_variance / math.comb(n, size)


def rate(values: Sequence[float], draws: float, confidence: float = 0.95) -> Estimate:
    """The mean of a value in [0, 1] a question, each from `draws` independent draws (on average, where that varies).

    Of n answers these are n for pass@1 and n // k for pass@k. Wilson's interval for as many independent draws as would
    scatter like these means do (the effective sample size of cluster samples; Korn and Graubard 1998): never fewer than
    there are questions, never more than were drawn.
    """
    n, mean = len(values), fmean(values)
    scatter = sum((value - mean) ** 2 for value in values) / ((n - 1) * n) if n > 1 else 0.0  # variance of the mean
    effective = float(n)
    if scatter > 0:  # it is estimated from n means, hence Student's t in the place of the normal distribution
        quantile = 0.5 + confidence / 2
        effective = mean * (1 - mean) / scatter * float(stats.norm.ppf(quantile) / stats.t.ppf(quantile, n - 1)) ** 2
    return Estimate(mean, *_score_interval(mean, min(max(effective, n), n * draws), confidence))


def bootstrap(values: Sequence[float], *, bounds: tuple[float, float] = (0.0, 1.0), confidence: float = 0.95, rounds: int = 2000) -> Estimate:
    """The mean of one value a question, whatever its distribution; `bounds`: the least and most a value can be.

    Questions are drawn again; the percentiles are widened to those of Student's t for so few questions (Hesterberg
    2015, section 5). Where all values are equal the sample says nothing of their scatter: then the exact bound on the
    share of other values holds, each as far away as it can be.
    """
    n, mean = len(values), fmean(values)
    if min(values) == max(values):
        other = clopper_pearson(0, n, confidence).high
        return Estimate(mean, mean - other * (mean - bounds[0]), mean + other * (bounds[1] - mean))
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + confidence / 2, n - 1)))
    low, high = np.quantile(_redrawn(values, rounds), (tail, 1 - tail))
    return Estimate(mean, float(low), float(high))


def _redrawn(values: Sequence[float], rounds: int) -> np.ndarray:
    """Means (rounds) of as many values, drawn with putting back."""
    rng = np.random.default_rng(0)  # an interval is a function of the data
    return np.array([rng.choice(values, len(values)).mean() for _ in range(rounds)])


def forecast(chances: Sequence[float], count: int, confidence: float = 0.95, rounds: int = 2000) -> Estimate:
    """The share of `count` new questions that will show something which questions like these show with these chances.

    It holds both uncertainties: of the chance (questions drawn again, as in `bootstrap`) and of the `count` coins that
    are thrown with it.
    """
    mean = fmean(chances)
    certain = min(chances) == max(chances) and mean in (0.0, 1.0)
    edge = clopper_pearson(0, len(chances), confidence).high if certain else 0.0  # exceptions that no question has shown yet
    redrawn = np.clip(np.abs(_redrawn(chances, rounds) - edge), 0, 1)  # a mean may pass 1 by its rounding
    low, high = np.quantile(np.random.default_rng(1).binomial(count, redrawn) / count, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


# Two models, the same questions


def judged_in_both(before: Sequence[bool | None], after: Sequence[bool | None]) -> list[tuple[bool, bool]]:
    """(before, after) of the questions with a verdict on both sides; None: not judged."""
    _check_pairs(before, after)
    return [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]


def mcnemar(before: Sequence[bool | None], after: Sequence[bool | None]) -> float:
    """Two-sided exact p-value that `before` and `after`, on the same questions, are equally often right; of the
    questions that both were judged on.

    Only questions that changed count: under the null hypothesis each went either way with probability 1/2 (McNemar
    1947, exact binomial form).
    """
    pairs = judged_in_both(before, after)
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_difference(before: Sequence[bool | None], after: Sequence[bool | None], confidence: float = 0.95) -> Estimate:
    """How much oftener `after` is right, on the same questions: Wilson's intervals of the two, put together with their
    correlation.

    Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10. Like Wilson's it is not empty where few changed. Of
    the questions that both were judged on; raises ValueError where there are none.
    """
    pairs = judged_in_both(before, after)
    old, new = (wilson(sum(pair[side] for pair in pairs), len(pairs), confidence) for side in (0, 1))
    both = pairs.count((True, True))
    margins = old.right * new.right * (old.n - old.right) * (new.n - new.right)
    product = both * old.n - old.right * new.right
    agreement = max(0.0, product - old.n / 2) if product > 0 else product  # corrected for continuity
    correlation = agreement / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = new.value - old.value
    low, high = reach(new.value - new.low, old.high - old.value), reach(new.high - new.value, old.value - old.low)
    return Estimate(difference, difference - low, difference + high)


def permutation(before: Sequence[float], after: Sequence[float], rounds: int = 20_000) -> float:
    """Two-sided p-value that the values of the two, one a question, have the same mean: the signs of the differences
    are drawn anew.

    Exact where they can be signed in at most `rounds` ways. Else of so many draws; the data count as one more, so that
    it is never 0 and never too small (Phipson and Smyth 2010).
    """
    _check_pairs(before, after)
    differences = [new - old for old, new in zip(before, after, strict=True) if new != old]
    if len(differences) < 2:  # nothing changed, or one question, which can as well have changed the other way
        return 1.0
    return float(stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=rounds, batch=1000, rng=0).pvalue)


def _check_pairs(before: Sequence[object], after: Sequence[object]) -> None:
    if len(before) != len(after):
        raise ValueError(f"a paired test needs the same questions: {len(before)} before, {len(after)} after")
