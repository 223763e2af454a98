"""Reading a run, also one that is being written: a read-only connection that neither blocks the writer nor changes a byte.

Lists (`steps`, `groups`, `rollouts`, `series`) go through an index and touch no blob; `tokens` reads those of one rollout.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.tracking.blobs import unpack_floats, unpack_halves, unpack_ids
from posttrain.tracking.events import RolloutKey
from posttrain.tracking.schema import FILE_NAME, UPGRADES, VERSION


@dataclass(frozen=True)
class Point:
    """One place of a curve: up to `count` logged values that ended at `step`."""

    step: int
    mean: float | None  # of the finite values; None: there was none
    low: float | None
    high: float | None
    count: int
    not_finite: int  # how many of them were NaN or infinite


@dataclass(frozen=True)
class GroupRow:
    step: int
    group: int
    task_id: int
    prompt: str
    size: int
    mean: float | None  # of the scored rewards; None: none was scored
    std: float | None  # sample standard deviation; None: fewer than two were scored


@dataclass(frozen=True)
class RolloutRow:
    key: RolloutKey
    text: str
    stop: str  # a StopReason's value
    reward: float | None
    scores: dict[str, float | None]
    advantage: float
    policy_version: int
    length: int  # tokens


@dataclass(frozen=True)
class EpisodeRow:
    """What a rollout in an environment was, turn by turn."""

    turns: int  # of the policy
    info: dict[str, float]  # what the environment reported
    messages: list[dict[str, Any]] | None
    runs: list[int] | None  # tokens in a row that the policy sampled, then that it was given, and so on; None: an old run did not keep it


@dataclass(frozen=True)
class TokenUpdate:
    """What the update of `step` saw at each token. None: not computed."""

    step: int
    logps: list[float]
    ratio: list[float] | None
    entropy: list[float] | None
    kl: list[float] | None
    advantage: list[float] | None  # None: the rollout's holds for all of its tokens


@dataclass(frozen=True)
class Tokens:
    """A rollout token by token: the engine's log-probs, then one entry per update that was recorded."""

    token_ids: list[int]
    logprobs: list[float]
    updates: list[TokenUpdate]


@dataclass(frozen=True)
class Note:
    step: int
    at: float  # seconds since the epoch
    kind: str
    text: str


# The names of a million scalars without reading them all: each step of the recursion jumps to the next name in the index.
_NAMES = """
WITH RECURSIVE names(name) AS (
    SELECT min(name) FROM scalars UNION ALL SELECT (SELECT min(name) FROM scalars WHERE name > names.name) FROM names WHERE names.name IS NOT NULL)
SELECT name FROM names WHERE name IS NOT NULL
"""
_SINCE = "SELECT step, value, value, value, 1, flag IS NOT NULL FROM scalars WHERE name = ? AND step > ? ORDER BY step"
_SERIES = """
SELECT max(step), avg(value), min(value), max(value), count(*), count(flag)
FROM (SELECT step, value, flag, ntile(?) OVER (ORDER BY step) AS bucket FROM scalars WHERE name = ?) GROUP BY bucket ORDER BY 1
"""
_GROUPS = "SELECT step, grp, task_id, prompt, size, mean, std FROM groups WHERE step = ? ORDER BY grp"
_ROLLOUTS = """
SELECT step, grp, idx, text, stop, reward, scores, advantage, policy_version, length FROM rollouts WHERE step = ? AND grp = ? ORDER BY idx
"""
_TOKENS = "SELECT token_ids, logprobs FROM rollout_tokens WHERE step = ? AND grp = ? AND idx = ?"
_DETAILS = "SELECT updated_at, logps, ratio, entropy, kl, advantage FROM token_details WHERE step = ? AND grp = ? AND idx = ? ORDER BY updated_at"


class NotBegunError(UserError):
    """The store is being made: its first transaction is still open."""


class RunReader:
    """Opens the store of a run directory (or the file itself). Each call sees the steps committed so far, and only whole ones."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / FILE_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"{path} holds no {FILE_NAME}: give the output_dir of a run that has started")
        # WAL wants its two side files even to read; where none can be made and none is there, the file alone is complete.
        alone = not os.access(self.path.parent, os.W_OK) and not Path(f"{self.path}-wal").exists()
        uri = f"{self.path.resolve().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
        self._db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{self.path} is not a run store ({error})") from error
        if version != VERSION and version not in UPGRADES:
            self._db.close()
            if version == 0:
                raise NotBegunError(f"{self.path} is empty yet: the run has not begun")
            raise UserError(f"{self.path} has schema version {version}, this posttrain reads up to {VERSION}: use the posttrain that wrote it")
        self._version: int = version

    def meta(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM meta ORDER BY key")}

    def changes(self) -> int:
        """A number that changes whenever the writer commits."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def newest(self) -> tuple[int, float, float]:
        """(step, seconds since the epoch when it was written, seconds of training up to it); zeros for an empty store."""
        return self._db.execute("SELECT step, at, seconds FROM steps ORDER BY step DESC LIMIT 1").fetchone() or (0, 0.0, 0.0)

    def steps(self) -> list[int]:
        """Committed optimizer steps, ascending."""
        return [step for (step,) in self._db.execute("SELECT step FROM steps ORDER BY step")]

    def scalar_names(self) -> list[str]:
        return [name for (name,) in self._db.execute(_NAMES)]

    def series(self, name: str, max_points: int = 500) -> list[Point]:
        """A curve in at most `max_points` equally filled buckets. Spikes stay visible in `low` and `high`."""
        return [Point(*row) for row in self._db.execute(_SERIES, (max_points, name))]

    def since(self, name: str, step: int) -> list[Point]:
        """What was logged after `step`, value by value."""
        return [Point(*row) for row in self._db.execute(_SINCE, (name, step))]

    def groups(self, step: int) -> list[GroupRow]:
        return [GroupRow(*row) for row in self._db.execute(_GROUPS, (step,))]

    def rollouts(self, step: int, group: int) -> list[RolloutRow]:
        return [
            RolloutRow(RolloutKey(*row[:3]), row[3], row[4], row[5], json.loads(row[6]), *row[7:])
            for row in self._db.execute(_ROLLOUTS, (step, group))
        ]

    def episode(self, key: RolloutKey) -> EpisodeRow | None:
        """None: one question with one answer, outside of any environment."""
        if self._version < 2:
            return None
        runs = "runs" if self._version >= 3 else "NULL"
        row = self._db.execute(f"SELECT turns, info, messages, {runs} FROM episodes WHERE step = ? AND grp = ? AND idx = ?", key).fetchone()
        if row is None:
            return None
        return EpisodeRow(row[0], json.loads(row[1]), json.loads(row[2]), None if row[3] is None else json.loads(row[3]))

    def tokens(self, key: RolloutKey) -> Tokens | None:
        """None: the size cap left this rollout's tokens out."""
        row = self._db.execute(_TOKENS, key).fetchone()
        if row is None:
            return None
        query = _DETAILS if self._version >= 3 else _DETAILS.replace("advantage", "NULL")
        updates = [
            TokenUpdate(step, unpack_floats(logps), unpack_halves(ratio, offset=1.0), *(unpack_halves(part) for part in rest))
            for step, logps, ratio, *rest in self._db.execute(query, key)
        ]
        return Tokens(unpack_ids(row[0]), unpack_floats(row[1]), updates)

    def vocabulary(self, token_ids: Iterable[int]) -> dict[int, str]:
        """What these ids say, as far as the run recorded it (old runs did not)."""
        if self._version < 3:
            return {}
        found = {}
        for token in set(token_ids):
            row = self._db.execute("SELECT text FROM vocabulary WHERE id = ?", (token,)).fetchone()
            if row is not None:
                found[token] = row[0]
        return found

    def notes(self) -> list[Note]:
        return [Note(*row) for row in self._db.execute("SELECT step, at, kind, text FROM notes ORDER BY id")]

    def close(self) -> None:
        self._db.close()
