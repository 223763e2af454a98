"""Private event loops in threads of their own, for whatever must be awaited: a notebook's or a server's own loop is not in the way.

A loop stays the same for the life of the process, so that what a coroutine opened (a client's session) can be used by the next one; only a
`UserLoop` is left behind once a coroutine blocks it, so that somebody can still keep time.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

Outcome = tuple[Any, BaseException | None]  # a result, or what was raised instead
LOOP_PATIENCE = 1.0  # seconds in which a loop must answer, or a coroutine is blocking it


def settled(values: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """Each value; of an awaitable its result, or the exception that it raised. They are awaited together, started in their order.

    Raises concurrent.futures.TimeoutError when that takes longer than `seconds`; None: there is no limit.
    """
    if not any(inspect.isawaitable(value) for value in values):
        return list(values)

    async def gather() -> list[Any]:
        return await asyncio.gather(*(_settled(value) for value in values))

    future: Future[list[Any]] = asyncio.run_coroutine_threadsafe(gather(), _loop())
    try:
        return future.result(seconds)
    except BaseException:  # too late, or Ctrl-C: do not leave them running behind the caller's back
        future.cancel()
        raise


async def in_thread(function: Callable[[], Any]) -> Any:
    """The result of a blocking call. Cancelling abandons the thread: it cannot be killed, but nothing waits for it any more."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        except BaseException as raised:  # sys.exit() in a thread would end it without a word, and nobody would hear the end
            error = RuntimeError(f"{type(raised).__name__}: {raised}")
        loop.call_soon_threadsafe(_resolve, future, result, error)

    threading.Thread(target=run, name="posttrain-call", daemon=True).start()
    return await future


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


async def within(awaitable: Awaitable[Any], seconds: float | None) -> Outcome | None:
    """Its outcome; None when it takes longer than `seconds`: then it is cancelled, and not waited for any more."""
    return await _awaited(asyncio.ensure_future(_outcome(awaitable)), seconds)


class UserLoop:
    """A loop for coroutines of a user. One that a coroutine blocks is left behind with its thread; the next coroutine gets a new one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None  # None: none yet, or the last one was left behind

    async def run(self, awaitable: Awaitable[Any], seconds: float | None) -> Outcome | None:
        """As `within`, on this loop."""
        loop = self._loop = self._loop or new_loop(self.name)
        outcome = await _awaited(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_outcome(awaitable), loop)), seconds)
        if outcome is None and self._loop is loop and not await _turns(loop) and self._loop is loop:
            self.stop()  # should it ever turn again
        return outcome

    def stop(self) -> None:
        """Give the thread up. The next `run` takes a new one."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None


async def _awaited(future: asyncio.Future[Outcome], seconds: float | None) -> Outcome | None:
    """Wait without owning: what is not done is cancelled, also when the waiting itself is."""
    try:
        done, _ = await asyncio.wait([future], timeout=seconds)
    finally:
        future.cancel()
    return future.result() if done else None


async def _outcome(awaitable: Awaitable[Any]) -> Outcome:
    try:
        return await awaitable, None
    except BaseException as error:  # SystemExit would end the loop, and a CancelledError of its own what waits for it
        return None, error


async def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    turned: Future[None] = Future()
    loop.call_soon_threadsafe(turned.set_result, None)
    done, _ = await asyncio.wait([asyncio.wrap_future(turned)], timeout=LOOP_PATIENCE)
    return bool(done)


async def _settled(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value
    result, error = await _outcome(value)
    if error is None or isinstance(error, Exception):
        return result if error is None else error
    return RuntimeError(f"{type(error).__name__}: {error}")


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    """A loop that turns in a daemon thread of that name until it is stopped. sys.exit() in a task is that task's end and not the loop's."""
    loop = asyncio.new_event_loop()

    def turn() -> None:
        while True:
            try:
                loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):  # asyncio lets these two through; whoever awaits the task hears of it all the same
                continue
        loop.close()

    threading.Thread(target=turn, name=name, daemon=True).start()
    return loop


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return new_loop("posttrain-waiting")
