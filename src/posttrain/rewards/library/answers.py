"""Right or wrong: the final answer against the column `answer`, as text or as a number. Verifiers: they decide, and
give no partial credit.

The final answer stands in the last `tags` when they are given (no tags: no answer); otherwise it is what `final_answer`
finds. A row whose gold answer is missing or empty, or is no number where numbers are compared, is not scored: that is
the data's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.library.arithmetic import final_answer, gold_number
from posttrain.rewards.library.numbers import is_near, last_number, whole_number_text
from posttrain.rewards.library.tags import checked_pair, inside
from posttrain.rewards.reward import RewardFunction, verifier


def exact_answer(tags: Sequence[str] | None = None, ignore_case: bool = False) -> RewardFunction:
    """Right if the final answer is the gold text. White space is compared as single blanks and not at the ends."""
    find = _finder(tags, "exact_answer")

    def normal(text: str) -> str:
        joined = " ".join(text.split())
        return joined.casefold() if ignore_case else joined

    def is_right(completion: str, answer: Any) -> bool | None:
        gold = "" if answer is None else normal(str(answer))
        if not gold:
            return None
        said = find(completion)
        return said is not None and normal(said) == gold

    return verifier(name="exact_answer")(is_right)


def numeric_answer(tags: Sequence[str] | None = None, tolerance: float = 0.0, relative: float = 0.0, anywhere: bool = False) -> RewardFunction:
    """Right if the final answer is the gold number, or no farther from it than `tolerance`, or than `relative` times
    the gold number.

    The answer must be nothing but a number ("$1,080." is one); with `anywhere` its last number counts. "inf" and "nan"
    are no numbers.
    """
    if not 0 <= tolerance < float("inf") or not 0 <= relative < float("inf"):
        raise UserError(f"numeric_answer: tolerance={tolerance} and relative={relative} must be finite and not negative")
    find = _finder(tags, "numeric_answer")
    read: Callable[[str], Decimal | None] = last_number if anywhere else whole_number_text

    def is_right(completion: str, answer: Any) -> bool | None:
        gold = gold_number(answer)
        if gold is None:
            return None
        said = find(completion)
        number = None if said is None else read(said)
        return number is not None and is_near(number, gold, tolerance=tolerance, relative=relative)

    return verifier(name="numeric_answer")(is_right)


def _finder(tags: Sequence[str] | None, name: str) -> Callable[[str], str | None]:
    if tags is None:
        return final_answer
    pair = checked_pair(tags, f"{name}: tags")
    return lambda completion: inside(completion, pair)
