"""Scores one batch of groups. Rewards that may start early do so as soon as a group is complete, the others once all
are.

A wrong answer may score 0. A reward that breaks is a failure, which stops the run or drops the completion, as the
reward's policy says, and is counted. Scores and notes are in the order of rewards and groups, whatever finishes first.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.errors import RewardError, UserError
from posttrain.event_loops import new_loop
from posttrain.rewards.execution.calls import Notes, RewardCall, Scores, calls_of
from posttrain.rewards.execution.inline import InlineExecutor, Jobs
from posttrain.rewards.execution.process import ProcessExecutor
from posttrain.rewards.failures import FailurePolicy
from posttrain.rewards.reward import RewardFunction
from posttrain.types import Group


@dataclass
class Report(Notes):
    """What rewards logged, and how they broke."""

    failures: dict[str, Counter[str]] = field(default_factory=dict)  # reward -> completions without a score by kind of Failure, and "retried"
    traces: dict[str, str] = field(default_factory=dict)  # reward -> its first failure: the message, and the traceback if there is one
    changed: dict[str, list[str]] = field(default_factory=dict)  # reward -> what was changed in this process while it ran
    broken: list[str] = field(default_factory=list)  # for each completion over which a reward or its environment broke: how

    def add(self, name: str, call: RewardCall) -> None:
        for metric, values in call.notes.metrics.items():
            self.metrics.setdefault(metric, []).extend(values)
        self.extras.update(call.notes.extras)
        counts = Counter(failure.kind for failure in call.failures)
        if call.retried:
            counts["retried"] = call.retried
        if counts:
            self.failures.setdefault(name, Counter()).update(counts)
        if call.changed:
            self.changed[name] = list(dict.fromkeys([*self.changed.get(name, []), *call.changed]))
        for failure in call.failures[:1]:
            self.traces.setdefault(name, f"{failure.message}\n{failure.trace}".rstrip())


class Executor(Protocol):
    """Runs calls of one reward and settles them. Its methods run on `_home()`."""

    async def run(self, calls: list[RewardCall], seconds: float | None) -> None:
        """seconds: the time limit of each call; None: no limit."""
        ...

    def close(self) -> None:
        """Gives up threads and processes. The next `run` takes new ones."""
        ...


class Executors:
    """Those of a rubric's rewards, made when they are first needed and kept from batch to batch."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, FailurePolicy], Executor] = {}

    def of(self, index: int, reward: RewardFunction, policy: FailurePolicy, caller: Jobs) -> Executor:
        executor = self._kept.get((index, policy))
        if executor is None:
            if reward.source is not None and in_worker(reward, policy):
                assert policy.workers is not None
                executor = ProcessExecutor(reward.source, policy.workers, policy.memory_mb)
            else:
                executor = InlineExecutor()
            self._kept[index, policy] = executor
        if isinstance(executor, InlineExecutor):
            executor.caller = caller if runs_here(reward, policy) else None
        return executor

    def close(self) -> None:
        async def close() -> None:
            while self._kept:
                self._kept.popitem()[1].close()

        if self._kept:
            _at_home(close()).result()


@functools.cache
def _home() -> asyncio.AbstractEventLoop:
    """The loop that keeps time for all rewards. No code of a user runs on it."""
    return new_loop("posttrain-rewards")


def _at_home(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    return asyncio.run_coroutine_threadsafe(coroutine, _home())


def in_worker(reward: RewardFunction, policy: FailurePolicy) -> bool:
    """A reward with a name runs in processes if it has a time limit, asks for workers or limits their memory."""
    asks = reward.policy.workers is not None or reward.policy.memory_mb is not None
    return reward.source is not None and (asks or (policy.seconds is not None and not reward.is_async))


def runs_here(reward: RewardFunction, policy: FailurePolicy) -> bool:
    """Without a time limit a plain function stays on the caller's thread, where `signal` works and nothing runs beside
    it."""
    return policy.seconds is None and not reward.is_async and not in_worker(reward, policy)


class Scoring:
    """One batch. `add` groups as they are completed (those that are not added are scored at the end), then `finish`. A
    context manager."""

    def __init__(
        self, rewards: list[RewardFunction], names: list[str], policies: list[FailurePolicy], executors: Executors, trainer_state: Any
    ) -> None:
        self._caller = Jobs()
        self._state = trainer_state
        self._rewards, self._names, self._policies = rewards, names, policies
        self._executors = [executors.of(index, reward, policies[index], self._caller) for index, reward in enumerate(rewards)]
        self._calls: dict[tuple[int, int], list[RewardCall]] = {}  # (reward, id of a group) -> its calls
        self._running: list[Future[None]] = []

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: Any) -> None:
        for future in self._running:
            future.cancel()

    def add(self, group: Group) -> None:
        """Start the rewards that look at one completion or one group, unless they must run on this thread."""
        for index, (reward, policy) in enumerate(zip(self._rewards, self._policies, strict=True)):
            if reward.shape != "completions" and not runs_here(reward, policy):
                self._start(index, [group])

    def finish(self, groups: list[Group]) -> tuple[list[Scores], Report]:
        """[reward][N] scores and failures, and the report. Raises RewardError for a failure under the policy "stop",
        UserError for a fatal one."""
        for index in range(len(self._rewards)):
            missing = [group for group in groups if (index, id(group)) not in self._calls]
            if missing:
                self._start(index, missing)
        self._caller.serve_until(_at_home(_all(self._running)))
        scores, report = [], Report()
        for index, (name, policy) in enumerate(zip(self._names, self._policies, strict=True)):
            calls = [call for group in groups for call in self._calls[index, id(group)]]
            for call in calls:
                _raise_if_it_must(call, policy)
                report.add(name, call)
            scores.append([score for call in calls for score in call.scores])
        return scores, report

    def _start(self, index: int, groups: list[Group]) -> None:
        """One task for all of these groups. A call that speaks of several belongs to the first of them."""
        calls = []
        for part in [groups] if self._rewards[index].shape == "completions" else [[group] for group in groups]:
            made = calls_of(self._rewards[index], part, self._state)
            calls += made
            for group in part:
                self._calls[index, id(group)], made = made, []
        self._running.append(_at_home(_settle(self._executors[index], calls, self._policies[index])))


async def _all(running: list[Future[None]]) -> None:
    await asyncio.gather(*(asyncio.wrap_future(future) for future in running))


async def _settle(executor: Executor, calls: list[RewardCall], policy: FailurePolicy) -> None:
    """Try every call, and those that failed again, as often as the policy allows."""
    assert policy.retries is not None
    await executor.run(calls, policy.seconds)
    for _ in range(policy.retries):
        calls = [call for call in calls if call.failures and not call.failures[0].is_fatal]
        if not calls:
            return
        for call in calls:
            call.retried += 1
        await executor.run(calls, policy.seconds)


def _raise_if_it_must(call: RewardCall, policy: FailurePolicy) -> None:
    for failure in call.failures:
        if failure.is_fatal:
            raise UserError(failure.message) from failure.error
        if not policy.drops:
            raise RewardError(failure.message) from failure.error
