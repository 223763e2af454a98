"""Chain of thought: is there reasoning, has it steps, does it come before the answer. About form and amount; whether it
is right is not judged.

Reasoning stands in `tags`; with `tags: null` it is all but the last line of the completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from posttrain.errors import UserError
from posttrain.rewards.library.tags import THINK, Pair, after_reasoning, checked_pair, reasoning_of
from posttrain.rewards.reward import RewardFunction, reward

_STEP_ENDS = re.compile(r"[.!?;](?=\s)|\n")
MIN_WORDS = 3  # of a step: "So." and "Hmm" are none


def reasoning_present(tags: Sequence[str] | None = THINK, min_words: int = 5) -> RewardFunction:
    """1 if the reasoning has at least `min_words` different words, else 0."""
    pair = _pair(tags, "reasoning_present")
    _at_least_one(min_words, "reasoning_present: min_words")

    def score(completion: str) -> float:
        return 1.0 if len({word.casefold() for word in _reasoning(completion, pair).split()}) >= min_words else 0.0

    return reward(name="reasoning_present", range=(0.0, 1.0))(score)


def steps(tags: Sequence[str] | None = THINK, wanted: int = 3) -> RewardFunction:
    """min(steps, wanted) / wanted. A step is a line or sentence of three words or more that was not said before."""
    pair = _pair(tags, "steps")
    _at_least_one(wanted, "steps: wanted")

    def score(completion: str) -> float:
        return min(count_steps(_reasoning(completion, pair)), wanted) / wanted

    return reward(name="steps", range=(0.0, 1.0))(score)


def reasoning_first(tags: Sequence[str] | None = THINK) -> RewardFunction:
    """1 if nothing is said before the reasoning and something after it; else 0: an answer first and a justification
    after it is no reasoning."""
    pair = _pair(tags, "reasoning_first")

    def score(completion: str) -> float:
        if pair is None:
            lines = [line for line in completion.splitlines() if line.strip()]
            return 1.0 if len(lines) > 1 else 0.0
        starts = completion.lstrip().startswith(pair[0])
        return 1.0 if starts and _reasoning(completion, pair).strip() and after_reasoning(completion, pair).strip() else 0.0

    return reward(name="reasoning_first", range=(0.0, 1.0))(score)


def count_steps(reasoning: str) -> int:
    """Different lines or sentences of at least three words."""
    said = (" ".join(part.split()).rstrip(".!?;").casefold() for part in _STEP_ENDS.split(reasoning))
    return len({step for step in said if step.count(" ") >= MIN_WORDS - 1})


def _reasoning(completion: str, pair: Pair | None) -> str:
    if pair is None:
        return completion.rstrip().rpartition("\n")[0]
    return reasoning_of(completion, pair) or ""


def _pair(tags: Sequence[str] | None, name: str) -> Pair | None:
    return None if tags is None else checked_pair(tags, f"{name}: tags")


def _at_least_one(value: int, setting: str) -> None:
    if value < 1:
        raise UserError(f"{setting}={value}: use 1 or more")
