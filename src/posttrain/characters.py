"""Characters that an encoder cannot hold or that a terminal would obey: replaced, or written as their escapes."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides among them), surrogate and line-breaking characters: they move cursors,
# recolour or reorder text.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class _Escapes(dict[int, str]):
    """A table for str.translate, filled as characters are met. kept: characters that stay as they are."""

    def __init__(self, kept: str = "") -> None:
        super().__init__({ord(char): char for char in kept})

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _HIDDEN else char
        return self[code]


_ALL, _ALL_BUT_LINES = _Escapes(), _Escapes("\n\t")


def visible(text: str) -> str:
    """Control characters are written as their escapes (`\\x1b`, `\\n`, ...), so that a terminal shows them instead of
    obeying them."""
    return text if text.isprintable() else text.translate(_ALL)


def shown(text: str) -> str:
    """As `visible`, but line breaks and tabs stay: for text of several lines."""
    return text if text.isprintable() else text.translate(_ALL_BUT_LINES)


def encodable(text: str) -> str:
    """Lone surrogates become question marks: UTF-8, and so a tokenizer, cannot hold them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def spelled(text: str, encoding: str | None) -> str:
    """Characters that the encoding (cp1252, ASCII) lacks are written as their escapes. None: it lacks none."""
    return text if encoding is None else text.encode(encoding, "backslashreplace").decode(encoding)
