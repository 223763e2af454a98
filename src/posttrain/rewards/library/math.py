"""Whether a mathematical answer equals the gold one, by the math-verify library: fractions, roots, sets, intervals,
LaTeX or plain.

Parsing and comparing run SymPy on a model's text, which may take for ever or crash: a rubric runs them in a process
that can be killed. An answer that cannot be compared in time is dropped and counted. A gold answer that cannot be
parsed is a mistake in the data and stops the run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.library.arithmetic import gold_text
from posttrain.rewards.library.notation import bare_answer, plain_notation, same_words, unit_of
from posttrain.rewards.library.precision import agrees
from posttrain.rewards.reward import verifier

SECONDS = 10.0  # for one answer; almost all take milliseconds
MEMORY_MB = 2048
READ = 1_000  # characters from the end of a completion, and of a box: an answer is shorter
DEPTH = 12  # brackets within brackets: math-verify's expressions take cubic time on what is never closed
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_BOX = "\\boxed{"
_FORMULA = re.compile(r"(?:\\[A-Za-z]+|[^A-Za-z]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+")  # commands, single letters, no words


NEEDED = "math_answer needs the math-verify library: pip install 'posttrain[math]'"


def check_installed() -> None:
    """Without importing it, which is slow and done in a worker."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(NEEDED)


@functools.cache
def math_verify() -> Any:
    """The library, imported when it is first used."""
    try:
        import math_verify as library
    except ImportError as error:
        raise UserError(NEEDED) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off: the worker is killed instead
    return library


@verifier(timeout=SECONDS, on_error="drop", workers=2, memory_mb=MEMORY_MB, prepare=math_verify, check=check_installed)
def math_answer(completion: str, answer: Any) -> bool | None:
    """True if the completion's last answer equals the column `answer`. A row without one is not scored.

    The last `\\\\boxed{...}` counts; without a box the last formula or number, as math-verify finds it. Decimals are
    equal to six digits after the point and to six significant ones (1e-7 is not 2e-7). Units may be left out; where
    both have one they must be the same. Raises UserError when math-verify is not installed or the gold answer is no
    mathematics.
    """
    if answer is None:
        return None
    right = gold_text(answer) or ""
    gold = _parsed(_as_formula(right))
    if all(isinstance(part, str) for part in gold):  # it fell back on the text itself, or found nothing
        raise UserError(f"the gold answer {str(answer)[:200]!r} cannot be parsed as mathematics; correct the row or leave it out")
    if same_words(last_box(right) or right, (last_box(completion) or completion)[-READ:]):
        return True
    units = unit_of(last_box(right) or right), unit_of(last_box(completion) or "")
    return (None in units or units[0] == units[1]) and _equal(gold, _parsed(_answer_in(completion)))


def _equal(gold: list[Any], said: list[Any]) -> bool:
    """Each is an expression and its text, as math-verify parses it."""
    verify = math_verify().verify
    pairs = [(a, b) for a in gold for b in said]
    return any(verify([a], [b], timeout_seconds=None) and (isinstance(a, str) or agrees(a, b)) for a, b in pairs)


def _answer_in(text: str) -> str:
    box = last_box(text)
    if box is not None:
        return _as_formula(box) if len(box) <= READ and _depth(box) <= DEPTH else ""
    text = text[-READ:].strip()
    if _depth(text) > DEPTH:
        return ""
    bare = bare_answer(text)
    return _as_formula(bare) if _FORMULA.fullmatch(bare) else plain_notation(text)


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
    inner = last_box(text)
    text = bare_answer(text if inner is None else inner)
    return text if "$" in text or _BOX in text else _BOX + text + "}"


def _parsed(text: str) -> list[Any]:
    return list(math_verify().parse(text, _extraction(), parsing_timeout=None))


@functools.cache
def _extraction() -> Any:
    """math-verify's own, but units stay: it would take `2ab` for 2 of the unit ab."""
    from latex2sympy2_extended import NormalizationConfig

    formulas = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False)
    library = math_verify()
    return library.LatexExtractionConfig(normalization_config=formulas), library.ExprExtractionConfig()
