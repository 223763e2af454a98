"""The five rewards that GSM8K recipes use: tags counted, soft format, strict format, a whole number, the right answer.
At most 4.0.

The popular regular expressions do not let `.` cross lines: reasoning of two lines scores no format at all, and strict
and soft exclude each other. The default here is repaired; `legacy=True` scores as they do, for comparing with published
runs. No backtracking: linear on any text.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from posttrain.rewards.library.arithmetic import gold_number, gold_text
from posttrain.rewards.library.numbers import whole_number_text
from posttrain.rewards.reward import RewardFunction, as_reward, reward

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_BETWEEN = re.compile(r"</reasoning>\s*<answer>")
_LEGACY_STRICT = re.compile(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n$")  # `.` stays in its line
_INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
TRAILING_COST = 0.001  # per character written after the answer


def tagged_answer(completion: str) -> str:
    """What stands in the last `<answer>`; without tags the whole text."""
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()


@reward(range=(0.0, 2.0), decides=True)
def correctness(completion: str, answer: Any, legacy: bool = False) -> float | None:
    """2 if the answer equals the column `answer`: as text, or as a number ("1,080" is "1080"). None when that column is
    empty. Legacy: as text only."""
    said = tagged_answer(completion)
    if legacy:
        return 2.0 if answer is not None and said == str(answer).strip() else 0.0
    gold = gold_text(answer)
    if gold is None:
        return None
    number = whole_number_text(said)
    return 2.0 if said in (gold, str(answer).strip()) or (number is not None and number == gold_number(answer)) else 0.0


@reward(range=(0.0, 0.5))
def integer(completion: str, legacy: bool = False) -> float:
    """0.5 if the answer is a whole number. Legacy: digits only, of any script, so that "-4" and "1,000" fail and a
    superscript passes."""
    said = tagged_answer(completion)
    return 0.5 if (said.isdigit() if legacy else _INTEGER.fullmatch(said)) else 0.0


@reward(range=(0.0, 0.5))
def soft_format(completion: str, legacy: bool = False) -> float:
    """0.5 if the completion begins with reasoning in tags, then the answer in tags. Each tag once; line breaks do not
    matter."""
    if legacy:
        return 0.5 if _legacy_soft(completion) else 0.0
    text = completion.strip()
    is_ordered = text.startswith("<reasoning>") and _BETWEEN.search(text) is not None
    return 0.5 if _each_tag_once(text) and is_ordered and text.index("<answer>") < text.index("</answer>") else 0.0


@reward(range=(0.0, 0.5))
def strict_format(completion: str, legacy: bool = False) -> float:
    """0.5 if every tag stands once, on its own line, in order, with nothing before or after (a last line break may be
    missing)."""
    if legacy:
        return 0.5 if _LEGACY_STRICT.match(completion) else 0.0
    text = completion.removesuffix("\n")
    middle = text.find("\n</reasoning>\n<answer>\n")
    is_framed = text.startswith("<reasoning>\n") and text.endswith("\n</answer>")
    has_both = len("<reasoning>") < middle and middle + len("\n</reasoning>\n<answer>") < len(text) - len("\n</answer>")
    return 0.5 if is_framed and has_both and _each_tag_once(text) else 0.0


@reward(range=(0.0, 0.5))
def tag_count(completion: str) -> float:
    """0.125 for each of the four tags that stands exactly once, less 0.001 for each character after the answer; never
    below 0."""
    score = sum(0.125 for tag in TAGS if completion.count(tag) == 1)
    _, closing, trailing = completion.rpartition("</answer>")
    return max(0.0, score - TRAILING_COST * len(trailing.strip())) if closing else score


@reward(name="tag_count", range=(-math.inf, 0.5))
def legacy_tag_count(completion: str) -> float:
    """Tags are counted with their line breaks; where the last one is missing the whole text is charged as trailing."""
    score = 0.125 * (completion.count("<reasoning>\n") == 1) + 0.125 * (completion.count("\n</reasoning>\n") == 1)
    if completion.count("\n<answer>\n") == 1:
        score += 0.125 - TRAILING_COST * len(completion.rpartition("\n</answer>\n")[2])
    if completion.count("\n</answer>") == 1:
        score += 0.125 - TRAILING_COST * (len(completion.rpartition("\n</answer>")[2]) - 1)
    return score


def gsm8k(legacy: bool = False) -> list[RewardFunction]:
    if not legacy:
        return [tag_count, soft_format, strict_format, integer, correctness]
    return [
        legacy_tag_count,
        *(as_reward(functools.partial(each, legacy=True)) for each in (soft_format, strict_format, integer, correctness)),
    ]


def _each_tag_once(text: str) -> bool:
    return all(text.count(tag) == 1 for tag in TAGS)


def _legacy_soft(text: str) -> bool:
    """Reasoning must open and close within the first line, the answer within its own; any white space may lie between
    them."""
    if not text.startswith("<reasoning>"):
        return False
    first_line_end = text.find("\n") if "\n" in text else len(text)
    searched_to = -1  # end of the line last searched in vain: later answers in that line need not be tried
    for between in _BETWEEN.finditer(text, len("<reasoning>")):
        if between.start() > first_line_end:
            return False
        line_end = text.find("\n", between.end())
        line_end = len(text) if line_end < 0 else line_end
        if line_end != searched_to and text.find("</answer>", between.end(), line_end) >= 0:
            return True
        searched_to = line_end
    return False
