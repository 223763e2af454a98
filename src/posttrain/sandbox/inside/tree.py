"""Processes and what descends from them, read from /proc. Used on both sides of the wall."""

from __future__ import annotations

import os
import signal
import time

PATIENCE_S = 5.0  # for killed processes to be gone: giving back much memory takes a busy machine a while

LOOKS = 5  # in a row that find nobody


def end_descendants(of: int) -> None:
    """Kills every process below `of`, which adopts those whose parents die first. Stopped before killed, so that none can fork away.

    One look that finds nobody proves nothing: a process may fork and end while it is being listed. A process that asks for itself knows from the
    kernel when it has no child left.
    """
    until = time.monotonic() + PATIENCE_S
    looks_in_vain = 0
    while time.monotonic() < until and looks_in_vain < LOOKS:
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
            looks_in_vain = 0 if found else looks_in_vain + 1
        time.sleep(0.001)


def descendants(of: int) -> list[int]:
    """Pids below `of`, zombies left out. Empty where there is no /proc."""
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
