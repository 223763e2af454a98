"""Whether what a program answered is what was expected. Compares encoded values (inside/plain.py), piece by piece, outside of the program.

Nothing of the program's is hashed, compared by its own methods or turned into an object, so a value can neither claim to be equal nor be
made slow to compare.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

Plain = Any
MOST_DIGITS = 30  # what `encode` writes in decimals is below 2**63
_WORDS = re.compile(r"(\s+)")  # keeps the white space between them


def read_answer(line: bytes) -> Any:
    """A line of JSON from a program. ValueError or RecursionError for what is none; numbers of too many digits take too long to read."""
    return json.loads(line, parse_int=_short_int)


def _short_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError("a number of too many digits")
    return int(digits)


def same_value(expected: Plain, got: Plain, tolerance: float) -> bool:
    """Python's ==, but a tuple may stand for a list (tests in JSON have no tuples) and floats may differ by `tolerance` (relative or absolute)."""
    try:
        return _same(expected, got, tolerance)
    except (RecursionError, ValueError, TypeError, OverflowError):  # nested without end, or not a value at all
        return False


def _same(expected: Plain, got: Plain, tolerance: float) -> bool:
    kind, expected = _kind(expected)
    got_kind, got = _kind(got)
    return kind == got_kind and SAME[kind](expected, got, tolerance)


def _kind(plain: Plain) -> tuple[str, Any]:
    """Kinds that compare alike have one name: number, sequence, set."""
    if plain is None or isinstance(plain, str):
        return "text", plain
    if isinstance(plain, (int, float)):
        return "number", plain
    if isinstance(plain, list):
        return "sequence", plain
    ((name, content),) = plain.items()
    if name in ("tuple", "set", "frozenset", "dict") and not isinstance(content, list):
        raise ValueError(f"not an encoded {name}")
    return KINDS[name](content) if name in KINDS else ("unknown", plain)


KINDS: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "tuple": lambda content: ("sequence", content),
    "set": lambda content: ("set", content),
    "frozenset": lambda content: ("set", content),
    "dict": lambda content: ("dict", content),
    "int": lambda content: ("number", int(content, 16)),
    "float": lambda content: ("number", float(content)),
    "bytes": lambda content: ("bytes", content),
    "complex": lambda content: ("complex", content),
}


def same_number(expected: float, got: float, tolerance: float) -> bool:
    if isinstance(expected, int) and isinstance(got, int):
        return expected == got
    if math.isnan(expected):
        return math.isnan(got)
    return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)


def _same_sequence(expected: list[Plain], got: list[Plain], tolerance: float) -> bool:
    return len(expected) == len(got) and all(_same(one, other, tolerance) for one, other in zip(expected, got, strict=True))


def _same_set(expected: list[Plain], got: list[Plain], tolerance: float) -> bool:
    return len(expected) == len(got) and sorted(map(_digest, expected)) == sorted(map(_digest, got))


def _same_dict(expected: list[Plain], got: list[Plain], tolerance: float) -> bool:
    if len(expected) != len(got):
        return False
    mine, theirs = (sorted(((_digest(key), value) for key, value in pairs), key=lambda pair: pair[0]) for pairs in (expected, got))
    return all(key == other and _same(value, answer, tolerance) for (key, value), (other, answer) in zip(mine, theirs, strict=True))


SAME: dict[str, Callable[[Any, Any, float], bool]] = {
    "text": lambda expected, got, tolerance: expected == got,
    "number": same_number,
    "sequence": _same_sequence,
    "set": _same_set,
    "dict": _same_dict,
    "bytes": lambda expected, got, tolerance: expected == got,
    "complex": lambda expected, got, tolerance: _same_sequence(expected, got, tolerance),
    "unknown": lambda expected, got, tolerance: False,
}


def _digest(plain: Plain) -> bytes:
    """32 bytes for each hashable value, the same for those that are equal (1, 1.0 and True). Of fixed size, however deeply values are nested."""
    kind, content = _kind(plain)
    if kind == "number":
        whole = isinstance(content, int) or content.is_integer()
        text = (hex(int(content)) if whole else repr(content)).encode()
    elif kind in ("sequence", "set"):
        parts = [_digest(item) for item in content]
        text = b"".join(parts if kind == "sequence" else sorted(parts))
    else:
        text = json.dumps(content).encode()
    return hashlib.sha256(kind.encode() + b" " + text).digest()


def same_output(expected: str, got: bytes, tolerance: float) -> bool:
    """The same lines, without white space at their ends and empty lines at the end. Words that are numbers with a point may differ by `tolerance`."""
    lines, answers = _lines(expected), _lines(got.decode("utf-8", "replace"))
    return len(lines) == len(answers) and all(
        line == answer or _same_words(line, answer, tolerance) for line, answer in zip(lines, answers, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_words(line: str, answer: str, tolerance: float) -> bool:
    words, said = _WORDS.split(line), _WORDS.split(answer)
    return len(words) == len(said) and all(word == other or _same_decimal(word, other, tolerance) for word, other in zip(words, said, strict=True))


def _same_decimal(word: str, other: str, tolerance: float) -> bool:
    if "." not in word or not (word + other).isascii() or "_" in other or max(len(word), len(other)) > 400:
        return False
    try:
        return same_number(float(word), float(other), tolerance)
    except ValueError:
        return False
