"""Values as plain JSON, as they cross the sandbox's border in both directions. Decoding runs no code and makes no
objects that compare themselves.

Lists, text, numbers, booleans and None stand for themselves; everything else is an object with one key, its kind:
{"tuple": [...]}, {"dict": [[key, value], ...]}, {"int": "0x..."} (beyond 64 bits), {"float": "nan"}. Subclasses lose
their class.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Plain = Any  # what json.dumps writes and json.loads reads


SMALL = 2**63
SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


class NotPlain(TypeError):
    """A value that is not plain data: an open file, a generator, an instance of a class of the program."""


def encode(value: Any, other: Callable[[Any], Plain] | None = None) -> Plain:
    """other: what to write for a value that is not plain; without it NotPlain is raised. Raises RecursionError for deep
    nesting."""
    if value is None or value is True or value is False:
        return value
    for kind, write in WRITERS:
        if isinstance(value, kind):
            return write(value, other)
    if other is None:
        raise NotPlain(f"an object of the class {type(value).__name__} is not plain data")
    return other(value)


def _write_int(value: int, other: Any) -> Plain:
    number = int.__add__(value, 0)  # the digits of a subclass, not what its methods return
    return number if -SMALL < number < SMALL else {"int": hex(number)}


def _write_float(value: float, other: Any) -> Plain:
    number = float.__add__(value, 0.0)
    return number if math.isfinite(number) else {"float": repr(number)}


def _writer_of(name: str) -> Callable[[Any, Any], Plain]:
    return lambda value, other: {name: [encode(item, other) for item in value]}


WRITERS: tuple[tuple[type, Callable[[Any, Any], Plain]], ...] = (
    (str, lambda value, other: str.__str__(value)),
    (int, _write_int),
    (float, _write_float),
    (list, lambda value, other: [encode(item, other) for item in value]),
    (dict, lambda value, other: {"dict": [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]}),
    *((kind, _writer_of(name)) for name, kind in SEQUENCES.items()),
    (bytes, lambda value, other: {"bytes": value.hex()}),
    (bytearray, lambda value, other: {"bytearray": value.hex()}),
    (complex, lambda value, other: {"complex": [encode(value.real), encode(value.imag)]}),
    (Fraction, lambda value, other: {"fraction": [encode(value.numerator), encode(value.denominator)]}),
    (Decimal, lambda value, other: {"decimal": Decimal.__str__(value)}),
    (range, lambda value, other: {"range": [encode(value.start), encode(value.stop), encode(value.step)]}),
    (type({}.keys()), lambda value, other: {"keys": [encode(item, other) for item in value]}),
    (type({}.values()), lambda value, other: {"values": [encode(item, other) for item in value]}),
    (type({}.items()), lambda value, other: {"items": [[encode(key, other), encode(item, other)] for key, item in value]}),
)


def decode(plain: Plain, other: Callable[[Any], Any] | None = None) -> Any:
    """The value. Raises ValueError for what `encode` does not write. Hashes its input: use it only where hash
    collisions do no harm."""
    if plain is None or isinstance(plain, (str, int, float)):
        return plain
    if isinstance(plain, list):
        return [decode(item, other) for item in plain]
    if not isinstance(plain, dict) or len(plain) != 1:
        raise ValueError("not an encoded value")
    ((kind, content),) = plain.items()
    if kind == "object" and other is not None:
        return other(content)
    if kind not in READERS:
        raise ValueError(f"not an encoded value: {kind[:20]!r}")
    try:
        return READERS[kind](content, other)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"not an encoded {kind}: {error}") from error


def _reader_of(kind: type) -> Callable[[Any, Any], Any]:
    return lambda content, other: kind(decode(item, other) for item in content)


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "int": lambda content, other: int(content, 16),
    "float": lambda content, other: float(content),
    "dict": lambda content, other: {decode(key, other): decode(item, other) for key, item in content},
    **{name: _reader_of(kind) for name, kind in SEQUENCES.items()},
    "bytes": lambda content, other: bytes.fromhex(content),
    "bytearray": lambda content, other: bytearray.fromhex(content),
    "complex": lambda content, other: complex(decode(content[0]), decode(content[1])),
    "fraction": lambda content, other: Fraction(decode(content[0]), decode(content[1])),
    "decimal": lambda content, other: Decimal(content),
    "range": lambda content, other: range(*map(decode, content)),
    "keys": lambda content, other: dict.fromkeys(decode(item, other) for item in content).keys(),
    "values": lambda content, other: dict(enumerate(decode(item, other) for item in content)).values(),
    "items": lambda content, other: {decode(key, other): decode(item, other) for key, item in content}.items(),
}
