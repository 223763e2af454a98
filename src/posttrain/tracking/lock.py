"""Who writes a run: one process at a time. An empty database beside the store is kept locked for as long as its writer
has the store open.

The system releases such a lock when its process ends, however it ends, so a run that died stands in nobody's way;
SQLite knows how each system locks. The file stays: to remove it would let two writers hold a lock of the same name.
Within a process the newest writer has it, so that a training that broke can be begun again where it stands.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from weakref import WeakValueDictionary

from posttrain.errors import TrainingError, UserError
from posttrain.tracking.schema import LOCK_NAME

PATIENCE = 1.0  # seconds: who looks whether it is held holds it up for a moment


class WriterLock:
    """Held from its making until `release`. Raises UserError while another process has it, and where nothing can be
    locked."""

    def __init__(self, store: Path) -> None:
        path = _beside(store)
        if (older := _OURS.pop(path, None)) is not None:
            older.release()
        try:
            self._db = _locked(path)
        except sqlite3.Error as error:
            if is_refused(error):
                raise TrainingError(f"cannot write {path} ({error}): free some space, then start again") from error
            raise in_use(store) if _is_held(error) else UserError(f"{path} cannot be locked ({error}): choose another output_dir") from error
        _OURS[path] = self

    def release(self) -> None:
        self._db.close()


_OURS: WeakValueDictionary[Path, WriterLock] = WeakValueDictionary()  # those of this process


def is_written(store: Path) -> bool:
    """Whether a training writes this store now."""
    path = _beside(store)
    if not path.is_file():
        return False
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0)
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as error:
        return _is_held(error)
    finally:
        db.close()
    return False


def in_use(store: Path) -> UserError:
    return UserError(f"{store.parent}: another training writes here. Wait until it has ended, or choose another output_dir")


def is_refused(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the disk takes no more."""
    return any(words in str(error) for words in ("is full", "disk I/O error"))


def _locked(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=MEMORY")  # nothing is written, so no journal either
        db.execute("BEGIN EXCLUSIVE")
    except BaseException:
        db.close()
        raise
    return db


def _is_held(error: sqlite3.Error) -> bool:
    return "database is locked" in str(error)


def _beside(store: Path) -> Path:
    return store.with_name(LOCK_NAME).resolve()
