"""What a reward answered becomes scores, or failures that say what is wrong with it. None stays None; nothing becomes a zero."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping, Set
from typing import Any, SupportsFloat

from posttrain.errors import UserError
from posttrain.rewards.execution.calls import Call, Failure, Scores

MESSAGE, TRACE = 2_000, 20_000  # characters of an exception's message and of its frames
FRAMES, CHAIN = 30, 5  # innermost frames that are shown, and exceptions that led to one another
LARGEST = 1e15  # squares and sums of larger scores are beyond 32-bit numbers


def scores_of(call: Call, answer: Any) -> Scores:
    """One entry for each completion of the call."""
    if call.is_single:
        return [_score(call, 0, answer)]
    n = len(call.rows)
    name = call.reward.name
    if not isinstance(answer, Iterable) or (
        isinstance(answer, (str, bytes, Mapping, Set, SupportsFloat)) and not _is_array(answer)
    ):  # a set has no order
        message = f"reward '{name}' returned {_short(answer)} for {call.where}; it must return a list of {n} numbers"
        return [Failure("wrong_type", message)] * n
    answers = list(answer)
    if len(answers) != n:
        return [Failure("wrong_length", f"reward '{name}' returned {len(answers)} scores for the {n} completions of {call.where}")] * n
    return [_score(call, index, value) for index, value in enumerate(answers)]


def raised(call: Call, error: BaseException) -> Scores:
    """The failure of every completion of a call that raised."""
    return failed(call, "raised", f"raised {what_of(error)}", trace_of(error), error, isinstance(error, UserError))


def what_of(error: BaseException) -> str:
    """'ValueError: no number at rewards.py:7'. Of a long message the beginning."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return _named(error) + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def trace_of(error: BaseException) -> str:
    """The traceback as Python writes it, of long messages the beginning. Python itself needs half a minute for one of 50 MB."""
    chain: list[BaseException] = []
    while len(chain) < CHAIN and error not in chain:
        chain.append(error)
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            break
        error = earlier
    written = []
    for each in reversed(chain):
        frames = "".join(traceback.format_tb(each.__traceback__, limit=-FRAMES))
        written.append(f"Traceback (most recent call last):\n{cut(frames, TRACE)}{_named(each)}\n")
    return "\nThis led to another exception:\n\n".join(written)


def _named(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be read)"
    return f"{type(error).__name__}: {cut(message, MESSAGE)}" if message else type(error).__name__


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} [{len(text) - characters} characters more]"


def failed(call: Call, kind: str, what: str, trace: str = "", error: BaseException | None = None, is_fatal: bool = False) -> Scores:
    message = f"reward '{call.reward.name}' {what}, while scoring {call.where}"
    return [Failure(kind, message, trace, error, is_fatal)] * len(call.rows)


def timed_out(call: Call, seconds: float) -> Scores:
    return failed(call, "timed_out", f"took longer than its timeout of {seconds:g} s")


def _score(call: Call, index: int, answer: Any) -> float | Failure | None:
    if answer is None:
        return None
    problem = f"reward '{call.reward.name}' returned {_short(answer)} for prompt {call.rows[index][0].id}"
    try:
        score = float(answer) if isinstance(answer, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several numbers, an integer beyond floats
        score = None
    if score is None:
        return Failure("wrong_type", f"{problem}; a score is a number, True, False, or None where it could not be scored")
    if not math.isfinite(score):
        return Failure("not_finite", f"{problem}; a score must be finite. Return None where the completion could not be scored")
    if abs(score) > LARGEST:
        return Failure("not_finite", f"{problem}; scores beyond {LARGEST:g} cannot be averaged and squared. Divide all scores of this reward")
    if call.reward.is_verifier and score not in (0.0, 1.0):
        return Failure("wrong_type", f"{problem}; a verifier says True, False or None. Use @reward for other numbers")
    return score


def _is_array(value: Any) -> bool:
    """Whether it is a numpy array or tensor with an axis: those also claim to be convertible to one float."""
    return isinstance(value, Iterable) and bool(getattr(value, "shape", ()))


def plain(value: Any) -> Any:
    """The answer as JSON can carry it: numbers of other libraries as floats, arrays as lists, anything else as its text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value[:MESSAGE]  # no score: it will be quoted
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and (not isinstance(value, SupportsFloat) or _is_array(value)):
        return [plain(inner) for inner in value]
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, (str, bytes)):
        value = value[:100]
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
