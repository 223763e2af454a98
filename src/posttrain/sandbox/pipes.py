"""This side of a program's pipes: threads that read and write them, and stop when told to, even if the other ends stay
open."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable

PIECE = 65536
CAN_POLL = os.name == "posix"


class EndSignal:
    """Given once the program and all that it started are dead: nothing more is written to the pipes then.

    A pipe's end of file does not tell that. Two sockets that were sent through each other, for one, hold a pipe open
    until the kernel collects them.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe() if CAN_POLL else (-1, -1)

    def give(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def __del__(self) -> None:
        self.give()
        if self.reader >= 0:
            os.close(self.reader)


class Pipe(threading.Thread):
    """Reads one pipe to its end, its cap, or the program's end, and closes it."""

    def __init__(self, descriptor: int, cap: int, changed: threading.Condition, end: EndSignal) -> None:
        super().__init__(daemon=True, name="posttrain-sandbox-pipe")
        self.descriptor, self.cap, self.changed, self.end = descriptor, cap, changed, end
        self.content = bytearray()
        self.is_over = False  # the cap is reached
        self.is_done = False
        self.was_open = False  # its other end was still open when the program was dead
        self.start()

    def run(self) -> None:
        wait = _waiter(self.descriptor, select.POLLIN, self.end) if CAN_POLL else None
        while not self.is_done:
            is_ended = wait() if wait is not None else False
            try:
                piece = os.read(self.descriptor, PIECE)
            except BlockingIOError:
                if not is_ended:
                    continue
                piece, self.was_open = b"", True
            except OSError:
                piece = b""
            with self.changed:
                self.content += piece[: self.cap - len(self.content)]
                self.is_over = len(self.content) >= self.cap
                self.is_done = not piece or self.is_over
                self.changed.notify_all()
        os.close(self.descriptor)


class Feeder(threading.Thread):
    """Writes to a program's standard input, which may never be read."""

    def __init__(self, descriptor: int, end: EndSignal) -> None:
        super().__init__(daemon=True, name="posttrain-sandbox-feeder")
        self.descriptor, self.end = descriptor, end
        self.waiting: deque[bytes | None] = deque()
        self.arrived = threading.Semaphore(0)
        self.start()

    def put(self, data: bytes | None) -> None:
        """None is the end of the input."""
        self.waiting.append(data)
        self.arrived.release()

    def run(self) -> None:
        wait = _waiter(self.descriptor, select.POLLOUT, self.end) if CAN_POLL else None
        with contextlib.suppress(OSError):  # a broken pipe: the program has stopped reading, as it may
            while True:
                self.arrived.acquire()
                data = self.waiting.popleft()
                if data is None or not self._write(memoryview(data), wait):
                    break
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def _write(self, left: memoryview, wait: Callable[[], bool] | None) -> bool:
        """False when the program ended first."""
        while left:
            if wait is not None and wait():
                return False
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self.descriptor, left) :]
        return True


def _waiter(descriptor: int, event: int, end: EndSignal) -> Callable[[], bool]:
    """A function that waits for the descriptor or the program's end, and returns whether it was the end."""
    os.set_blocking(descriptor, False)
    poller = select.poll()
    poller.register(descriptor, event)
    poller.register(end.reader, 0)  # its hang-up is reported always

    def wait() -> bool:
        return any(ready == end.reader for ready, _ in poller.poll())

    return wait
