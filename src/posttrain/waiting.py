"""One private event loop in a thread of its own, for whatever must be awaited: a notebook's or a server's own loop is not in the way.

It stays the same loop for the life of the process, so that what a coroutine opened (a client's session) can be used by the next one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any


def settled(values: Sequence[Any]) -> list[Any]:
    """Each value; of an awaitable its result, or the exception that it raised. They are awaited together, started in their order."""
    if not any(inspect.isawaitable(value) for value in values):
        return list(values)

    async def gather() -> list[Any]:
        return await asyncio.gather(*(_settled(value) for value in values))

    future: Future[list[Any]] = asyncio.run_coroutine_threadsafe(gather(), _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C: do not leave them running behind the caller's back
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


async def _settled(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value
    awaitable: Awaitable[Any] = value
    try:
        return await awaitable
    except Exception as error:
        return error
    except (SystemExit, KeyboardInterrupt) as raised:
        return RuntimeError(f"{type(raised).__name__}: {raised}")


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
