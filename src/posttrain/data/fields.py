"""The small language of recipe templates: "Q: {question}" and "{answer|after:####|int}". A column in braces, then
pipes; {{ and }} are braces.

It can take text apart and nothing else: no expressions, no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from posttrain.errors import UserError, did_you_mean

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def _after(value: Any, mark: str) -> str:
    _, found, tail = str(value).rpartition(mark)
    if not found:
        raise ValueError(f"has no '{mark}'")
    return tail.strip()


def _before(value: Any, mark: str) -> str:
    head, found, _ = str(value).partition(mark)
    if not found:
        raise ValueError(f"has no '{mark}'")
    return head.strip()


def _int(value: Any, _: str) -> int:
    try:
        return int(str(value).replace(",", "").strip())
    except ValueError:
        raise ValueError(f"is no whole number: {str(value)[:40]!r}") from None


PIPES: dict[str, Callable[[Any, str], Any]] = {
    "after": _after,  # what follows the last occurrence of the mark, stripped
    "before": _before,  # what precedes the first occurrence, stripped
    "strip": lambda value, _: str(value).strip(),
    "int": _int,  # "1,080" -> 1080
}
NEEDS_MARK = ("after", "before")


class TemplateField:
    """One parsed template. A template that is a single {column} keeps the value's type: numbers, lists of messages."""

    def __init__(self, template: str, name: str) -> None:
        if not isinstance(template, str):
            raise UserError(f"the template of '{name}' must be text such as \"{{question}}\", not {template!r}")
        self.name = name
        self.pieces: list[str | tuple[str, list[tuple[str, str]]]] = []  # text, or (column, pipes)
        end = 0
        for match in _PIECE.finditer(template):
            self.pieces.append(template[end : match.start()])
            end = match.end()
            if match.group() in ("{{", "}}"):
                self.pieces.append(match.group()[0])
            elif match.group(1) is None:
                raise UserError(f"the template of '{name}' has a single '{match.group()}' in {template!r}; write it twice for a brace")
            else:
                self.pieces.append(self._parse(match.group(1)))
        self.pieces = [piece for piece in [*self.pieces, template[end:]] if piece]

    def _parse(self, inside: str) -> tuple[str, list[tuple[str, str]]]:
        column, *pipes = inside.split("|")
        parsed = []
        for pipe in pipes:
            pipe_name, _, mark = pipe.partition(":")
            if pipe_name.strip() not in PIPES:
                raise UserError(
                    f"the template of '{self.name}': there is no '|{pipe_name}'; known: {', '.join(PIPES)}.{did_you_mean(pipe_name, PIPES)}"
                )
            if (pipe_name.strip() in NEEDS_MARK) != bool(mark):
                raise UserError(f"the template of '{self.name}': write '|{pipe_name}{'' if mark else ':####'}'")
            parsed.append((pipe_name.strip(), mark))
        return column.strip(), parsed

    def check(self, columns: Iterable[str]) -> None:
        """Raises UserError for a column that no row has."""
        known = list(columns)
        for piece in self.pieces:
            if isinstance(piece, tuple) and piece[0] not in known:
                raise UserError(
                    f"the template of '{self.name}' asks for the column '{piece[0]}'; the data has: {', '.join(known)}."
                    + did_you_mean(piece[0], known)
                )

    def fill(self, row: Mapping[str, Any], number: int) -> Any:
        values = [piece if isinstance(piece, str) else self._value(piece, row, number) for piece in self.pieces]
        return values[0] if len(values) == 1 else "".join(map(str, values))

    def _value(self, piece: tuple[str, list[tuple[str, str]]], row: Mapping[str, Any], number: int) -> Any:
        column, pipes = piece
        if row.get(column) is None:
            raise UserError(f"row {number} has no '{column}', which the template of '{self.name}' asks for")
        value = row[column]
        for pipe, mark in pipes:
            try:
                value = PIPES[pipe](value, mark)
            except ValueError as error:
                raise UserError(f"row {number}: '{column}' {error} (template of '{self.name}')") from None
        return value
