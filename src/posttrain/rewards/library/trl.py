"""Rewards under TRL's names, called as TRL calls them: whole batches, gold answers in the column `solution`. Scores are
TRL's.

A completion is a text, or messages of which the last one counts. Answers are compared by math-verify alone
(`math_answer` is stricter): in a rubric `accuracy_reward` and `reasoning_accuracy_reward` run in a process that can be
killed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain.errors import UserError
from posttrain.rewards.library.math import MEMORY_MB, check_installed, math_verify
from posttrain.rewards.library.repetition import repeated_fraction
from posttrain.rewards.library.tags import think_format
from posttrain.rewards.reward import reward

LogExtra = Callable[[str, list[Any]], None]
PARSE_SECONDS, COMPARE_SECONDS = 10, 5  # of one answer; alarms need a main thread
BATCH_SECONDS = 600.0
THINK_END = "</think>"
_think_format = think_format()


@dataclass(frozen=True)
class Graded:
    """score: 1 right, 0 wrong, None where the gold answer cannot be parsed. gold, said: what was read, for the log."""

    score: float | None
    gold: str
    said: str


@reward(timeout=BATCH_SECONDS, on_error="drop", workers=1, memory_mb=MEMORY_MB, prepare=math_verify, check=check_installed)
def accuracy_reward(completions: list[Any], solution: list[str], log_extra: LogExtra | None = None, **_: Any) -> list[float | None]:
    """1 if the LaTeX answer of a completion equals `solution`, else 0; None where the solution cannot be parsed."""
    graded = [_grade(text_of(completion), gold) for completion, gold in zip(completions, solution, strict=True)]
    return _scores(graded, solution, log_extra)


@reward(timeout=BATCH_SECONDS, on_error="drop", workers=1, memory_mb=MEMORY_MB, prepare=math_verify, check=check_installed)
def reasoning_accuracy_reward(
    completions: list[Any],
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: LogExtra | None = None,
    **_: Any,
) -> list[float | None]:
    """As accuracy_reward, of what follows the last of the delimiters (default: </think>). Without one the reasoning has
    not ended: 0."""
    ends = [THINK_END] if reasoning_delimiters is None else reasoning_delimiters
    graded = []
    for completion, gold in zip(completions, solution, strict=True):
        answer = _after_last(text_of(completion), ends)
        incomplete = Graded(0.0, "[incomplete reasoning]", "[incomplete reasoning]")
        graded.append(incomplete if answer is None else _grade(answer, gold))
    return _scores(graded, solution, log_extra)


@reward(range=(0.0, 1.0))
def think_format_reward(completions: list[Any], **_: Any) -> list[float]:
    """1 if the completion begins with <think>, which stands once, and </think> follows; else 0."""
    return [_think_format(text_of(completion)) for completion in completions]


@dataclass(frozen=True)
class CosineScaled:
    """See get_cosine_scaled_reward. A class, so that it can be pickled."""

    __name__: ClassVar[str] = "cosine_scaled_reward"
    max_len: int
    min_value_wrong: float
    max_value_wrong: float
    min_value_correct: float
    max_value_correct: float

    def __call__(self, completions: list[Any], solution: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        graded = accuracy_reward(completions, solution)
        return [None if score is None else self._scaled(score > 0, len(ids)) for score, ids in zip(graded, completion_ids, strict=True)]

    def _scaled(self, is_right: bool, length: int) -> float:
        shortness = 0.5 * (1.0 + math.cos(math.pi * min(length / self.max_len, 1.0)))  # 1 at length 0, 0 from max_len on
        longest, shortest = (
            (self.min_value_correct, self.max_value_correct) if is_right else (self.max_value_wrong, self.min_value_wrong)
        )  # what is earned there
        return longest + (shortest - longest) * shortness


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> CosineScaled:
    """accuracy_reward scaled by length in tokens: a right answer earns more when short, a wrong one when long. Yeo et
    al. 2025, appendix C.1."""
    return CosineScaled(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)


@dataclass(frozen=True)
class RepetitionPenalty:
    """See get_repetition_penalty_reward."""

    __name__: ClassVar[str] = "repetition_penalty_reward"
    ngram_size: int
    max_penalty: float

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        repeated = [repeated_fraction(ids, self.ngram_size) for ids in completion_ids]
        return [fraction * self.max_penalty if fraction else 0.0 for fraction in repeated]


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RepetitionPenalty:
    """`max_penalty` times the fraction of n-grams of tokens that occurred before. Yeo et al. 2025, appendix C.2."""
    if max_penalty > 0:
        raise UserError(f"max_penalty={max_penalty} must not be positive: it is what the worst text earns")
    return RepetitionPenalty(ngram_size, max_penalty)


@dataclass(frozen=True)
class SoftOverlong:
    """See get_soft_overlong_punishment."""

    __name__: ClassVar[str] = "soft_overlong_punishment_reward"
    max_completion_len: int
    soft_punish_cache: int

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        allowed = self.max_completion_len - self.soft_punish_cache
        if length <= allowed:
            return 0.0
        return (allowed - length) / self.soft_punish_cache if length <= self.max_completion_len else -1.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> SoftOverlong:
    """0 up to `max_completion_len - soft_punish_cache` tokens, falling to -1 at `max_completion_len`. Yu et al. 2025
    (DAPO), eq. 13."""
    return SoftOverlong(max_completion_len, soft_punish_cache)


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _after_last(text: str, ends: list[str]) -> str | None:
    """What follows the last occurrence of any of `ends`; None where there is none."""
    places = [place + len(end) for end in ends if (place := text.rfind(end)) >= 0]
    return text[max(places) :] if places else None


def _grade(text: str, solution: str) -> Graded:
    library, on_main = math_verify(), threading.current_thread() is threading.main_thread()
    parse_seconds, compare_seconds = (PARSE_SECONDS, COMPARE_SECONDS) if on_main else (None, None)
    gold = library.parse(solution, parsing_timeout=parse_seconds)
    if not gold:
        return Graded(None, "[unparseable]", "[skipped]")
    said = library.parse(text, _boxed_first(), extraction_mode="first_match", parsing_timeout=parse_seconds)
    score = float(library.verify(gold, said, timeout_seconds=compare_seconds))
    return Graded(score, str(gold), str(said) if said else "[unparseable]")


def _boxed_first() -> list[Any]:
    """LaTeX only, that in a box before any other."""
    from latex2sympy2_extended import NormalizationConfig

    formulas = NormalizationConfig(units=True)
    return [math_verify().LatexExtractionConfig(normalization_config=formulas, boxed_match_priority=0, try_extract_without_anchor=False)]


def _scores(graded: list[Graded], solution: list[str], log_extra: LogExtra | None) -> list[float | None]:
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [one.gold for one in graded])
        log_extra("answer_parsed", [one.said for one in graded])
    return [one.score for one in graded]
