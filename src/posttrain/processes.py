"""Child processes that end with this one, however it ends. Standard library only: run as a file, this module is the
guard.

The guard is one small process that reads from a pipe which children are alive. The pipe closes when this process ends,
also by SIGKILL or for want of memory; the guard then kills the process groups that are left, even if they hold a lock.
It needs nothing of one system alone: Linux's PR_SET_PDEATHSIG follows the thread that started a process, and spares the
children of that process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import Any

LOOK = 1.0  # seconds between looks at the parent's number: a forked child may hold the pipe open after its parent


def guard(pid: int) -> None:
    """This process's end is the child's end too and, on POSIX, its group's. It must lead its group
    (`start_new_session=True`)."""
    _tell(f"+{pid}", pid, is_alive=True)


def release(pid: int) -> None:
    """The child has ended; its number may soon be another process's."""
    _tell(f"-{pid}", pid, is_alive=False)


_guarded: set[int] = set()
_guards: dict[int, tuple[Any, int]] = {}  # process -> its guard and the pipe to it. A forked child has a guard of its own


def _tell(line: str, pid: int, *, is_alive: bool) -> None:
    if os.getpid() not in _guards:
        _guards.clear()
        _guarded.clear()
        if not is_alive:
            return
    (_guarded.add if is_alive else _guarded.discard)(pid)
    try:
        os.write(_pipe(), f"{line}\n".encode())
    except BrokenPipeError:  # the guard was killed: the next one is told of all
        _end_guard()
        os.write(_pipe(), "".join(f"+{each}\n" for each in _guarded).encode())


def _pipe() -> int:
    if os.getpid() not in _guards:
        import subprocess

        reading, writing = os.pipe()
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        try:
            nothing = subprocess.DEVNULL
            started = subprocess.Popen(command, stdin=reading, stdout=nothing, stderr=nothing, start_new_session=True, cwd=os.sep)
        finally:
            os.close(reading)
        _guards[os.getpid()] = started, writing
    return _guards[os.getpid()][1]


@atexit.register
def _end_guard() -> None:
    started, pipe = _guards.pop(os.getpid(), (None, 0))
    if started is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(pipe, b"end\n")  # a forked child may hold the pipe open
        os.close(pipe)
        started.wait()


def main(parent: int) -> None:
    """The guard: until the pipe ends, or this process has another parent."""
    alive: set[int] = set()
    said = b""
    while (more := _read(parent)) is not None:
        *lines, said = (said + more).split(b"\n")
        for line in lines:
            if line != b"end":
                (alive.add if line.startswith(b"+") else alive.discard)(int(line[1:]))
        if b"end" in lines:
            break
    for pid in alive:
        _kill(pid)


def _read(parent: int) -> bytes | None:
    """The next bytes from the parent, also those left after its end; None at the end. On Windows, without select for
    pipes, reading blocks."""
    if os.name == "posix":
        import select

        while not select.select([0], [], [], LOOK if os.getppid() == parent else 0)[0]:
            if os.getppid() != parent:
                return None
    return os.read(0, 65536) or None


def _kill(pid: int) -> None:
    if os.name == "posix":
        try:
            os.killpg(pid, 9)
        except (ProcessLookupError, PermissionError):  # it ended by itself
            return
    else:
        import subprocess

        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main(int(sys.argv[1]))
