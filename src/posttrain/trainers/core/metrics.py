"""Metrics between two logs: sums with counts, so that micro-batches, steps and processes add up to the same mean."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from posttrain.trainers.core.ranks import gather_json

_REDUCE = {"max": max, "min": min}
Number = float | torch.Tensor


class Metrics:
    """`note` as often as wanted, `drain` once per log: {name: value} over everything noted by every process."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}  # name -> [sum, count]
        self._extremes: dict[str, list[Any]] = {}  # name -> [kind, value]
        self._counts: dict[str, float] = {}

    def note(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add to a mean: `total` is a sum over `count` things. With count 0 throughout, the total itself is meant, per optimizer step: a time of
        this process, or a number that every process knows and notes whole."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + total  # tensors stay on their device until the log: noting never waits for it
        entry[1] = entry[1] + count

    def note_extreme(self, name: str, kind: str, value: float) -> None:
        """`kind` is 'max' or 'min'."""
        held = self._extremes.setdefault(name, [kind, value])
        held[1] = _REDUCE[kind](held[1], value)

    def count(self, name: str, number: float) -> None:
        """Add to a plain sum over everything since the last log: all steps, all processes."""
        self._counts[name] = self._counts.get(name, 0.0) + number

    def copy(self) -> Metrics:
        copied = Metrics()
        copied._sums = {name: list(entry) for name, entry in self._sums.items()}
        copied._extremes = {name: list(held) for name, held in self._extremes.items()}
        copied._counts = dict(self._counts)
        return copied

    def restore(self, earlier: Metrics) -> None:
        """Forget what was noted since `earlier` was copied, except for time: it was spent."""
        times = {name: entry for name, entry in self._sums.items() if name.startswith("time/")}
        copied = earlier.copy()
        self._sums, self._extremes, self._counts = copied._sums | times, copied._extremes, copied._counts

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the seconds that a block takes, per optimizer step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.note(name, time.perf_counter() - start, 0.0)

    def drain(self, device: torch.device, steps: int) -> dict[str, float]:
        """Names in the order they were first noted. What has count 0 is per optimizer step, averaged over processes."""
        merged = Metrics()
        sums = {name: [float(total), float(count)] for name, (total, count) in self._sums.items()}
        parts = gather_json([sums, self._extremes, self._counts], device)
        for sums, extremes, counts in parts:
            for name, (total, count) in sums.items():
                merged.note(name, total, count)
            for name, (kind, value) in extremes.items():
                merged.note_extreme(name, kind, value)
            for name, number in counts.items():
                merged.count(name, number)
        self._sums, self._extremes, self._counts = {}, {}, {}
        values = {name: total / count if count else total / max(steps, 1) / len(parts) for name, (total, count) in merged._sums.items()}
        return values | {name: value for name, (_, value) in merged._extremes.items()} | merged._counts
