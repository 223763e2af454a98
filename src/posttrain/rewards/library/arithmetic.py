"""The rubric of "What is 2 + 2?": a number is detected (+1, else -1) and it is the right one (+3, else -3). From -4 to
+4.

The number judged is the last one of the final answer: what stands in the last `<answer>`, else after the last `#`, else
the whole completion. Listing many numbers therefore does not help.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from posttrain.rewards.library.numbers import last_number, whole_number_text
from posttrain.rewards.reward import RewardFunction, reward


def final_answer(completion: str) -> str:
    """The part of a completion that states its answer; the whole of it when nothing marks one."""
    if "<answer>" in completion:
        return completion.rpartition("<answer>")[2].partition("</answer>")[0]
    return completion.rpartition("#")[2]


@reward(range=(-1.0, 1.0))
def number_detected(completion: str) -> float:
    """+1 if the final answer contains a number, else -1."""
    return 1.0 if last_number(final_answer(completion)) is not None else -1.0


@reward(range=(-3.0, 3.0), decides=True)
def right_number(completion: str, answer: Any) -> float | None:
    """+3 if the final answer's number equals the column `answer`, else -3. None when that column is no number."""
    gold = gold_number(answer)
    if gold is None:
        return None
    return 3.0 if last_number(final_answer(completion)) == gold else -3.0


def gold_text(answer: Any) -> str | None:
    """A dataset's answer as text, without the solution that GSM8K writes before `####`. None where the dataset has
    none."""
    text = "" if answer is None else str(answer).rpartition("####")[2].strip()
    return text or None


def gold_number(answer: Any) -> Decimal | None:
    """The number that a dataset's answer is. None where it is anything else: of "1/2" or "10^6" no part is the
    answer."""
    text = gold_text(answer)
    return None if text is None else whole_number_text(text)


def arithmetic() -> list[RewardFunction]:
    return [number_detected, right_number]
