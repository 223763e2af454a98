"""Whether a mathematical answer equals the gold one, by the math-verify library: fractions, roots, sets, intervals, LaTeX or plain.

Parsing and comparing run SymPy on what a model wrote, which may take for ever or crash: in a rubric always in a process that can be killed. An
answer that cannot be compared in time is dropped and counted. A gold answer that cannot be parsed is a mistake in the data and stops the run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.reward import verifier

SECONDS = 10.0  # for one answer; almost all take milliseconds
READ = 1_000  # characters from the end of a completion, and of a box: an answer is shorter
DEPTH = 12  # brackets within brackets: math-verify's expressions take cubic time on what is never closed
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_BOX = "\\boxed{"
_FORMULA = re.compile(r"(?:\\[A-Za-z]+|[^A-Za-z]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+")  # commands, single letters, no words
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")


NEEDED = "math_answer needs the math-verify library: pip install 'posttrain[math]'"


def _check_installed() -> None:
    """Without importing it, which is slow and done in a worker."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(NEEDED)


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(NEEDED) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off: the worker is killed instead
    return math_verify


@verifier(timeout=SECONDS, on_error="drop", workers=2, prepare=_math_verify, check=_check_installed)
def math_answer(completion: str, answer: Any) -> bool | None:
    """True if the completion's last answer equals the column `answer`. A row without one is not scored.

    The last `\\\\boxed{...}` counts; without a box the last formula or number, as math-verify finds it. Numbers are equal to six digits after the
    point. Raises UserError when math-verify is not installed or the gold answer is no mathematics.
    """
    if answer is None:
        return None
    gold = _parsed(_as_formula(str(answer).strip()))
    if all(isinstance(part, str) for part in gold):  # it fell back on the text itself, or found nothing
        raise UserError(f"the gold answer {str(answer)[:200]!r} cannot be parsed as mathematics; mend the row or leave it out")
    return bool(_math_verify().verify(gold, _parsed(_answer_in(completion)), timeout_seconds=None))


def _answer_in(text: str) -> str:
    box = last_box(text)
    if box is not None:
        return _as_formula(box) if len(box) <= READ and _depth(box) <= DEPTH else ""
    text = text[-READ:].strip()
    if _depth(text) > DEPTH:
        return ""
    return _as_formula(text) if _FORMULA.fullmatch(text) or _SCIENTIFIC.fullmatch(text) else text


def last_box(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` whose braces are closed; None if there is none. One pass over the text."""
    opened: list[int | None] = []  # for each brace that is open: where its box begins, None if it is no box's
    last: tuple[int, int] | None = None
    for index, char in enumerate(text):
        if char == "{":
            opened.append(index + 1 if text.endswith(_BOX, 0, index + 1) else None)
        elif char == "}" and opened and (start := opened.pop()) is not None and (last is None or start > last[0]):
            last = start, index
    return None if last is None else text[slice(*last)]


def _depth(text: str) -> int:
    """How many brackets are open at once, at most."""
    depth = deepest = 0
    for char in text:
        depth = max(0, depth + _BRACKETS.get(char, 0))
        deepest = max(deepest, depth)
    return deepest


def _as_formula(text: str) -> str:
    """In a box, so that all of it is read as LaTeX: `2^{10}` would else be found to say 2."""
    if _BOX in text or "$" in text:
        return text
    plain = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
    return _BOX + plain + "}"


def _parsed(text: str) -> list[Any]:
    return list(_math_verify().parse(text, parsing_timeout=None))
