"""The run's memory, `run.sqlite`: append-only, one transaction per step, so that a step is all there or not at all,
whatever kills the process.

WAL with synchronous=FULL: a commit survives a power cut, hence the store is never older than a checkpoint that was
written after it. One fsync per step is nothing beside a training step. Readers (`reader.py`) never block the writer nor
wait for it.

Kept for every step: scalars, groups, each completion's text, scores and advantage, and the messages of an episode in an
environment. Per-token records (ids and log-probs of every rollout, `TokenDetail`s of those that the trainer hands in)
are kept until they add up to `max_token_bytes`; from then on only on steps that are multiples of `SPARSE`, and a note
of the kind "cap" says so.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from posttrain.characters import encodable
from posttrain.errors import TrainingError, UserError
from posttrain.secrets import redacted, redacted_message
from posttrain.tracking.blobs import pack_floats, pack_halves, pack_ids
from posttrain.tracking.lock import WriterLock, is_refused
from posttrain.tracking.schema import SCHEMA, STEP_COLUMN, UPGRADES, VERSION
from posttrain.types import Completion, Group

SPARSE = 50


class CompletionKey(NamedTuple):
    """Where a rollout stands: the step that collected it, its group in that step, its number in the group."""

    step: int
    group: int
    completion: int


@dataclass(frozen=True)
class CollectedGroup:
    """A scored group with what training made of it."""

    group: Group
    advantages: Sequence[float]  # [G]
    prompt: str  # as the model saw it, decoded


@dataclass(frozen=True)
class TokenDetail:
    """What one update saw at each of the R tokens of a rollout. None: not computed."""

    key: CompletionKey
    logps: Sequence[float]  # [R] under the policy being updated
    ratio: Sequence[float] | None  # [R]
    entropy: Sequence[float] | None  # [R]
    kl: Sequence[float] | None  # [R] against the reference
    advantage: Sequence[float] | None = None  # [R] where every token has its own; None: the rollout's holds for all of them


@dataclass
class StepRecord:
    """All that one transaction writes about an optimizer step."""

    step: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    groups: list[CollectedGroup] = field(default_factory=list)
    details: list[TokenDetail] = field(default_factory=list)
    seconds: float = 0.0  # of training since the run's first start, pauses between resumes not counted
    vocabulary: dict[int, str] = field(default_factory=dict)  # what token ids say, of those that no earlier record of this process named


class RunStore:
    """The one writer of a run. Raises UserError for a file that is not a run store or that another process writes,
    TrainingError when the disk refuses."""

    def __init__(self, path: str | Path, *, max_token_bytes: int = 512 * 2**20) -> None:
        self.path = Path(path)
        self.max_token_bytes = max_token_bytes
        self._lock = threading.Lock()  # notes may come from a reward's thread
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = WriterLock(self.path)
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            if is_refused(error):
                raise TrainingError(f"cannot write {self.path} ({error}): free some space, then start again") from error
            raise UserError(f"{self.path} cannot be used as a run store ({error}): move it away, or choose another output_dir") from error
        self._token_bytes: int = self._db.execute("SELECT coalesce(sum(token_bytes), 0) FROM steps").fetchone()[0]

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and tables == 0:
            self._db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
        elif version in UPGRADES:
            statements = [f"{statement};" for old in range(version, VERSION) for statement in UPGRADES[old]]
            self._db.executescript(f"BEGIN IMMEDIATE;{''.join(statements)}PRAGMA user_version={VERSION};COMMIT;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"schema version {version}, this posttrain writes {VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise TrainingError(f"cannot write {self.path} ({error}): make room or end what holds it, then resume") from error
            finally:
                if self._db.in_transaction:  # left by an exception, Ctrl-C included
                    self._db.execute("ROLLBACK")

    def write_meta(self, values: Mapping[str, Any]) -> None:
        """Replace metadata, each value as JSON (what JSON lacks, as its `str`), without secrets."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, json.dumps(redacted(value), default=str)) for key, value in values.items()]
            )

    def note(self, step: int, kind: str, text: str) -> None:
        """An event in words (a resume, the first traceback of a broken reward, ...), written at once."""
        with self._transaction() as db:
            self._insert_note(db, step, kind, text)

    def write(self, record: StepRecord) -> None:
        """One transaction. A second record of a step adds to the first; a scalar or a detail given twice keeps its last
        value."""
        keep_tokens = self._token_bytes < self.max_token_bytes or record.step % SPARSE == 0
        with self._transaction() as db:
            scalars = [(name, record.step, *_finite(value)) for name, value in record.scalars.items()]
            db.executemany("INSERT OR REPLACE INTO scalars VALUES (?, ?, ?, ?)", scalars)
            for number, collected in enumerate(record.groups):
                self._insert_group(db, record.step, number, collected)
            added = self._insert_tokens(db, record) if keep_tokens else 0
            db.executemany("INSERT OR REPLACE INTO vocabulary VALUES (?, ?)", [(token, encodable(text)) for token, text in record.vocabulary.items()])
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?) ON CONFLICT (step) DO UPDATE SET seconds=excluded.seconds, token_bytes=token_bytes+excluded.token_bytes",
                (record.step, time.time(), record.seconds, added),
            )
            if self._token_bytes < self.max_token_bytes <= self._token_bytes + added:
                text = f"per-token records reached {self.max_token_bytes / 2**20:.3g} MiB: from here on only every {SPARSE}th step keeps them"
                self._insert_note(db, record.step, "cap", text)
        self._token_bytes += added

    def last(self) -> tuple[int, float]:
        """The newest step and the seconds of training up to it; (0, 0.0) for an empty store."""
        row = self._db.execute("SELECT step, seconds FROM steps ORDER BY step DESC LIMIT 1").fetchone()
        return row or (0, 0.0)

    def last_scalars(self) -> dict[str, float | None]:
        """The newest value of every scalar; None where it was not finite."""
        return dict(self._db.execute("SELECT name, value FROM (SELECT name, value, max(step) FROM scalars GROUP BY name)"))

    def sums(self, pattern: str) -> dict[str, float]:
        """The sum over all steps of every scalar whose name matches the GLOB pattern."""
        return dict(self._db.execute("SELECT name, sum(value) FROM scalars WHERE name GLOB ? GROUP BY name", (pattern,)))

    def truncate_after(self, step: int) -> None:
        """Forget what came after `step`: a resumed run writes it anew."""
        with self._transaction() as db:
            for table, column in STEP_COLUMN.items():
                db.execute(f"DELETE FROM {table} WHERE {column} > ?", (step,))
            self._token_bytes = db.execute("SELECT coalesce(sum(token_bytes), 0) FROM steps").fetchone()[0]

    def clear(self) -> None:
        """Forget everything: a new run begins in this directory. The file stays, so that open readers see it happen."""
        with self._transaction() as db:
            for table in (*STEP_COLUMN, "meta", "vocabulary"):
                db.execute(f"DELETE FROM {table}")
            self._token_bytes = 0

    def close(self) -> None:
        self._db.close()
        self._writer.release()

    @staticmethod
    def _insert_note(db: sqlite3.Connection, step: int, kind: str, text: str) -> None:
        db.execute("INSERT INTO notes (step, at, kind, text) VALUES (?, ?, ?, ?)", (step, time.time(), kind, encodable(redacted_message(text))))

    @staticmethod
    def _insert_group(db: sqlite3.Connection, step: int, number: int, collected: CollectedGroup) -> None:
        group = collected.group
        scored = [reward for reward in group.rewards if reward is not None]
        mean = fmean(scored) if scored else None
        std = stdev(scored) if len(scored) > 1 else None
        row = (step, number, group.task.id, encodable(collected.prompt), len(group.completions), mean, std)
        db.execute("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        pairs = zip(group.completions, collected.advantages, strict=True)
        rows = [(step, number, index, *_rollout_row(completion, advantage)) for index, (completion, advantage) in enumerate(pairs)]
        db.executemany("INSERT OR REPLACE INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        episodes = [
            (
                step,
                number,
                index,
                completion.turns,
                json.dumps(completion.info),
                json.dumps(completion.messages, default=str),
                json.dumps(_runs(completion.sampled)),
            )
            for index, completion in enumerate(group.completions)
            if completion.turns != 1 or completion.info or not all(completion.sampled)  # otherwise the text says it all
        ]
        db.executemany("INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?)", episodes)

    @staticmethod
    def _insert_tokens(db: sqlite3.Connection, record: StepRecord) -> int:
        """The bytes of all blobs written."""
        tokens = [
            (record.step, number, index, pack_ids(completion.token_ids), pack_floats(completion.logps))
            for number, collected in enumerate(record.groups)
            for index, completion in enumerate(collected.group.completions)
        ]
        details = [
            (
                *d.key,
                record.step,
                pack_floats(d.logps),
                pack_halves(d.ratio, offset=1.0),
                pack_halves(d.entropy),
                pack_halves(d.kl),
                pack_halves(d.advantage),
            )
            for d in record.details
        ]
        db.executemany("INSERT OR REPLACE INTO rollout_tokens VALUES (?, ?, ?, ?, ?)", tokens)
        db.executemany("INSERT OR REPLACE INTO token_details VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", details)
        return sum(len(value) for row in (*tokens, *details) for value in row if isinstance(value, bytes))


def _finite(value: float) -> tuple[float | None, str | None]:
    """SQLite has no NaN: a value that is not finite becomes NULL with its name ('nan', 'inf', '-inf') beside it."""
    value = float(value)
    return (value, None) if math.isfinite(value) else (None, str(value))


def _runs(sampled: Sequence[bool]) -> list[int]:
    """How many tokens in a row the policy sampled, then how many it was given, and so on: [T, T, F, T] is [2, 1, 1]."""
    runs = [0]
    for token in sampled:
        if token != (len(runs) % 2 == 1):
            runs.append(0)
        runs[-1] += 1
    return runs


def _rollout_row(completion: Completion, advantage: float) -> tuple[Any, ...]:
    scores = json.dumps(completion.scores)
    return (
        completion.reward,
        advantage,
        completion.stop.value,
        completion.policy_version,
        len(completion.token_ids),
        scores,
        encodable(completion.text),
    )
