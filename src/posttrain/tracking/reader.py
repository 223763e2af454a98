"""Reading a run, also one that is being written: a read-only connection that neither blocks the writer nor changes a
byte.

Lists (`steps`, `groups`, `rollouts`, `series`) go through an index and touch no blob; `tokens` reads those of one
rollout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.io import mapping, parsed
from posttrain.tracking.blobs import unpack_floats, unpack_halves, unpack_ids
from posttrain.tracking.checked import CheckedStore
from posttrain.tracking.events import CompletionKey
from posttrain.tracking.schema import FILE_NAME
from posttrain.tracking.typed import blob, counts, messages, optional, real, scores, text, whole


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
class CompletionRow:
    key: CompletionKey
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
    logps: list[float]
    updates: list[TokenUpdate]


@dataclass(frozen=True)
class Note:
    step: int
    at: float  # seconds since the epoch
    kind: str
    text: str


# The names of a million scalars without reading them all: each step of the recursion jumps to the next name in the
# index.
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


_POINT = (whole, optional(real), optional(real), optional(real), whole, whole)
_GROUP = (whole, whole, whole, text, whole, optional(real), optional(real))
_ROLLOUT = (whole, whole, whole, text, text, optional(real), scores, real, whole, whole)
_BLOBS = (blob, optional(blob), optional(blob), optional(blob), optional(blob))
LONGEST_NAME = 1000  # characters of a scalar's name
MOST_NAMES = 2000
MOST_GROUPS = MOST_COMPLETIONS = 20_000  # groups of a step, completions of a group
MOST_NOTES = 10_000  # the newest are read
AT_ONCE = 100_000  # values of a curve that `since` reads; the rest is there for the next call


class RunReader(CheckedStore):
    """Opens the store of a run directory (or the file itself). Each call sees the steps committed so far, and only
    whole ones.

    A store may be a stranger's: what no posttrain wrote raises UserError, see `checked.py`.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        store = path / FILE_NAME if path.is_dir() else path
        if not store.is_file():
            raise UserError(f"{path} holds no {FILE_NAME}: give the output_dir of a run that has started")
        super().__init__(store)

    def meta(self) -> dict[str, Any]:
        return dict(self.rows("SELECT key, value FROM meta ORDER BY key", kinds=(text, parsed), most=1000))

    def changes(self) -> int:
        """A number that changes whenever the writer commits."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def newest(self) -> tuple[int, float, float]:
        """(step, seconds since the epoch when it was written, seconds of training up to it); zeros for an empty
        store."""
        row = self.row("SELECT step, at, seconds FROM steps ORDER BY step DESC LIMIT 1", kinds=(whole, real, real))
        return (0, 0.0, 0.0) if row is None else (row[0], row[1], row[2])

    def steps(self) -> list[int]:
        """Committed optimizer steps, ascending."""
        return [step for (step,) in self.rows("SELECT step FROM steps ORDER BY step", kinds=(whole,), most=2_000_000)]

    def scalar_names(self) -> list[str]:
        names = [name for (name,) in self.rows(_NAMES, kinds=(text,), most=MOST_NAMES)]
        if any(len(name) > LONGEST_NAME for name in names):
            raise self.damaged(f"the name of a scalar has over {LONGEST_NAME} characters")
        return names

    def series(self, name: str, max_points: int = 500) -> list[Point]:
        """A curve in at most `max_points` equally filled buckets. Spikes stay visible in `low` and `high`."""
        return [Point(*row) for row in self.rows(_SERIES, (max_points, name), kinds=_POINT)]

    def since(self, name: str, step: int) -> list[Point]:
        """What was logged after `step`, value by value; of very much the earlier part."""
        return [Point(*row) for row in self.rows(f"{_SINCE} LIMIT {AT_ONCE}", (name, step), kinds=_POINT)]

    def groups(self, step: int) -> list[GroupRow]:
        return [GroupRow(*row) for row in self.rows(_GROUPS, (step,), kinds=_GROUP, most=MOST_GROUPS)]

    def completions(self, step: int, group: int, characters: int | None = None) -> list[CompletionRow]:
        """`characters`: how many of them all texts together may have, each the same part; the rest is left out. None:
        all."""
        query = _ROLLOUTS
        if characters is not None:
            found = self.row("SELECT count(*) FROM rollouts WHERE step = ? AND grp = ?", (step, group), kinds=(whole,))
            query = _ROLLOUTS.replace("text,", f"substr(text, 1, {characters // max(found[0] if found else 1, 1)}),", 1)
        return [CompletionRow(CompletionKey(*row[:3]), *row[3:]) for row in self.rows(query, (step, group), kinds=_ROLLOUT, most=MOST_COMPLETIONS)]

    def episode(self, key: CompletionKey) -> EpisodeRow | None:
        """None: one question with one answer, outside of any environment."""
        if self._version < 2:
            return None
        runs = "runs" if self._version >= 3 else "NULL"
        query = f"SELECT turns, info, messages, {runs} FROM episodes WHERE step = ? AND grp = ? AND idx = ?"
        row = self.row(query, key, kinds=(whole, mapping, messages, optional(counts)))
        return None if row is None else EpisodeRow(*row)

    def tokens(self, key: CompletionKey) -> Tokens | None:
        """None: the size cap left this rollout's tokens out."""
        row = self.row(_TOKENS, key, kinds=(blob, blob))
        if row is None:
            return None
        query = _DETAILS if self._version >= 3 else _DETAILS.replace("advantage", "NULL")
        count, seen = len(row[0]) // 4, list(self.rows(query, key, kinds=(whole, *_BLOBS)))
        sizes = [len(part) // width for _, *parts in seen for width, part in zip((4, 2, 2, 2, 2), parts, strict=True) if part is not None]
        if any(size != count for size in (len(row[1]) // 4, *sizes)) or len(row[0]) % 4 or len(row[1]) % 4:
            raise self.damaged(f"the numbers of the tokens of completion {tuple(key)} are not as many as its tokens")
        updates = [
            TokenUpdate(step, unpack_floats(logps), unpack_halves(ratio, offset=1.0), *(unpack_halves(part) for part in rest))
            for step, logps, ratio, *rest in seen
        ]
        return Tokens(unpack_ids(row[0]), unpack_floats(row[1]), updates)

    def size(self, key: CompletionKey) -> int:
        """Bytes that `tokens` and `episode` would read."""
        parts = ["SELECT length(token_ids) + length(logprobs) FROM rollout_tokens"]
        parts.append("SELECT sum(length(logps) + 2 * coalesce(length(entropy), 0) + coalesce(length(kl), 0)) FROM token_details")
        parts += ["SELECT length(messages) + length(info) FROM episodes"] if self._version >= 2 else []
        found = [self.row(f"{part} WHERE step = ? AND grp = ? AND idx = ?", key, kinds=(optional(whole),)) for part in parts]
        return sum(row[0] for row in found if row is not None and row[0] is not None)

    def vocabulary(self, token_ids: Iterable[int]) -> dict[int, str]:
        """What these ids say, as far as the run recorded it (old runs did not)."""
        if self._version < 3:
            return {}
        found = {}
        for token in set(token_ids):
            row = self.row("SELECT text FROM vocabulary WHERE id = ?", (token,), kinds=(text,))
            if row is not None:
                found[token] = row[0]
        return found

    def notes(self) -> list[Note]:
        query = f"SELECT step, at, kind, text FROM (SELECT * FROM notes ORDER BY id DESC LIMIT {MOST_NOTES}) ORDER BY id"
        return [Note(*row) for row in self.rows(query, kinds=(whole, real, text, text))]
