"""Text that must contain or match something: keywords, a regular expression.

Keywords are whole words, compared without case. A model may find a text on which the user's expression takes years to
match: matching stops after `seconds`, and such a completion is not scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.reward import RewardFunction, reward


def keywords(words: Iterable[str] | str | None = None) -> RewardFunction:
    """The fraction of the keywords that occur as whole words. Without `words` a row brings its own in the column
    `keywords` (a list, or text with commas).

    A row without keywords is not scored.
    """
    if words is not None:
        wanted = listed(words)
        if not wanted:
            raise UserError("keywords: words is empty")
        return reward(name="keywords", range=(0.0, 1.0))(lambda completion: fraction_present(completion, wanted))

    def score(completion: str, keywords: Any) -> float | None:
        of_row = listed(keywords)
        return fraction_present(completion, of_row) if of_row else None

    return reward(name="keywords", range=(0.0, 1.0))(score)


def regex(pattern: str, full: bool = False, ignore_case: bool = False, seconds: float = 1.0) -> RewardFunction:
    """1 if the expression is found in the completion (`full`: if it is the whole of it), else 0. `.` also matches line
    breaks."""
    import regex as engine  # transformers depends on it; unlike `re` it can be stopped

    flags = engine.DOTALL | (engine.IGNORECASE if ignore_case else 0)
    try:
        compiled = engine.compile(pattern, flags)
    except engine.error as error:
        raise UserError(f"regex: the pattern {pattern!r} is not a regular expression: {error}") from error

    def score(completion: str) -> float | None:
        try:
            found = (compiled.fullmatch if full else compiled.search)(completion, timeout=seconds)
        except TimeoutError:
            return None
        return 1.0 if found else 0.0

    return reward(name="regex", range=(0.0, 1.0))(score)


def listed(words: Iterable[str] | str | None) -> list[str]:
    """Keywords from a list, or from text with commas; without duplicates and empty ones."""
    parts = words.split(",") if isinstance(words, str) else (str(word) for word in words or ())
    return list(dict.fromkeys(word.strip() for word in parts if word.strip()))


def fraction_present(text: str, words: list[str]) -> float:
    return sum(contains_word(text, word) for word in words) / len(words)


def contains_word(text: str, word: str) -> bool:
    """Whether it stands in the text, not as a part of another word: "art" is not in "start"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
