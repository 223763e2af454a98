"""Small files and JSON that anybody may have written (summary.json, recipe.yaml): read within limits, and written whole
or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posttrain.characters import encodable
from posttrain.errors import UserError

LARGEST = 2**20  # bytes
MOST_NODES = 50_000  # values, lists and mappings of one text
DEEPEST = 50  # of them in each other


def write_whole(path: Path, text: str) -> None:
    """Writes the whole file or nothing: into a file beside it, which then replaces it. Raises
    OSError.

    Links are followed; into what is no plain file, such as /dev/stdout, the text is written as it is.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    beside = target.with_name(f".{target.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # a full disk is told of an open file without its name
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Raises UserError for a file that is not UTF-8 text of a usual size, OSError for one that cannot be read."""
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{path} has more than {largest // 2**10} KiB: it is no file of a run")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error


def read_json(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The mapping that a JSON file holds. Raises UserError for anything else."""
    try:
        return mapping(read_text(path, largest))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: it holds no {str(error).removeprefix('a ')}") from error


def parsed(value: Any) -> Any:
    """The value of a JSON text of limited size and depth, without lone surrogates. Raises ValueError that names what
    the text is not."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:  # digits without end are a ValueError too
        raise ValueError("JSON") from error
    bounded(found)
    return _encodable(found)


def bounded(found: Any) -> None:
    """Raises ValueError for too many values or too deep nesting; a list or mapping that occurs in several places counts
    each time."""
    left = MOST_NODES
    waiting: list[tuple[Any, int]] = [(found, 0)]
    while waiting:
        node, depth = waiting.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        left -= 1 + len(inner)
        if left < 0 or depth > DEEPEST:
            raise ValueError("data of a usual size and depth")
        waiting += [(one, depth + 1) for one in inner if isinstance(one, dict | list)]


def mapping(value: Any) -> dict[str, Any]:
    found = parsed(value)
    if not isinstance(found, dict):
        raise ValueError("a mapping")
    return found


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {encodable(name): _encodable(inner) for name, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value
