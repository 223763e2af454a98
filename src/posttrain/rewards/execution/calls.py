"""From groups to calls: what each shape of reward is called with, and which completions an answer speaks of. Nothing is called here.

N completions of a batch, in order of groups and then of rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from posttrain.rewards.reward import NOT_COLUMNS, OFFERED, RewardFunction
from posttrain.types import Group, Rollout, Task


@dataclass
class Notes:
    """What a reward logged through `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)  # name -> the values logged; their mean is the metric
    extras: dict[str, list[Any]] = field(default_factory=dict)  # column -> one value per completion

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extras[column] = list(values)


@dataclass
class Failure:
    """Why completions have no score."""

    kind: str  # a key of KINDS
    message: str  # names the reward, the row and the cause
    trace: str = ""  # the traceback, where something was raised
    error: BaseException | None = None  # what was raised, if that was in this process
    is_fatal: bool = False  # the input is wrong (UserError): no policy goes on from there


KINDS = {
    "raised": "raised an exception, or its worker died",
    "timed_out": "took longer than its timeout",
    "not_finite": "returned NaN, an infinity, or a number beyond 1e15",
    "wrong_type": "returned something that is no score",
    "wrong_length": "returned another number of scores than there were completions",
}


Scores = list["float | Failure | None"]  # one for each completion of a call; None: the reward itself could not tell


@dataclass
class Call:
    """One call of a reward, however often it is attempted, and in the end its scores."""

    reward: RewardFunction
    rows: list[tuple[Task, Rollout]]  # one entry for a per-completion reward
    is_single: bool  # the answer is one score, not a list of them
    offered: dict[str, Any]
    notes: Notes = field(default_factory=Notes)  # of the attempt that counted
    scores: Scores = field(default_factory=list)  # one per row, once it is settled
    retried: int = 0
    changed: list[str] = field(default_factory=list)  # what was changed in this process while it ran

    @property
    def failures(self) -> list[Failure]:
        return [score for score in self.scores if isinstance(score, Failure)]

    @property
    def where(self) -> str:
        """'prompt 7', or the first few of several."""
        ids = [str(task_id) for task_id in dict.fromkeys(task.id for task, _ in self.rows)]
        if len(ids) == 1:
            return f"prompt {ids[0]}"
        return f"prompts {', '.join(ids[:5])}{' and others' if len(ids) > 5 else ''}"

    def arguments(self, notes: Notes) -> dict[str, Any]:
        """The keywords of one attempt, which logs into `notes`. Lists and dicts are copies: what a reward does to them, nobody else sees."""
        loggers = {"log_metric": notes.log_metric, "log_extra": notes.log_extra}
        given = {name: own(value) for name, value in self.offered.items()}
        return given | {name: logger for name, logger in loggers.items() if name in self.offered and name in OFFERED[self.reward.shape]}


def own(value: Any, depth: int = 50) -> Any:
    """A copy of lists, dicts and groups within each other; what else they hold (texts, tensors, images) is the same."""
    kind = type(value)
    if kind in _PLAIN or not depth:
        return value
    if kind is list or kind is tuple:
        if _PLAIN.issuperset(map(type, value)):  # token ids: thousands
            return kind(value)
        return kind([each if type(each) in _PLAIN else own(each, depth - 1) for each in value])
    if kind is dict:
        return {name: each if type(each) in _PLAIN else own(each, depth - 1) for name, each in value.items()}
    if isinstance(value, (Group, Rollout, Task)):
        return replace(value, **{each.name: own(getattr(value, each.name), depth - 1) for each in fields(value)})
    return value


_PLAIN = {str, int, float, bool, type(None)}

Rows = Iterable[tuple[list[tuple[Task, Rollout]], bool, dict[str, Any]]]


def calls_of(reward: RewardFunction, groups: list[Group], trainer_state: Any) -> list[Call]:
    """Every call that scores these groups. A reward of whole batches is called once for all of them."""
    if not groups:
        return []
    common = {"trainer_state": trainer_state, "log_metric": None, "log_extra": None}
    common = {name: value for name, value in common.items() if name in OFFERED[reward.shape]}
    return [Call(reward, *parts) for parts in SHAPES[reward.shape](reward, groups, common)]


def _per_completion(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    for task, rollout in _flat(groups):
        offered = {"completion": rollout.text, "prompt": task.prompt, "completion_ids": rollout.sampled_ids, **common}
        yield [(task, rollout)], True, reward.arguments(offered, _columns(task))


def _per_batch(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    batch = _flat(groups)
    names = dict.fromkeys(name for task, _ in batch for name in _columns(task))
    columns = {name: [task.columns.get(name) for task, _ in batch] for name in names}
    offered = {
        "prompts": [task.prompt for task, _ in batch],
        "completions": [_completion(task, rollout) for task, rollout in batch],
        "completion_ids": [list(rollout.token_ids) for _, rollout in batch],  # as in TRL: answers of tools included
        **common,
    }
    yield batch, False, reward.arguments(offered, columns)


def _per_group(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    for group in groups:
        yield [(group.task, rollout) for rollout in group.rollouts], False, reward.arguments({"group": group, **common}, _columns(group.task))


SHAPES: dict[str, Callable[[RewardFunction, list[Group], dict[str, Any]], Rows]] = {
    "completion": _per_completion,
    "completions": _per_batch,
    "group": _per_group,
}


def _flat(groups: list[Group]) -> list[tuple[Task, Rollout]]:
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


def _columns(task: Task) -> dict[str, Any]:
    return {name: value for name, value in task.columns.items() if name not in NOT_COLUMNS}


def _completion(task: Task, rollout: Rollout) -> Any:
    """Text for a text prompt; for a conversation the messages that answer it."""
    if isinstance(task.prompt, str):
        return rollout.text
    return rollout.messages if rollout.messages is not None else [{"role": "assistant", "content": rollout.text}]
