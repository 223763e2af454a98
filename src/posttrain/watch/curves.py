"""The curves of one run in bounded memory, also while it is being written: at most `2 * POINTS` points a curve, however
many steps there are.

A point is a mean with the least and the most of what it stands for, so a spike stays a spike. What is new is read
through the index and appended; where a curve gets too long, neighbours are merged in pairs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.tracking.browse import Browser
from posttrain.tracking.checked import NotBegunError
from posttrain.tracking.reader import Note, Point
from posttrain.tracking.schema import FILE_NAME, SUMMARY_NAME

POINTS = 200  # a curve on a screen
SECONDS = 120.0  # that reading what is new may take in all
REST = 60.0  # seconds before a store with a fault is looked at again
_TELLTALES = {"num_ppo_epochs": "PPO", "normalize_advantages": "RLOO", "scale_rewards": "GRPO"}  # settings that only one method has


class WatchedRun:
    """One run directory. Its store may not be there yet; it may grow, and be restarted, at any time."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.reader: Browser | None = None  # None: training has not begun
        self.meta: dict[str, Any] = {}
        self.notes: list[Note] = []
        self.step, self.written_at, self.seconds = 0, 0.0, 0.0
        self.has_ended = False  # by itself or by Ctrl-C; what broke or was killed has not
        self.fault = ""  # why its store cannot be read
        self._look_again = 0.0  # after a fault: the clock reading from which on it is tried again
        self._curves: dict[str, list[Point]] = {}
        self._seen: int | None = None  # of the reader's `changes`
        self._file = 0  # the store's number on its disk

    @property
    def store(self) -> Path:
        return self.directory / FILE_NAME

    def refresh(self) -> bool:
        """Read what is new. True: something is. Raises UserError for a store that no posttrain wrote."""
        if not self.store.is_file():
            return False
        has_ended = (self.directory / SUMMARY_NAME).is_file()  # looked for first: then the steps read below are all of them
        if self.reader is None or self.store.stat().st_ino != self._file:  # removed and written anew
            try:
                self._open()
            except NotBegunError:
                return False
        assert self.reader is not None
        self.has_ended, changes = has_ended, self.reader.changes()
        if changes == self._seen:
            return False
        with self.reader.within(SECONDS):
            self._read(self.reader)
        self._seen = changes
        return True

    def looked_at(self) -> bool:
        """As `refresh`, for a page that stays: a fault is kept in words, and the store is tried again later, so that it
        takes little of the time."""
        started = time.monotonic()
        if self.fault and started < self._look_again:
            return False
        before, self.fault = self.fault, ""
        try:
            return self.refresh() or bool(before)
        except UserError as error:
            if self.reader is not None:
                self.reader.close()
            self.reader, self._seen, self.fault = None, None, str(error)
            self._look_again = time.monotonic() + max(REST, 20 * (time.monotonic() - started))
            return self.fault != before

    def _read(self, reader: Browser) -> None:
        meta, newest = reader.meta(), reader.newest()
        if newest[0] < self.step or meta.get("started_at") != self.meta.get("started_at"):
            self._curves.clear()  # restarted, or resumed from an earlier step
        self.meta, self.notes = meta, reader.notes()
        self.step, self.written_at, self.seconds = newest
        for name in reader.scalar_names():
            self._extend(name)

    def _open(self) -> None:
        number, self.reader = self.store.stat().st_ino, Browser(self.store)
        self._file, self._seen = number, None
        self._curves.clear()

    def _extend(self, name: str) -> None:
        assert self.reader is not None
        points = self._curves.get(name)
        if points is None:
            self._curves[name] = self.reader.series(name, POINTS)
            return
        points += self.reader.since(name, points[-1].step if points else -1)
        while len(points) > 2 * POINTS:
            points[:] = [merged(points[i : i + 2]) for i in range(0, len(points), 2)]

    @property
    def names(self) -> list[str]:
        return sorted(self._curves)

    def curve(self, name: str) -> list[Point]:
        return self._curves.get(name, [])

    def last(self, name: str) -> float | None:
        """The newest value, or mean of the newest few where they were merged."""
        return next((point.mean for point in reversed(self.curve(name)) if point.mean is not None), None)

    @property
    def browser(self) -> Browser:
        assert self.reader is not None, "the run has begun"
        return self.reader

    @property
    def is_finished(self) -> bool:
        """It has ended with its last step, not before."""
        return self.has_ended and (self.max_steps is None or self.step >= self.max_steps)

    @property
    def max_steps(self) -> int | None:
        steps = self.meta.get("max_steps") or self.setting("max_steps") or 0
        return steps if isinstance(steps, int) and 0 < steps < 2**53 else None

    @property
    def method(self) -> str:
        """GRPO, SFT, ...; for runs of versions that did not say it, what their settings tell, or nothing."""
        told = next((name for setting, name in _TELLTALES.items() if setting in self.part("config")), "")
        method = self.meta.get("method", told)
        return method[:40] if isinstance(method, str) else ""

    def part(self, name: str) -> dict[str, Any]:
        """A mapping of the metadata; empty where it is none."""
        found = self.meta.get(name)
        return found if isinstance(found, dict) else {}

    def setting(self, name: str, default: Any = None) -> Any:
        return self.part("config").get(name, default)

    def number(self, name: str) -> float | None:
        """A setting that is a finite number; None where it is not."""
        found = self.setting(name)
        return found if isinstance(found, int | float) and abs(found) < 1e15 else None


def merged(points: list[Point]) -> Point:
    """Neighbours as one point, each weighing what it stands for."""
    counted = [(point.mean, point.count - point.not_finite) for point in points if point.mean is not None]
    total = sum(count for _, count in counted)
    return Point(
        step=points[-1].step,
        mean=sum(mean * count for mean, count in counted) / total if total else None,
        low=min((point.low for point in points if point.low is not None), default=None),
        high=max((point.high for point in points if point.high is not None), default=None),
        count=sum(point.count for point in points),
        not_finite=sum(point.not_finite for point in points),
    )
