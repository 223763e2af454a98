"""Statistics of an exam: how sure is an accuracy, and did it really change? Standard library only; whoever sits the exam is elsewhere.

n questions, k of them right. Intervals are Wilson's, comparisons on the same questions are McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


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
    """Wilson's score interval (1927, eq. 6): unlike p +- 2 standard errors it stays within 0 and 1 and is not empty at 0 of n."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} right of {n} is not a proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, spread = right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low = 0.0 if right == 0 else centre - half  # exactly 0 and 1 at the ends: rounding must not pass them
    high = 1.0 if right == n else centre + half
    return Proportion(right, n, low, high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact p-value that `before` and `after`, on the same questions, are equally often right.

    Only questions that changed count: under the null hypothesis each went either way with probability 1/2 (McNemar 1947, exact binomial form).
    """
    if len(before) != len(after):
        raise ValueError(f"a paired test needs the same questions: {len(before)} before, {len(after)} after")
    gained = sum(1 for old, new in zip(before, after, strict=True) if new and not old)
    lost = sum(1 for old, new in zip(before, after, strict=True) if old and not new)
    changed = gained + lost
    term = tail = 1  # binomial coefficients of 0, and their sum up to the smaller count
    for k in range(min(gained, lost)):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)
