"""Private event loops, each in a thread of its own, so that coroutines run even inside a notebook's or a server's own
loop.

A loop lives as long as the process, so that what one coroutine opened (a client's session) serves the next. Only a
`UserLoop` is abandoned, when a coroutine blocks it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Outcome = tuple[Any, BaseException | None]  # a result, or what was raised instead
LOOP_PATIENCE = 1.0  # seconds; a loop that does not answer within them is blocked by a coroutine


def settled(values: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """The values, with each awaitable replaced by its result or by the exception that it raised. They are awaited
    together.

    Raises concurrent.futures.TimeoutError after `seconds`; None: no limit.
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
    """The result of a blocking call. Cancelling abandons the thread, which cannot be killed."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        except BaseException as raised:  # sys.exit() in a thread would end it silently, and the future would never be done
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
    """Its outcome; None if it was cancelled after `seconds`."""
    return await awaited(asyncio.ensure_future(_outcome(awaitable)), seconds)


async def awaited(future: asyncio.Future[T], seconds: float | None) -> T | None:
    """The future's result; None after `seconds`. It is cancelled unless it is done, also when the waiting is
    cancelled."""
    try:
        done, _ = await asyncio.wait([future], timeout=seconds)
    finally:
        future.cancel()
    return future.result() if done else None


class UserLoop:
    """A loop for a user's coroutines. When one blocks it, loop and thread are abandoned, and the next coroutine gets
    new ones."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None  # None: none yet, or the last one was abandoned

    async def run(self, awaitable: Awaitable[Any], seconds: float | None) -> Outcome | None:
        """As `within`, on this loop."""
        loop = self._loop = self._loop or new_loop(self.name)
        outcome = await awaited(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_outcome(awaitable), loop)), seconds)
        if outcome is None and self._loop is loop and not await _answers(loop) and self._loop is loop:
            self.stop()  # once it is free again
        return outcome

    def stop(self) -> None:
        """Abandons the thread. The next `run` takes a new one."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None


async def _outcome(awaitable: Awaitable[Any]) -> Outcome:
    try:
        return await awaitable, None
    except BaseException as error:  # SystemExit would end the loop; its own CancelledError would cancel the caller
        return None, error


async def _answers(loop: asyncio.AbstractEventLoop) -> bool:
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
    """A loop that runs in a daemon thread of that name until it is stopped. sys.exit() in a task ends the task, not the
    loop."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            try:
                loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):  # asyncio lets these two through; the one who awaits the task gets them as well
                continue
        loop.close()

    threading.Thread(target=run, name=name, daemon=True).start()
    return loop


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return new_loop("posttrain-awaits")
