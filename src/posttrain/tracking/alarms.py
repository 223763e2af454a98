"""Alarms about rewards: the reward rises and what it stands for does not; length, repetition or one component runs
away.

A change is one between the first logs of a run and the last ones, and only if it is so large against the scatter of
single logs that noise does not make it. Each kind is said once. An alarm is a reason to read completions, not a proof:
the figures are in the sentence.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

WINDOW = 10  # logs that are averaged, at the beginning and at the end
SIGMAS = 8.0  # standard errors; with windows of ten it is about 3.6 standard deviations of a log
EVALUATIONS = 3  # of a held-out verifier before its silence means something
LONGER = 2.0  # times the length at the beginning
REPEATED = 0.2  # share of repeated n-grams that is added
SOLVED = 0.95  # from here on there is nothing left to improve


@dataclass
class Series:
    """The first values of a metric and the last ones, never the same one in both."""

    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        if len(self.first) < WINDOW:
            self.first.append(value)
        else:
            self.last.append(value)

    @property
    def is_full(self) -> bool:
        return len(self.last) == WINDOW

    @property
    def before(self) -> float:
        return fmean(self.first)

    @property
    def now(self) -> float:
        return fmean(self.last)

    @property
    def change(self) -> float:
        """now - before where that is beyond noise, else 0."""
        if not self.is_full:
            return 0.0
        difference = self.now - self.before
        error = math.sqrt((_variance(self.first) + _variance(self.last)) / WINDOW)
        scale = max(abs(self.before), abs(self.now))
        return difference if abs(difference) > SIGMAS * error and abs(difference) > 1e-6 * scale else 0.0


class Alarms:
    """Reads each log once, evaluations (`eval_...`) too, and says what is new."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self._held_out: list[float] = []
        self._said: set[str] = set()

    def read(self, logs: Mapping[str, float]) -> list[str]:
        """New alarms, usually none."""
        self._take(logs)
        kinds = {"verifier": self._reward_alone, "length": self._length, "repetition": self._repetition, "component": self._one_component}
        new = {kind: sentence for kind, alarm in kinds.items() if kind not in self._said and (sentence := alarm()) is not None}
        self._said.update(new)
        return list(new.values())

    def _take(self, logs: Mapping[str, float]) -> None:
        held_out = [value for name, value in logs.items() if name.startswith("eval_") and name.endswith("solved")]
        if held_out:
            self._held_out.append(fmean(held_out))
        for name, value in logs.items():
            if name in ("reward", "solved", "completions/mean_length", "completions/repeated") or _is_component(name):
                self._series.setdefault(name, Series()).add(float(value))

    def _change(self, name: str) -> float:
        return self._series[name].change if name in self._series else 0.0

    def _reward_alone(self) -> str | None:
        """The held-out verifier speaks where there is one; otherwise the verdicts on the training prompts."""
        if self._change("reward") <= 0:
            return None
        if self._held_out:
            if len(self._held_out) < EVALUATIONS:
                return None
            before, now, what = self._held_out[0], fmean(self._held_out[-2:]), "held-out prompts solved"
            stands_still = now <= before
        elif "solved" in self._series and self._series["solved"].is_full:
            solved = self._series["solved"]
            before, now, what = solved.before, solved.now, "training prompts solved"
            stands_still = now <= before
        else:
            return None
        if not stands_still or before >= SOLVED:
            return None
        return (
            f"the reward rose from {_of(self._series['reward'])}, but {what} went from {100 * before:.0f} % to {100 * now:.0f} %: it is earned by something "
            f"else{self._risen()}. Read some completions; a reward that a constant text earns is found by `posttrain reward check`."
        )

    def _risen(self) -> str:
        risen = {name: change for name in self._series if _is_component(name) and (change := self._change(name)) > 0}
        if not risen:
            return ""
        most = max(risen, key=lambda name: risen[name])
        return f" (most of all {_short(most)}, from {_of(self._series[most])})"

    def _length(self) -> str | None:
        if self._change("completions/mean_length") <= 0 or self._change("reward") > 0:
            return None
        length = self._series["completions/mean_length"]
        if length.now < LONGER * length.before:
            return None
        return (
            f"completions grew from {length.before:.0f} to {length.now:.0f} tokens and the reward did not rise with them. "
            "A length penalty (soft_overlong, brevity) or a loss that does not favour long completions (dr_grpo) holds them."
        )

    def _repetition(self) -> str | None:
        if self._change("completions/repeated") <= REPEATED:
            return None
        repeated = self._series["completions/repeated"]
        return (
            f"{100 * repeated.now:.0f} % of what completions say they have said before ({100 * repeated.before:.0f} % at the beginning). "
            "The reward `repetition` counts against it; a lower learning rate or a larger beta keeps the model nearer to where it began."
        )

    def _one_component(self) -> str | None:
        """One component up, another down: the model trades one for the other."""
        changes = {name: self._change(name) for name in self._series if _is_component(name)}
        if len(changes) < 2:
            return None
        up, down = max(changes, key=lambda name: changes[name]), min(changes, key=lambda name: changes[name])
        if changes[up] <= 0 or changes[down] >= 0:
            return None
        return (
            f"{_short(up)} rises ({_of(self._series[up])}) while {_short(down)} falls ({_of(self._series[down])}): one component is earned at the cost of "
            "another. Compare their weights."
        )


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _is_component(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _short(name: str) -> str:
    return name[len("rewards/") : -len("/mean")]


def _of(series: Series) -> str:
    return f"{series.before:.3g} to {series.now:.3g}"
