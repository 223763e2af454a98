"""Reading a run, also one that is being written: a read-only connection that neither blocks the writer nor changes a byte.

Lists (`steps`, `groups`, `rollouts`, `series`) go through an index and touch no blob; `tokens` reads those of one rollout.
"""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.tracking.blobs import unpack_floats, unpack_halves, unpack_ids
from posttrain.tracking.events import RolloutKey
from posttrain.tracking.schema import FILE_NAME, VERSION


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


@dataclass(frozen=True)
class TokenUpdate:
    """What the update of `step` saw at each token. None: not computed."""

    step: int
    logps: list[float]
    ratio: list[float] | None
    entropy: list[float] | None
    kl: list[float] | None


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
_SERIES = """
SELECT max(step), avg(value), min(value), max(value), count(*), count(flag)
FROM (SELECT step, value, flag, ntile(?) OVER (ORDER BY step) AS bucket FROM scalars WHERE name = ?) GROUP BY bucket ORDER BY 1
"""
_GROUPS = "SELECT step, grp, task_id, prompt, size, mean, std FROM groups WHERE step = ? ORDER BY grp"
_ROLLOUTS = """
SELECT step, grp, idx, text, stop, reward, scores, advantage, policy_version, length FROM rollouts WHERE step = ? AND grp = ? ORDER BY idx
"""
_TOKENS = "SELECT token_ids, logprobs FROM rollout_tokens WHERE step = ? AND grp = ? AND idx = ?"
_DETAILS = "SELECT updated_at, logps, ratio, entropy, kl FROM token_details WHERE step = ? AND grp = ? AND idx = ? ORDER BY updated_at"


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
        if version != VERSION:
            self._db.close()
            raise UserError(f"{self.path} has schema version {version}, this posttrain reads {VERSION}: use the posttrain that wrote it")

    def meta(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM meta ORDER BY key")}

    def steps(self) -> list[int]:
        """Committed optimizer steps, ascending."""
        return [step for (step,) in self._db.execute("SELECT step FROM steps ORDER BY step")]

    def scalar_names(self) -> list[str]:
        return [name for (name,) in self._db.execute(_NAMES)]

    def series(self, name: str, max_points: int = 500) -> list[Point]:
        """A curve in at most `max_points` equally filled buckets. Spikes stay visible in `low` and `high`."""
        return [Point(*row) for row in self._db.execute(_SERIES, (max_points, name))]

    def groups(self, step: int) -> list[GroupRow]:
        return [GroupRow(*row) for row in self._db.execute(_GROUPS, (step,))]

    def rollouts(self, step: int, group: int) -> list[RolloutRow]:
        return [
            RolloutRow(RolloutKey(*row[:3]), row[3], row[4], row[5], json.loads(row[6]), *row[7:])
            for row in self._db.execute(_ROLLOUTS, (step, group))
        ]

    def episode(self, key: RolloutKey) -> EpisodeRow | None:
        """None: one question with one answer, outside of any environment."""
        row = self._db.execute("SELECT turns, info, messages FROM episodes WHERE step = ? AND grp = ? AND idx = ?", key).fetchone()
        return None if row is None else EpisodeRow(row[0], json.loads(row[1]), json.loads(row[2]))

    def tokens(self, key: RolloutKey) -> Tokens | None:
        """None: the size cap left this rollout's tokens out."""
        row = self._db.execute(_TOKENS, key).fetchone()
        if row is None:
            return None
        updates = [
            TokenUpdate(step, unpack_floats(logps), unpack_halves(ratio, offset=1.0), unpack_halves(entropy), unpack_halves(kl))
            for step, logps, ratio, entropy, kl in self._db.execute(_DETAILS, key)
        ]
        return Tokens(unpack_ids(row[0]), unpack_floats(row[1]), updates)

    def notes(self) -> list[Note]:
        return [Note(*row) for row in self._db.execute("SELECT step, at, kind, text FROM notes ORDER BY id")]

    def close(self) -> None:
        self._db.close()
