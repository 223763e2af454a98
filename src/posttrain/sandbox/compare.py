"""Whether a program's answer equals the expected value. Compares encoded values (inside/plain.py), outside of the
program's process.

Nothing of the program's is hashed, turned into an object or compared by its own methods: a value can neither claim to
be equal nor make the comparison slow.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Plain = Any
Number = int | float | complex | Fraction | Decimal
MOST_DIGITS = 30  # what `encode` writes as decimal digits is below 2**63
# Of a fraction, and of an integer compared with a decimal: arithmetic on more takes too long.
MOST_BITS = 100_000
MOST_DECIMALS, MOST_EXPONENT = 10_000, 5_000
_WORDS = re.compile(r"(\s+)")  # keeps the white space between them


def read_answer(line: bytes) -> Any:
    """A line of JSON from a program. Raises ValueError or RecursionError for anything else, and for numbers that take
    long to read."""
    return json.loads(line, parse_int=_short_int)


def _short_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError("a number of too many digits")
    return int(digits)


def same_value(expected: Plain, got: Plain, tolerance: float) -> bool:
    """Python's ==, but a tuple may stand for a list (tests in JSON have no tuples) and floats may differ by `tolerance`
    (relative or absolute)."""
    try:
        return _same(expected, got, tolerance)
    except (RecursionError, ValueError, TypeError, ArithmeticError):  # nested without end, or not a value at all
        return False


def _same(expected: Plain, got: Plain, tolerance: float) -> bool:
    kind, expected = _kind(expected)
    got_kind, got = _kind(got)
    return kind == got_kind and SAME[kind](expected, got, tolerance)


def _kind(plain: Plain) -> tuple[str, Any]:
    """(kind, content). Kinds that compare alike have one name: number, sequence, set."""
    if plain is None or isinstance(plain, str):
        return "text", plain
    if isinstance(plain, (int, float)):
        return "number", plain
    if isinstance(plain, list):
        return "sequence", plain
    ((name, content),) = plain.items()
    if name in SEQUENCES and not isinstance(content, list):
        raise ValueError(f"not an encoded {name}")
    return KIND_OF[name](content) if name in KIND_OF else ("unknown", plain)


SEQUENCES = ("tuple", "set", "frozenset", "dict", "keys", "items", "deque", "range", "fraction", "complex")
KIND_OF: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "tuple": lambda content: ("sequence", content),
    "set": lambda content: ("set", content),
    "frozenset": lambda content: ("set", content),
    "keys": lambda content: ("set", content),
    "items": lambda content: ("set", [{"tuple": pair} for pair in content]),
    "deque": lambda content: ("deque", content),
    "range": lambda content: ("range", range(*map(_whole, content))),
    "dict": lambda content: ("dict", content),
    "int": lambda content: ("number", int(content, 16)),
    "float": lambda content: ("number", float(content)),
    "bytes": lambda content: ("bytes", content),
    "bytearray": lambda content: ("bytes", content),
    "complex": lambda content: ("number", _complex(*content)),
    "fraction": lambda content: ("number", _fraction(*content)),
    "decimal": lambda content: ("number", _decimal(content)),
}


def _whole(plain: Plain, bits: int | None = None) -> int:
    kind, number = _kind(plain)
    if kind != "number" or not isinstance(number, int) or (bits is not None and number.bit_length() > bits):
        raise ValueError("not a whole number, or too large to calculate with")
    return number


def _fraction(above: Plain, below: Plain) -> Fraction:
    return Fraction(_whole(above, MOST_BITS), _whole(below, MOST_BITS))


def _complex(*parts: Plain) -> complex:
    (kind, real), (other, imaginary) = map(_kind, parts)
    if kind != "number" or other != "number":
        raise ValueError("not an encoded complex number")
    return complex(float(real), float(imaginary))


def _decimal(text: Any) -> Decimal:
    if not isinstance(text, str) or len(text) > MOST_DECIMALS:
        raise ValueError("a number of too many digits")
    return Decimal(text)


def same_number(expected: Number, got: Number, tolerance: float) -> bool:
    """Python's ==, but nan is nan, and floats may differ. Raises ArithmeticError for what Python cannot compare."""
    if isinstance(expected, complex) or isinstance(got, complex):
        return same_number(expected.real, got.real, tolerance) and same_number(expected.imag, got.imag, tolerance)
    if isinstance(expected, int) and isinstance(got, int):
        return expected == got
    for one, other in ((expected, got), (got, expected)):
        if isinstance(one, Decimal) and isinstance(other, int) and other.bit_length() > MOST_BITS:
            return False
    if expected != expected:
        return got != got
    if expected == got or tolerance == 0 or not (isinstance(expected, float) or isinstance(got, float)):
        return expected == got
    one, other = float(expected), float(got)
    return math.isfinite(one) and math.isfinite(other) and math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


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
    "deque": _same_sequence,
    "range": lambda expected, got, tolerance: expected == got,
    "unknown": lambda expected, got, tolerance: False,
}


def _digest(plain: Plain) -> bytes:
    """32 bytes for each hashable value, the same for equal ones (1, 1.0 and True). Their size does not depend on how
    deeply values are nested."""
    kind, content = _kind(plain)
    if kind == "number":
        text = _text_of(content).encode()
    elif kind == "range":
        text = repr([len(content), content[:1], content[:2]]).encode()
    elif kind in ("sequence", "set"):
        parts = [_digest(item) for item in content]
        text = b"".join(parts if kind == "sequence" else sorted(parts))
    else:
        text = json.dumps(content).encode()
    return hashlib.sha256(kind.encode() + b" " + text).digest()


def _text_of(number: Number) -> str:
    """The same for equal numbers of any class."""
    if isinstance(number, complex):
        if number.imag:
            return f"{_text_of(number.real)} {_text_of(number.imag)}"
        number = number.real
    if isinstance(number, Decimal) and number.is_finite() and abs(number.adjusted()) > MOST_EXPONENT:
        return str(number.normalize())
    if not isinstance(number, (int, Fraction)) and not math.isfinite(number):
        return str(float(number))
    above, below = number.as_integer_ratio()
    return f"{above:x}/{below:x}"


def same_output(expected: str, got: bytes, tolerance: float) -> bool:
    """The same lines, without white space at their ends and empty lines at the end. Words that are numbers with a point
    may differ by `tolerance`."""
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
