"""Applies what a call changed in its arguments to those of the tests: the same containers, with the new content."""

from __future__ import annotations

from collections import deque
from typing import Any

SIMPLE = (str, int, float, complex, bytes, type(None))


def become(old: Any, new: Any) -> Any:
    """What replaces `old`: `old` itself, with the new content, if it can be changed or is unchanged; otherwise
    `new`."""
    if isinstance(old, SIMPLE) and isinstance(new, SIMPLE):
        return old if old == new else new
    if isinstance(old, (list, deque)) and isinstance(new, (list, deque)):
        items = _items(old, new)
        old.clear()
        old.extend(items)
    elif isinstance(old, dict) and isinstance(new, dict):
        values = {key: become(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        for key, value in values.items():
            old[key] = value
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    elif (
        not isinstance(old, tuple)
        or not isinstance(new, tuple)
        or len(old) != len(new)
        or any(item is not before for item, before in zip(_items(old, new), old, strict=True))
    ):
        return new
    return old


def _items(old: Any, new: Any) -> list[Any]:
    before = list(old)
    return [become(before[index], item) if index < len(before) else item for index, item in enumerate(new)]
