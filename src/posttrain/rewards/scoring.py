"""Calls a reward and checks what it says. A wrong answer may score 0; a broken reward raises RewardError, never a silent 0.

N completions of a batch, in order of groups and then of rollouts. Functions are called on the calling thread; whatever they return that must
be awaited is awaited together on one private event loop, so that a notebook's own loop is not in the way.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from posttrain.errors import RewardError
from posttrain.rewards.reward import NOT_COLUMNS, RewardFunction
from posttrain.types import Group, Rollout, Task


@dataclass
class Notes:
    """What rewards logged while they scored one batch, through `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)  # name -> the values logged; their mean is the metric
    extras: dict[str, list[Any]] = field(default_factory=dict)  # column -> one value per completion

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extras[column] = list(values)


@dataclass
class Call:
    """One call of one reward: the answer (or what to await for it) and the completions it speaks of."""

    answer: Any
    batch: list[tuple[Task, Rollout]]  # one entry for a per-completion reward
    is_single: bool  # the answer is one score, not a list of them


def score_all(rewards: list[RewardFunction], groups: list[Group], trainer_state: Any, notes: Notes) -> list[list[float | None]]:
    """[reward][N] scores. Raises RewardError that names the reward, the row and the cause."""
    called: list[list[Call]] = []
    try:
        for reward in rewards:
            called.append(_call(reward, groups, trainer_state, notes))
        _await_all([call for calls in called for call in calls])
    except BaseException:
        _close([call.answer for calls in called for call in calls])
        raise
    return [[score for call in calls for score in _scores(reward, call)] for reward, calls in zip(rewards, called, strict=True)]


def _call(reward: RewardFunction, groups: list[Group], trainer_state: Any, notes: Notes) -> list[Call]:
    common = {"trainer_state": trainer_state, "log_metric": notes.log_metric}
    calls: list[Call] = []
    for batch, is_single, arguments in SHAPES[reward.shape](reward, groups, {**common, "log_extra": notes.log_extra}):
        try:
            answer = reward.function(**arguments)
        except Exception as error:
            _close([call.answer for call in calls])
            raise _raised(reward, batch, error) from error
        calls.append(Call(answer, batch, is_single))
    return calls


Arguments = Iterable[tuple[list[tuple[Task, Rollout]], bool, dict[str, Any]]]


def _per_completion(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Arguments:
    for task, rollout in _flat(groups):
        offered = {"completion": rollout.text, "prompt": task.prompt, "completion_ids": list(rollout.token_ids), **common}
        yield [(task, rollout)], True, reward.arguments(offered, _columns(task))


def _per_batch(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Arguments:
    batch = _flat(groups)
    names = dict.fromkeys(name for task, _ in batch for name in _columns(task))
    columns = {name: [task.columns.get(name) for task, _ in batch] for name in names}
    offered = {
        "prompts": [task.prompt for task, _ in batch],
        "completions": [_completion(task, rollout) for task, rollout in batch],
        "completion_ids": [list(rollout.token_ids) for _, rollout in batch],
        **common,
    }
    yield batch, False, reward.arguments(offered, columns)


def _per_group(reward: RewardFunction, groups: list[Group], common: dict[str, Any]) -> Arguments:
    for group in groups:
        yield [(group.task, rollout) for rollout in group.rollouts], False, reward.arguments({"group": group, **common}, _columns(group.task))


SHAPES: dict[str, Callable[[RewardFunction, list[Group], dict[str, Any]], Arguments]] = {
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


def _scores(reward: RewardFunction, call: Call) -> list[float | None]:
    if isinstance(call.answer, BaseException):
        raise _raised(reward, call.batch, call.answer) from call.answer
    if call.is_single:
        return [_number(reward, call.batch[0][0], call.answer)]
    answers = _listed(reward, call)
    return [_number(reward, task, answer) for (task, _), answer in zip(call.batch, answers, strict=True)]


def _listed(reward: RewardFunction, call: Call) -> list[Any]:
    n = len(call.batch)
    if not isinstance(call.answer, Iterable) or (isinstance(call.answer, (str, bytes, Mapping, SupportsFloat)) and not _is_array(call.answer)):
        raise RewardError(f"reward '{reward.name}' returned {_short(call.answer)} for {_rows(call.batch)}; it must return a list of {n} numbers")
    answers = list(call.answer)
    if len(answers) != n:
        raise RewardError(f"reward '{reward.name}' returned {len(answers)} scores for the {n} completions of {_rows(call.batch)}")
    return answers


def _is_array(value: Any) -> bool:
    """Whether it is a numpy array or tensor with an axis: those also claim to be convertible to one float."""
    return isinstance(value, Iterable) and bool(getattr(value, "shape", ()))


def _number(reward: RewardFunction, task: Task, answer: Any) -> float | None:
    if answer is None:
        return None
    problem = f"reward '{reward.name}' returned {_short(answer)} for prompt {task.id}"
    try:
        score = float(answer) if isinstance(answer, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several numbers, an integer beyond floats
        score = None
    if score is None:
        raise RewardError(f"{problem}; a score is a number, True, False, or None where it could not be scored")
    if not math.isfinite(score):
        raise RewardError(f"{problem}; a score must be finite. Return None where the completion could not be scored")
    if reward.is_verifier and score not in (0.0, 1.0):
        raise RewardError(f"{problem}; a verifier says True, False or None. Use @reward for other numbers")
    return score


def _raised(reward: RewardFunction, batch: list[tuple[Task, Rollout]], error: BaseException) -> RewardError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return RewardError(f"reward '{reward.name}' raised {type(error).__name__}: {error}{where}, while scoring {_rows(batch)}")


def _rows(batch: list[tuple[Task, Rollout]]) -> str:
    ids = [str(task_id) for task_id in dict.fromkeys(task.id for task, _ in batch)]
    if len(ids) == 1:
        return f"prompt {ids[0]}"
    return f"prompts {', '.join(ids[:5])}{' and others' if len(ids) > 5 else ''}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="posttrain-rewards", daemon=True).start()
    return loop


def _await_all(calls: list[Call]) -> None:
    """Replaces every answer that is awaitable by its result, or by the exception that it raised."""
    waiting = [call for call in calls if inspect.isawaitable(call.answer)]
    if not waiting:
        return

    async def gather() -> list[Any]:
        return await asyncio.gather(*(_settled(call.answer) for call in waiting))

    future: Future[list[Any]] = asyncio.run_coroutine_threadsafe(gather(), _loop())
    try:
        answers = future.result()
    except BaseException:  # Ctrl-C: do not leave them running behind the caller's back
        future.cancel()
        raise
    for call, answer in zip(waiting, answers, strict=True):
        call.answer = answer


async def _settled(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except Exception as error:
        return error


def _close(answers: list[Any]) -> None:
    """Coroutines that will never be awaited are closed, or Python warns about each."""
    for answer in answers:
        if inspect.iscoroutine(answer):
            answer.close()
