"""The kinds of values that a run's store holds, for `checked.py`. Each returns the value that it was given, or raises
ValueError with what it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from posttrain.io import parsed

Kind = Callable[[Any], Any]


def whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**53:  # beyond, neither JSON nor a browser keeps it
        raise ValueError("a whole number")
    return value


def real(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def blob(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) % 2:
        raise ValueError("packed numbers")
    return value


def optional(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def scores(value: Any) -> dict[str, float | None]:
    found = parsed(value)
    if not isinstance(found, dict) or not all(one is None or isinstance(one, int | float) for one in found.values()):
        raise ValueError("a mapping of numbers")
    return {name: None if one is None or abs(one) >= 2**1023 else one for name, one in found.items()}


def messages(value: Any) -> list[dict[str, Any]] | None:
    found = parsed(value)
    if found is not None and not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise ValueError("a list of messages")
    return found


def counts(value: Any) -> list[int]:
    found = parsed(value)
    if not isinstance(found, list) or not all(type(one) is int and one >= 0 for one in found):
        raise ValueError("a list of counts")
    return found
