"""Metrics in a reader's words: which are shown, in what order, under which short name. Pure text; colours and screens
are `terminal.py`'s.

Completions and reward names are written by strangers: whatever reaches a screen goes through `visible` first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from posttrain.characters import visible

Logs = Mapping[str, float]


def number(value: float) -> str:
    """Three significant digits, two decimals at least from 0.1 on: 0.00213, 0.11, 3.71, 1,234."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class ShownMetric:
    label: str
    metric: str
    show: Callable[[float], str] = number


# Reward leads and the loss is last: the loss of an on-policy, centred objective is about 0 whatever happens.
FIELDS = (
    ShownMetric("reward", "reward"),
    ShownMetric("solved", "solved", share),
    ShownMetric("preferred", "rewards/accuracies", share),
    ShownMetric("margin", "rewards/margins"),
    ShownMetric("signal", "frac_reward_zero_std", lambda without: share(1 - without)),
    ShownMetric("accuracy", "mean_token_accuracy", share),
    ShownMetric("len", "completions/mean_length"),
    ShownMetric("cut", "completions/clipped_ratio", share),
    ShownMetric("entropy", "entropy"),
    ShownMetric("kl", "kl"),
    ShownMetric("clipped", "clip_ratio/region_mean", share),
    ShownMetric("grad", "grad_norm"),
    ShownMetric("lr", "learning_rate", lambda value: f"{value:.2g}"),
    ShownMetric("loss", "loss"),
)


# Further metrics that are known by their names, so that no part of them is taken for a data set's.
_OTHERS = "step_time|tokens_per_second|unscored|accuracy|margin|mean_reward|min_reward|max_reward|nll_loss|episodes/dropped"
_KNOWN = "|".join([*(re.escape(field.metric) for field in FIELDS), _OTHERS, "rewards/.+", "time/.+"])
_HELD_OUT = re.compile(rf"eval_(?:(.+?)_)??({_KNOWN})", re.DOTALL)


def plain_name(name: str) -> tuple[str, str]:
    """(data set, metric): `eval_math-500_reward` is the `reward` on `math-500`. "" for training's numbers and for a
    data set without a name.

    Data set and metric are told apart by the known metrics; the shorter the data set's name, the better.
    """
    found = _HELD_OUT.fullmatch(name)
    return ("", name.removeprefix("eval_")) if found is None else (found[1] or "", found[2])


def by_data_set(logs: Logs) -> dict[str, dict[str, float]]:
    """The numbers of a log under their plain names, apart for each data set of an evaluation."""
    parts: dict[str, dict[str, float]] = {}
    for name, value in logs.items():
        data_set, metric = plain_name(name)
        parts.setdefault(data_set, {})[metric] = value
    return parts


@dataclass(frozen=True)
class Words:
    """What one log says, in pieces: (label, value) pairs, ready to show."""

    metrics: list[tuple[str, str]]
    rewards: list[tuple[str, str]]  # each component's mean
    speed: str  # tokens per second, seconds per step, and the share of them that each phase took


def words(logs: Logs) -> Words:
    """Whatever of the known metrics is there, under plain names."""
    metrics = [(field.label, field.show(logs[field.metric])) for field in FIELDS if field.metric in logs]
    rewards = [(visible(name[len("rewards/") : -len("/mean")]), number(logs[name])) for name in logs if _is_component(name)]
    return Words(metrics, rewards, _speed(logs))


def line(logs: Logs, head: str, tail: str = "") -> str:
    """One log as one line: `step 120/150  reward 3.71  right 2.90  signal 31 %  ...  eta 0:12`."""
    said = words(logs)
    return "  ".join(part for part in (head, joined(said.metrics[:1]), joined(said.rewards), joined(said.metrics[1:]), said.speed, tail) if part)


def joined(pairs: Iterable[tuple[str, str]]) -> str:
    return "  ".join(f"{label} {value}" for label, value in pairs)


def is_worth_a_line(logs: Logs) -> bool:
    said = words(logs)
    return bool(said.metrics or said.rewards)


def _is_component(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _speed(plain: Logs) -> str:
    parts = [f"{plain['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in plain else []
    if plain.get("step_time"):
        parts.append(f"{number(plain['step_time'])} s/step")
        phases = [f"{name[len('time/') :]} {share(plain[name] / plain['step_time'])}" for name in plain if name.startswith("time/")]
        parts += [f"({', '.join(phases)})"] if phases else []
    return "  ".join(parts)
