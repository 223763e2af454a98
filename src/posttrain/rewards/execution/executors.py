"""Where the calls of one reward run inside this process: on the caller's own thread, or one after another on a thread of their own.

The second kind can be given a time limit: what outlives it is left behind with its thread, which cannot be killed. What a call returns to be
awaited runs beside others on an event loop of this reward, which is left behind too if a coroutine blocks it. A notebook's loop is never used.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.event_loops import UserLoop, new_loop
from posttrain.rewards.execution.answers import raised, scores_of, timed_out
from posttrain.rewards.execution.calls import Call, Notes, Scores
from posttrain.rewards.surroundings import Surroundings


@dataclass
class Attempt:
    """One try at a call. It logs into notes of its own: those of a failed one are forgotten."""

    call: Call
    notes: Notes = field(default_factory=Notes)
    scores: Scores = field(default_factory=list)
    answer: Any = None  # of a call that has not been judged yet
    changed: list[str] = field(default_factory=list)

    def invoke(self, around: Surroundings | None = None) -> None:
        """Call the function. Its answer may still have to be awaited. Whatever it raises is its failure, unless a signal came meanwhile."""
        try:
            self.answer = _whole(self.call.reward.function(**self.call.arguments(self.notes)))
        except BaseException as error:  # sys.exit() in a reward ends no training
            if not isinstance(error, Exception) and around is not None and around.was_signalled:
                raise
            self.scores = raised(self.call, error)

    def invoke_elsewhere(self) -> None:
        """The same beside training."""
        around = Surroundings(whole=False)
        self.invoke()
        self.changed = around.differences(restore=False)

    def judge(self) -> None:
        if not self.scores:
            self.scores = scores_of(self.call, self.answer)


class Lane(Protocol):
    """Runs attempts of one reward and fills in their scores. Its methods run on `home()`."""

    async def run(self, attempts: list[Attempt], seconds: float | None) -> None:
        """seconds: the time limit of each call; None: there is none."""
        ...

    def close(self) -> None:
        """Give up threads or processes. The next `run` takes new ones."""
        ...


class Executor(Protocol):
    def do(self, function: Callable[[], None]) -> Future[None]: ...


class Here:
    """The thread that waits for the scores runs, while it waits, what must run on it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()

    def do(self, function: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((future, function))
        return future

    def serve_until(self, done: Future[Any]) -> Any:
        """Work until `done` is, and return its result."""
        done.add_done_callback(lambda _: self._jobs.put(None))
        while (job := self._jobs.get()) is not None:
            _carry_out(*job, reraise=True)
        return done.result()


class Thread:
    """A daemon thread that does what it is given, in order."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="posttrain-reward", daemon=True).start()

    def do(self, function: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((future, function))
        return future

    def end(self) -> None:
        """Let the thread end once it is free."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _carry_out(*job, reraise=False)


class LocalLane:
    """In this process, on the thread of `here`, or where that is None on one of its own."""

    def __init__(self) -> None:
        self.here: Here | None = None
        self._thread: Thread | None = None  # None: none yet, or the last one was left behind
        self._loop = UserLoop("posttrain-reward-loop")
        self._one_at_a_time = asyncio.Lock()

    async def run(self, attempts: list[Attempt], seconds: float | None) -> None:
        async with self._one_at_a_time:
            if seconds is None:
                whole = self.here is not None
                await asyncio.wrap_future(self._executor().do(functools.partial(_invoke_all, attempts, whole=whole)))
            else:
                for attempt in attempts:
                    await self._invoke(attempt, seconds)
        if awaited := [attempt for attempt in attempts if inspect.isawaitable(attempt.answer)]:
            around = Surroundings(whole=False)
            await asyncio.gather(*(self._await(attempt, seconds) for attempt in awaited))
            awaited[0].changed += around.differences(restore=False)
        for attempt in attempts:
            attempt.judge()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.end()
            self._thread = None
        self._loop.stop()

    def _executor(self) -> Executor:
        if self.here is not None:
            return self.here
        self._thread = self._thread or Thread()
        return self._thread

    async def _invoke(self, attempt: Attempt, seconds: float) -> None:
        tried = Attempt(attempt.call)  # a call that is left behind may still write into it
        future = asyncio.wrap_future(self._executor().do(tried.invoke_elsewhere))
        done, _ = await asyncio.wait([future], timeout=seconds)
        if not done:
            attempt.scores = timed_out(attempt.call, seconds)
            if self._thread is not None:
                self._thread.end()
                self._thread = None
        elif (error := future.exception()) is not None:  # of a kind that `invoke` does not know
            attempt.scores = raised(attempt.call, error)
        else:
            attempt.notes, attempt.scores, attempt.answer, attempt.changed = tried.notes, tried.scores, tried.answer, tried.changed

    async def _await(self, attempt: Attempt, seconds: float | None) -> None:
        outcome = await self._loop.run(_read(attempt.answer), seconds)
        if outcome is None:
            assert seconds is not None
            attempt.scores, attempt.answer, attempt.notes = timed_out(attempt.call, seconds), None, Notes()
            return
        attempt.answer, error = outcome
        if error is not None:
            attempt.scores = raised(attempt.call, error)


def _invoke_all(attempts: list[Attempt], *, whole: bool) -> None:
    """whole: on the thread that trains, which gets its surroundings back."""
    around = Surroundings(whole=whole)
    try:
        for attempt in attempts:
            attempt.invoke(around)
    finally:
        changed = around.differences(restore=whole)
        for attempt in attempts[:1]:
            attempt.changed = changed


@functools.cache
def home() -> asyncio.AbstractEventLoop:
    """The loop that keeps time for all rewards. No code of a user runs on it."""
    return new_loop("posttrain-rewards")


def at_home(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    return asyncio.run_coroutine_threadsafe(coroutine, home())


def _carry_out(future: Future[None], function: Callable[[], None], *, reraise: bool) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        function()
    except BaseException as error:  # SystemExit and KeyboardInterrupt as themselves would end the loop that waits
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        if reraise:
            raise
    else:
        future.set_result(None)


async def _read(answer: Awaitable[Any]) -> Any:
    return _whole(await answer)


def _whole(answer: Any) -> Any:
    """A generator is run to its end here, where its time is counted and its exceptions are caught."""
    return list(answer) if isinstance(answer, Iterator) and not inspect.isawaitable(answer) else answer
