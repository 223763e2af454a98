"""Rewards called inside this process: on the caller's own thread, or one call after another on a thread of the reward.

On its own thread a call can have a time limit; one that takes longer is abandoned with its thread, which cannot be
killed. Coroutines run together on an event loop of the reward, abandoned likewise if one of them blocks it. A
notebook's loop is never used.

Why not pebble or anyio: they pickle what a process returns, and anyio's threads are shared, so that a reward would lose
what it keeps in its thread (a database connection).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any

from posttrain.event_loops import UserLoop, awaited
from posttrain.rewards.execution.calls import Attempt, Notes, RewardCall
from posttrain.rewards.surroundings import Surroundings


class Jobs:
    """Functions that one thread runs, in their order."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def do(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, function))
        return future

    def end(self) -> None:
        """`serve` returns after the jobs that are queued already."""
        self._jobs.put(None)

    def serve(self, *, reraise: bool = False) -> None:
        """Runs jobs on this thread until the end. reraise: what a job raises (Ctrl-C) is raised here too."""
        while (job := self._jobs.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # SystemExit and KeyboardInterrupt themselves would end the loop that awaits the future
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
                if reraise:
                    raise

    def serve_until(self, done: Future[Any]) -> Any:
        """Runs jobs on this thread until `done` is, and returns its result."""
        done.add_done_callback(lambda _: self.end())
        self.serve(reraise=True)
        return done.result()


class InlineExecutor:
    """In this process, on the thread that serves `caller`, or where that is None on a thread of its own."""

    def __init__(self) -> None:
        self.caller: Jobs | None = None
        self._own: Jobs | None = None  # None: no thread yet, or the last one was abandoned
        self._loop = UserLoop("posttrain-reward-loop")
        self._one_at_a_time = asyncio.Lock()

    async def run(self, calls: list[RewardCall], seconds: float | None) -> None:
        attempts = []
        async with self._one_at_a_time:
            for together in [calls] if seconds is None else [[call] for call in calls]:
                attempts += await self._invoke(together, seconds)
        if coroutines := [pair for pair in zip(calls, attempts, strict=True) if inspect.isawaitable(pair[1].answer)]:
            around = Surroundings(whole=False)
            await asyncio.gather(*(self._await(call, attempt, seconds) for call, attempt in coroutines))
            coroutines[0][0].changed += around.differences(restore=False)
        for call, attempt in zip(calls, attempts, strict=True):
            call.settle(attempt)

    def close(self) -> None:
        self._abandon()
        self._loop.stop()

    async def _invoke(self, calls: list[RewardCall], seconds: float | None) -> list[Attempt]:
        """One after another. An abandoned call writes into nothing that is still looked at."""
        job = functools.partial(_invoke_all, calls, whole=self.caller is not None)
        done = await awaited(asyncio.wrap_future((self.caller or self._thread()).do(job)), seconds)
        if done is None:
            self._abandon()
            return [Attempt(failure=call.timed_out(seconds)) for call in calls]
        attempts, changed = done
        for call in calls[:1]:
            call.changed += changed
        return list(attempts)

    def _thread(self) -> Jobs:
        if self._own is None:
            self._own = Jobs()
            threading.Thread(target=self._own.serve, name="posttrain-reward", daemon=True).start()
        return self._own

    def _abandon(self) -> None:
        """The thread ends once it is free."""
        if self._own is not None:
            self._own.end()
            self._own = None

    async def _await(self, call: RewardCall, attempt: Attempt, seconds: float | None) -> None:
        outcome = await self._loop.run(_read(attempt.answer), seconds)
        if outcome is None:
            attempt.failure, attempt.notes = call.timed_out(seconds), Notes()
            return
        attempt.answer, error = outcome
        attempt.failure = None if error is None else call.raised(error)


def _invoke_all(calls: list[RewardCall], *, whole: bool) -> tuple[list[Attempt], list[str]]:
    """(attempts, what they changed in this process). whole: this is the thread that trains, and its surroundings are
    restored."""
    around = Surroundings(whole=whole)
    attempts = []
    try:
        for call in calls:
            attempts.append(_attempt(call, around))
    finally:
        changed = around.differences(restore=whole)
    return attempts, changed


def _attempt(call: RewardCall, around: Surroundings) -> Attempt:
    """Its answer may still have to be awaited. Whatever the function raises is its failure, unless a signal arrived
    meanwhile."""
    attempt = Attempt()
    try:
        attempt.answer = exhausted(call.reward.function(**call.arguments(attempt.notes)))
    except BaseException as error:  # sys.exit() in a reward ends no training
        if not isinstance(error, Exception) and around.was_signalled:
            raise
        attempt.failure = call.raised(error)
    return attempt


async def _read(answer: Awaitable[Any]) -> Any:
    return exhausted(await answer)


def exhausted(answer: Any) -> Any:
    """A generator is run to its end here, where its time is counted and its exceptions are caught."""
    return list(answer) if isinstance(answer, Iterator) and not inspect.isawaitable(answer) else answer
