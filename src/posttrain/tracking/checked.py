"""A store that anybody may have written, opened as data: what is in it is checked before it is used, and nothing in it
can keep a reader busy.

SQLite runs what a file's schema says: a view can go on for ever, a virtual table or a generated column can compute
anything. So only plain tables with the columns and keys of `schema.py` are accepted. Values have the kinds that a query
names; their bytes, the rows of an answer and its time are limited.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.characters import visible
from posttrain.errors import UserError
from posttrain.tracking.schema import ADDED, SCHEMA, UPGRADES, VERSION
from posttrain.tracking.typed import Kind

MOST_BYTES = 64 * 2**20  # texts and blobs of one answer
LARGEST = 16 * 2**20  # bytes of one value
MOST_ROWS = 100_000  # of one answer
SECONDS = 10.0  # for one answer
WORK = 20_000  # instructions of SQLite's machine between two looks at the clock


class NotBegunError(UserError):
    """The store is being made: its first transaction is still open."""


class CheckedStore:
    """A read-only connection that neither blocks a writer nor changes a byte. Raises UserError, here and from `rows`,
    for what no posttrain wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # WAL wants its two side files even to read; where none can be made and none is there, the file alone is
        # complete.
        alone = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
        uri = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
        self._until = self._end = math.inf
        self._db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
        try:
            self._version = self._opened()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{self.path} is not a run store ({error})") from error
        except BaseException:
            self._db.close()
            raise

    def rows(self, query: str, parameters: Any = (), *, kinds: Sequence[Kind], most: int = MOST_ROWS) -> Iterator[tuple[Any, ...]]:
        """The rows of an answer, each column of its kind. Raises UserError for anything else, and where the answer goes
        on and on."""
        self._until = min(time.monotonic() + SECONDS, self._end)
        count = size = 0
        try:
            cursor = self._db.execute(query, parameters)
            for row in cursor:
                count += 1
                size += sum(len(value) for value in row if isinstance(value, str | bytes))
                if count > most or size > MOST_BYTES:
                    raise self.damaged(f"over {most:,} rows in one place" if count > most else f"over {MOST_BYTES >> 20} MiB in one place")
                yield self._typed(row, kinds, cursor)
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.DatabaseError, MemoryError) as error:
            raise self._explained(error) from error

    def row(self, query: str, parameters: Any = (), *, kinds: Sequence[Kind]) -> tuple[Any, ...] | None:
        with contextlib.closing(self.rows(query, parameters, kinds=kinds)) as found:  # type: ignore[type-var]
            return next(found, None)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All answers of the block together take no longer."""
        self._end = time.monotonic() + seconds
        try:
            yield
        finally:
            self._end = math.inf

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged, or no posttrain wrote it: {what}")

    def close(self) -> None:
        self._db.close()

    def _typed(self, row: tuple[Any, ...], kinds: Sequence[Kind], cursor: sqlite3.Cursor) -> tuple[Any, ...]:
        place = 0
        try:
            values = []
            for place, (kind, value) in enumerate(zip(kinds, row, strict=True)):  # noqa: B007
                values.append(kind(value))
        except ValueError as error:
            found, name = row[place], cursor.description[place][0]
            said = f"{len(found):,} bytes" if isinstance(found, bytes) else visible(repr(found if not isinstance(found, str) else found[:40]))
            raise self.damaged(f"a value of {name} is no {str(error).removeprefix('a ')}: {said}") from error
        return tuple(values)

    def _explained(self, error: Exception) -> Exception:
        if "interrupted" not in str(error):
            return self.damaged(str(error) or type(error).__name__) if "locked" not in str(error) else UserError(f"{self.path}: {error}; try again")
        if time.monotonic() < self._until:  # the clock did not stop it: Ctrl-C did, inside of `_is_over`, whose exceptions SQLite drops
            raise KeyboardInterrupt
        return self.damaged(f"an answer took over {SECONDS:.0f} s, as no run does")

    def _is_over(self) -> bool:
        return time.monotonic() > self._until

    def _opened(self) -> int:
        """The version of the schema, once everything about the file is checked that is checked once."""
        self._db.set_progress_handler(self._is_over, WORK)
        self._until = time.monotonic() + SECONDS
        self._db.execute("PRAGMA trusted_schema = OFF")
        self._db.execute("PRAGMA query_only = ON")
        if sys.version_info >= (3, 11):
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
        else:
            self._db.execute(f"PRAGMA hard_heap_limit = {8 * LARGEST}")
        if sys.version_info >= (3, 12):
            self._db.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION and version not in UPGRADES:
            if version == 0:
                raise NotBegunError(f"{self.path} is empty yet: the run has not begun")
            raise UserError(f"{self.path} has schema version {version}, this posttrain reads up to {VERSION}: use the posttrain that wrote it")
        self._check_tables(version)
        return int(version)

    def _check_tables(self, version: int) -> None:
        found = {}
        for kind, name, sql in self._db.execute("SELECT type, name, sql FROM sqlite_master LIMIT 1000"):
            if kind not in ("table", "index") or str(sql).upper().startswith("CREATE VIRTUAL"):
                raise self.damaged(f"it holds the {kind if kind != 'table' else 'virtual table'} '{name}'")
            if kind == "table":
                found[name] = sql
        for table, wanted in tables(version).items():
            if table not in found:
                raise self.damaged(f"it has no table '{table}'")
            columns = {}
            for _, name, _, _, _, key, hidden in self._db.execute(f"PRAGMA table_xinfo({table})"):
                if hidden:
                    raise self.damaged(f"the column '{name}' of '{table}' is computed")
                columns[name] = key
            for name, key in wanted.items():
                if columns.get(name) != key:
                    raise self.damaged(f"the table '{table}' has no {'key ' if key else ''}column '{name}'")


@functools.cache
def tables(version: int) -> dict[str, dict[str, int]]:
    """table -> column -> its place in the table's key, or 0: what a store of that version must have."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {name: {row[1]: row[5] for row in db.execute(f"PRAGMA table_xinfo({name})")} for name in names}
    later = {added for since, parts in ADDED.items() if since > version for added in parts}
    return {
        table: {name: key for name, key in found.items() if f"{table}.{name}" not in later} for table, found in columns.items() if table not in later
    }
