"""From groups to the calls of a reward, and from what it answers to scores. Nothing is called here.

A failure says what is wrong with an answer; None stays None; nothing becomes a zero. N completions of a batch, in the
order of groups, then of completions within a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, SupportsFloat

from posttrain.errors import UserError
from posttrain.rewards.failures import MESSAGE, Failure, trace_of, what_of
from posttrain.rewards.reward import NOT_COLUMNS, OFFERED, RewardFunction
from posttrain.types import Completion, Group, Task

LARGEST = 1e15  # squares and sums of larger scores are beyond 32-bit numbers


@dataclass
class Notes:
    """What a reward logged through `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)  # name -> the values logged; their mean is the metric
    extras: dict[str, list[Any]] = field(default_factory=dict)  # column -> one value per completion

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extras[column] = list(values)


Scores = list["float | Failure | None"]  # one for each completion of a call; None: the reward itself could not tell


@dataclass
class Attempt:
    """One try at a call: what the reward answered, or how it broke. Each logs into notes of its own, so that a retry
    starts without them."""

    answer: Any = None
    failure: Failure | None = None
    notes: Notes = field(default_factory=Notes)


@dataclass
class RewardCall:
    """One call of a reward, tried as often as its policy says, and then its scores."""

    reward: RewardFunction
    rows: list[tuple[Task, Completion]]  # one entry for a per-completion reward
    is_single: bool  # the answer is one score, not a list of them
    offered: dict[str, Any]
    notes: Notes = field(default_factory=Notes)  # of the last attempt
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
        """The keywords of one attempt, which logs into `notes`. Lists and dicts are copies: a reward's changes to them
        stay with it."""
        loggers = {"log_metric": notes.log_metric, "log_extra": notes.log_extra}
        given = {name: own(value) for name, value in self.offered.items()}
        return given | {name: logger for name, logger in loggers.items() if name in self.offered and name in OFFERED[self.reward.shape]}

    def settle(self, attempt: Attempt) -> None:
        self.notes = attempt.notes
        self.scores = scores_of(self, attempt.answer) if attempt.failure is None else [attempt.failure] * len(self.rows)

    def failed(self, kind: str, what: str, trace: str = "", error: BaseException | None = None, is_fatal: bool = False) -> Failure:
        return Failure(kind, f"reward '{self.reward.name}' {what}, while scoring {self.where}", trace, error, is_fatal)

    def raised(self, error: BaseException) -> Failure:
        return self.failed("raised", f"raised {what_of(error)}", trace_of(error), error, isinstance(error, UserError))

    def timed_out(self, seconds: float | None) -> Failure:
        assert seconds is not None
        return self.failed("timed_out", f"took longer than its timeout of {seconds:g} s")


def own(value: Any, depth: int = 50) -> Any:
    """A deep copy of lists, dicts and groups; other values (texts, tensors, images) are shared."""
    kind = type(value)
    if kind in _PLAIN or not depth:
        return value
    if kind is list or kind is tuple:
        if _PLAIN.issuperset(map(type, value)):  # token ids: thousands
            return kind(value)
        return kind([each if type(each) in _PLAIN else own(each, depth - 1) for each in value])
    if kind is dict:
        return {name: each if type(each) in _PLAIN else own(each, depth - 1) for name, each in value.items()}
    if isinstance(value, (Group, Completion, Task)):
        return replace(value, **{each.name: own(getattr(value, each.name), depth - 1) for each in fields(value)})
    return value


_PLAIN = {str, int, float, bool, type(None)}

Rows = Iterable[tuple[list[tuple[Task, Completion]], bool, dict[str, Any]]]


def calls_of(reward: RewardFunction, groups: list[Group], trainer_state: Any) -> list[RewardCall]:
    """Every call that scores these groups. A reward of whole batches is called once for all of them."""
    if not groups:
        return []
    common = {"trainer_state": trainer_state, "log_metric": None, "log_extra": None}
    common = {name: value for name, value in common.items() if name in OFFERED[reward.shape]}
    return [RewardCall(reward, *parts) for parts in SHAPES[reward.shape](reward, groups, common)]


def _per_completion(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    for task, completion in _flat(groups):
        ids = {"completion_ids": completion.sampled_ids} if reward.takes("completion_ids") else {}
        offered = {"completion": completion.text, "prompt": task.prompt, **ids, **common}
        yield [(task, completion)], True, reward.arguments(offered, _columns(task))


def _per_batch(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    batch = _flat(groups)
    names = dict.fromkeys(name for task, _ in batch for name in _columns(task))
    columns = {name: [task.columns.get(name) for task, _ in batch] for name in names}
    offered = {
        "prompts": [task.prompt for task, _ in batch],
        "completions": [_completion(task, completion) for task, completion in batch],
        "completion_ids": [list(completion.token_ids) for _, completion in batch],  # as in TRL: answers of tools included
        **common,
    }
    yield batch, False, reward.arguments(offered, columns)


def _per_group(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Rows:
    for group in groups:
        yield (
            [(group.task, completion) for completion in group.completions],
            False,
            reward.arguments({"group": group, **common}, _columns(group.task)),
        )


SHAPES: dict[str, Callable[[RewardFunction, list[Group], dict[str, Any]], Rows]] = {
    "completion": _per_completion,
    "completions": _per_batch,
    "group": _per_group,
}


def _flat(groups: list[Group]) -> list[tuple[Task, Completion]]:
    return [(group.task, completion) for group in groups for completion in group.completions]


def _columns(task: Task) -> dict[str, Any]:
    return {name: value for name, value in task.columns.items() if name not in NOT_COLUMNS}


def _completion(task: Task, completion: Completion) -> Any:
    """Text for a text prompt; for a conversation the messages that answer it."""
    if isinstance(task.prompt, str):
        return completion.text
    return completion.messages if completion.messages is not None else [{"role": "assistant", "content": completion.text}]


def scores_of(call: RewardCall, answer: Any) -> Scores:
    """One entry for each completion of the call."""
    if call.is_single:
        return [_score(call, 0, answer)]
    n, name = len(call.rows), call.reward.name
    is_no_list = isinstance(answer, (str, bytes, Mapping, Set, SupportsFloat)) and not _is_array(answer)  # a set has no order
    if not isinstance(answer, Iterable) or is_no_list:
        message = f"reward '{name}' returned {_short(answer)} for {call.where}; it must return a list of {n} numbers"
        return [Failure("wrong_type", message)] * n
    answers = list(answer)
    if len(answers) != n:
        return [Failure("wrong_length", f"reward '{name}' returned {len(answers)} scores for the {n} completions of {call.where}")] * n
    return [_score(call, index, value) for index, value in enumerate(answers)]


def _score(call: RewardCall, index: int, answer: Any) -> float | Failure | None:
    if answer is None:
        return None
    problem = f"reward '{call.reward.name}' returned {_short(answer)} for prompt {call.rows[index][0].id}"
    try:
        score = float(answer) if isinstance(answer, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several numbers, an integer beyond floats
        score = None
    if score is None:
        return Failure("wrong_type", f"{problem}; a score is a number, True, False, or None where it could not be scored")
    if not math.isfinite(score):
        return Failure("not_finite", f"{problem}; a score must be finite. Return None where the completion could not be scored")
    if abs(score) > LARGEST:
        return Failure("not_finite", f"{problem}; scores beyond {LARGEST:g} cannot be averaged and squared. Divide all scores of this reward")
    if call.reward.is_verifier and score not in (0.0, 1.0):
        return Failure("wrong_type", f"{problem}; a verifier says True, False or None. Use @reward for other numbers")
    return score


def _is_array(value: Any) -> bool:
    """Whether it is a numpy array or tensor with an axis: those also claim to be convertible to one float."""
    return isinstance(value, Iterable) and bool(getattr(value, "shape", ()))


def plain(value: Any) -> Any:
    """The answer as JSON can carry it: numbers of other libraries as floats, arrays as lists, anything else as its
    text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value[:MESSAGE]  # no score: it will be quoted
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and (not isinstance(value, SupportsFloat) or _is_array(value)):
        return [plain(inner) for inner in value]
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, (str, bytes)):
        value = value[:100]
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
