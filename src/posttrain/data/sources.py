"""Rows of data from wherever they lie: JSONL, JSON, CSV or Parquet files, a directory that `datasets` saved, the hub
("name:config:split"), or the tasks of reasoning-gym ("reasoning-gym:leg_counting?size=500").

All at once (`load_rows`) or one after another (`stream_rows`). Only reading and explaining what cannot be read: what
the columns mean is `prompts.py`'s business, and several sources are `mixture.py`'s.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.messages import check_encodable, texts_of
from posttrain.data.tables import features_of, read, rows_of_table
from posttrain.errors import UserError, did_you_mean
from posttrain.reasoning_gym_tasks import SCHEME
from posttrain.reasoning_gym_tasks import rows_of as procedural_rows

if TYPE_CHECKING:
    from datasets import Dataset

Rows = list[dict[str, Any]]

_HUB = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?(?::[\w.-]+){0,2}")


def load_rows(source: str | Path) -> Rows | Dataset:
    """All rows of `source`. Raises UserError for a path that does not exist, a row that cannot be read (with its line),
    or no rows."""
    path = Path(source).expanduser()
    if path.is_dir():
        rows: Rows | Dataset = rows_of_table(_saved_directory(path))
    elif path.is_file():
        rows = list(_file_rows(path))
    elif str(source).startswith(SCHEME):
        rows = procedural_rows(str(source))
    else:
        rows = rows_of_table(_hub(str(source)))
    if len(rows) == 0:
        raise UserError(f"{source} has no rows")
    return rows


class RowStream:
    """Rows that are read anew, one after another, whenever they are iterated."""

    def __init__(self, read: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.read())

    def map(self, function: Callable[[dict[str, Any], int], dict[str, Any]]) -> RowStream:
        """The stream of `function(row, number)`."""
        return RowStream(lambda: (function(row, number) for number, row in enumerate(self)))


def stream_rows(source: str | Path) -> RowStream:
    """As `load_rows`, without holding them: a row is read, and what is wrong with it raised, when its turn comes."""
    path = Path(source).expanduser()
    if path.is_file():
        return RowStream(lambda: _file_rows(path))
    loaded: Any = _saved_directory(path) if path.is_dir() else _hub(str(source), streaming=True)
    rows = rows_of_table(loaded)
    return RowStream(lambda: rows)


def column_names(rows: Rows | Dataset) -> list[str]:
    """Every column that some row has, in order of appearance."""
    if isinstance(rows, list):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path}: cannot tell the format from '{path.suffix}'; name the file with one of {', '.join(READERS)}")
    try:
        yield from READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    content = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path} holds {_kind(content)}; it must hold a list of objects. One object a line is called .jsonl")
    yield from (_object(row, f"{path}, row {number}") for number, row in enumerate(content))


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _csv_rows(file, path)


def _csv_rows(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None, ()))
                raise UserError(f"{path}, line {reader.line_num}: {found} fields where the header names {len(reader.fieldnames or ())}")
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        features = features_of(file.schema_arrow)
        for batch in file.iter_batches():
            yield from read(batch.to_pylist(), features)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _parsed(text: str, place: str) -> Any:
    try:
        parsed = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            for inner in texts_of(parsed):
                check_encodable(inner)
        return parsed
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{place}{line} is not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply to be a row of data") from error


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{place} is {_kind(row)}; each row must be an object such as {{"question": "...", "answer": "..."}}')
    return row


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")


def _saved_directory(path: Path) -> Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is a directory, but not one that `datasets` saved; name a file in it: {_listing(path)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise UserError(f"{path} holds several splits; name one of them: {', '.join(str(path / split) for split in loaded)}")
    return loaded


def _listing(path: Path) -> str:
    names = sorted(found.name for found in path.iterdir() if found.suffix.lower() in READERS)
    return ", ".join(names[:8]) or "there is none of a known format"


def _hub(source: str, *, streaming: bool = False) -> Dataset:
    """name, name:config or name:config:split. The split is `train` unless it is named."""
    if Path(source).suffix.lower() in READERS or not _HUB.fullmatch(source) or source.startswith((".", "/", "~")):
        path = Path(source).expanduser()
        near = did_you_mean(path.name, [found.name for found in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"the data file {source} does not exist.{near}")
    name, config, split = [*source.split(":"), "", ""][:3]
    import datasets

    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:  # the hub's client raises a dozen kinds; all mean the same to the user
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"could not load '{source}': no such path here, and the hub said: {type(error).__name__}: {cause}. Without a network give a JSONL file"
        ) from error
