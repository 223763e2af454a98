"""Closer numbers earn more. The score falls linearly with the relative error, alike above and below the gold number,
and is bounded.

score = low + (high - low) * (1 - min(error, outlier) / outlier), error = |said - gold| / |gold| (at gold 0: |said|)

An error of `outlier` or more, and an answer without a number, earn `low`: declining to answer is never better than
answering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.library.arithmetic import final_answer, gold_number
from posttrain.rewards.library.numbers import last_number, relative_error
from posttrain.rewards.library.tags import checked_pair, inside
from posttrain.rewards.reward import RewardFunction, reward


def proximity(tags: Sequence[str] | None = None, low: float = -1.0, high: float = 1.0, outlier: float = 1.0) -> RewardFunction:
    """From `low` to `high` by the last number of the final answer. None where the column `answer` is no number."""
    if not low < high or not 0 < outlier < float("inf"):
        raise UserError(f"proximity: low={low} must be below high={high}, and outlier={outlier} positive and finite")
    pair = None if tags is None else checked_pair(tags, "proximity: tags")

    def score(completion: str, answer: Any) -> float | None:
        gold = gold_number(answer)
        if gold is None:
            return None
        said = final_answer(completion) if pair is None else inside(completion, pair)
        number = None if said is None else last_number(said)
        if number is None:
            return low
        return high - (high - low) * min(relative_error(number, gold) / outlier, 1.0)

    return reward(name="proximity", range=(low, high))(score)
