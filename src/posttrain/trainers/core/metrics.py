"""Metrics between two logs: sums with counts, so that micro-batches, steps and processes add up to the same mean."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from posttrain.trainers.core.ranks import gather_json

_REDUCE = {"max": torch.maximum, "min": torch.minimum}
Number = float | torch.Tensor


class Metrics:
    """`note` as often as wanted, `drain` once per log: {name: value} over everything noted by every process."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}  # name -> [sum, count]
        self._extremes: dict[str, list[Any]] = {}  # name -> [kind, value]
        self._counts: dict[str, float] = {}
        self._spreads: dict[str, tuple[float, float, float]] = {}  # name -> count, mean, sum of squared deviations from it

    def note(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add to a mean: `total` is a sum over `count` things. With count 0 throughout, the total itself is meant, per
        optimizer step: a time of this process, or a number that every process knows and notes whole."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + total  # tensors stay on their device until the log: noting never waits for it
        entry[1] = entry[1] + count

    def note_extreme(self, name: str, kind: str, value: Number) -> None:
        """`kind` is 'max' or 'min'. An infinite one, of nothing, is not logged."""
        value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)  # on its device, as in `note`
        held = self._extremes.setdefault(name, [kind, value])
        held[1] = _REDUCE[kind](held[1].to(value.device), value)

    def note_spread(self, name: str, mean: float, count: float = 1.0, squares: float = 0.0) -> None:
        """Add to a standard deviation (n - 1; 0 of a single value): a value, or `count` of them with their mean and
        summed squared deviations.

        Chan, Golub and LeVeque 1979: nothing is lost where the mean is far from 0.
        """
        n, m, s = self._spreads.get(name, (0.0, 0.0, 0.0))
        total, delta = n + count, mean - m
        self._spreads[name] = (total, m + delta * count / total, s + squares + delta * delta * n * count / total)

    def count(self, name: str, number: float) -> None:
        """Add to a plain sum over everything since the last log: all steps, all processes."""
        self._counts[name] = self._counts.get(name, 0.0) + number

    def copy(self) -> Metrics:
        copied = Metrics()
        copied._sums = {name: list(entry) for name, entry in self._sums.items()}
        copied._extremes = {name: list(held) for name, held in self._extremes.items()}
        copied._counts, copied._spreads = dict(self._counts), dict(self._spreads)
        return copied

    def restore(self, earlier: Metrics) -> None:
        """Forget what was noted since `earlier` was copied, except for time: it was spent."""
        times = {name: entry for name, entry in self._sums.items() if name.startswith("time/")}
        copied = earlier.copy()
        self._sums, self._extremes = copied._sums | times, copied._extremes
        self._counts, self._spreads = copied._counts, copied._spreads

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
        extremes = {name: [kind, float(value)] for name, (kind, value) in self._extremes.items()}
        parts = gather_json([sums, extremes, self._counts, self._spreads], device)
        for sums, extremes, counts, spreads in parts:
            for name, (total, count) in sums.items():
                merged.note(name, total, count)
            for name, (kind, value) in extremes.items():
                merged.note_extreme(name, kind, value)
            for name, number in counts.items():
                merged.count(name, number)
            for name, (count, mean, squares) in spreads.items():
                merged.note_spread(name, mean, count, squares)
        self._sums, self._extremes, self._counts, self._spreads = {}, {}, {}, {}
        values = {name: total / count if count else total / max(steps, 1) / len(parts) for name, (total, count) in merged._sums.items()}
        values |= {name: float(value) for name, (_, value) in merged._extremes.items() if torch.isfinite(value)}
        values |= {name: math.sqrt(squares / max(count - 1, 1)) for name, (count, _, squares) in merged._spreads.items()}
        return values | merged._counts
