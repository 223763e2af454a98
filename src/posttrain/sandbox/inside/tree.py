"""Processes and their descendants, read from /proc. Used inside and outside of the sandbox."""

from __future__ import annotations

import os
import signal
import time

PATIENCE_S = 5.0  # for killed processes to end: a busy machine takes a while to free much memory

LOOKS = 5  # in a row that find no process


def end_descendants(of: int) -> None:
    """Kills every descendant of `of`, which adopts those whose parents die first. They are stopped first, so that none
    can fork meanwhile.

    One look that finds none proves nothing: a process may fork and end while /proc is read. With its own pid, a process
    learns from the kernel when it has no child left.
    """
    until = time.monotonic() + PATIENCE_S
    empty_looks = 0
    while time.monotonic() < until and empty_looks < LOOKS:
        found = descendants(of)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                try:
                    os.kill(pid, number)
                except (ProcessLookupError, PermissionError):
                    continue
        if of == os.getpid():
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
        else:
            empty_looks = 0 if found else empty_looks + 1
        time.sleep(0.001)


def descendants(of: int) -> list[int]:
    """Pids of the descendants of `of`, without zombies. Empty without /proc."""
    if not os.path.isdir("/proc/self"):
        return []
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state not in (b"Z", b"X"):
            children.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    waiting = [of]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
