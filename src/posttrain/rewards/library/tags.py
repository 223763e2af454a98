"""The form of a completion: reasoning in tags, then an answer, in tags or without. Any tags; only plain text searches,
so linear on any text.

A tag is two different texts, opening and closing. `prefilled` says that the chat template already wrote the opening tag
of the reasoning, so that completions begin inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.reward import RewardFunction, reward

Pair = tuple[str, str]
THINK: Pair = ("<think>", "</think>")
ANSWER: Pair = ("<answer>", "</answer>")


def checked_pair(tags: Any, setting: str) -> Pair:
    """(opening, closing) from a pair or a list of two. Raises UserError for anything else."""
    is_pair = isinstance(tags, (list, tuple)) and len(tags) == 2 and all(isinstance(tag, str) and tag for tag in tags)
    if not is_pair or tags[0] == tags[1]:
        raise UserError(f"{setting} must be an opening and a closing tag, as in ['<think>', '</think>'], not {tags!r}")
    return tags[0], tags[1]


def inside(text: str, tags: Pair) -> str | None:
    """What stands in the last tags; up to the end of the text when they are not closed. None when they are never
    opened."""
    _, opening, rest = text.rpartition(tags[0])
    return rest.partition(tags[1])[0] if opening else None


def reasoning_of(text: str, tags: Pair, prefilled: bool = False) -> str | None:
    """The first reasoning of a completion, closed by its tag; None when there is none."""
    if not prefilled:
        _, opening, text = text.partition(tags[0])
        if not opening:
            return None
    reasoning, closing, _ = text.partition(tags[1])
    return reasoning if closing else None


def after_reasoning(text: str, tags: Pair) -> str:
    """What follows the last closing tag of the reasoning. Unclosed reasoning is followed by nothing; without reasoning
    it is the whole text."""
    if tags[1] in text:
        return text.rpartition(tags[1])[2]
    return "" if tags[0] in text else text


def think_format(tags: Sequence[str] = THINK, prefilled: bool = False) -> RewardFunction:
    """1 if the completion begins with the opening tag, which stands once, and the closing tag follows; else 0. Empty
    reasoning is allowed."""
    start, end = checked_pair(tags, "think_format: tags")

    def score(completion: str) -> float:
        text = start + completion if prefilled else completion
        return 1.0 if text.startswith(start) and text.count(start) == 1 and end in text[len(start) :] else 0.0

    return reward(name="think_format", range=(0.0, 1.0))(score)


def answer_format(tags: Sequence[str] = THINK, answer: Sequence[str] = ANSWER, prefilled: bool = False) -> RewardFunction:
    """1 if the completion is reasoning in tags, then an answer in tags, each tag once and nothing else around them but
    white space; else 0.

    Neither may be empty.
    """
    pair, answer_pair = checked_pair(tags, "answer_format: tags"), checked_pair(answer, "answer_format: answer")

    def score(completion: str) -> float:
        return 1.0 if _is_two_part(pair[0] + completion if prefilled else completion, pair, answer_pair) else 0.0

    return reward(name="answer_format", range=(0.0, 1.0))(score)


def tags_once(tags: Sequence[str] = (*THINK, *ANSWER), missing: float = -1.0) -> RewardFunction:
    """The mean over the tags of 1 where the tag stands exactly once, else `missing`. Neither order nor content
    matter."""
    listed = [tag for tag in tags if isinstance(tag, str) and tag]
    if not listed or len(listed) != len(tags) or isinstance(tags, str):
        raise UserError(f"tags_once: tags must be a list of tags, not {tags!r}")
    if missing > 1:
        raise UserError(f"tags_once: missing={missing} is more than a tag in its place earns; use 1 or less")

    def score(completion: str) -> float:
        return sum(1.0 if completion.count(tag) == 1 else missing for tag in listed) / len(listed)

    return reward(name="tags_once", range=(float(missing), 1.0))(score)


def _is_two_part(text: str, pair: Pair, answer: Pair) -> bool:
    text = text.strip()
    if any(text.count(tag) != 1 for tag in (*pair, *answer)) or not text.startswith(pair[0]) or not text.endswith(answer[1]):
        return False
    reasoning, _, rest = text[len(pair[0]) :].partition(pair[1])
    between, opening, said = rest.partition(answer[0])
    return bool(reasoning.strip() and opening and not between.strip() and said.removesuffix(answer[1]).strip())
