"""Starts the process for a program: forked by a fork server where possible (Linux), otherwise as a command.

Both give a handle with these methods of subprocess.Popen: pid, poll, wait, kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.sandbox.isolation import BOOT, HERE, Backend, Handle, Start, environment, new_user
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.view import View, interpreter

PYTHON = ("-S", "-s", "-X", "utf8", "-c", BOOT)


class Forked:
    """A process forked by the fork server, with a pidfd: unlike its pid, that cannot come to mean another process."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd

    def poll(self) -> int | None:
        return 0 if self._has_ended(0.0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._has_ended(timeout):
            raise subprocess.TimeoutExpired("a program", timeout or 0.0)
        return 0

    def _has_ended(self, timeout: float | None) -> bool:
        poller = select.poll()  # and not `select`, which knows no descriptor above 1023
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(None if timeout is None else timeout * 1000))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._pidfd)


class ForkServer:
    """One for this process (inside/fork_server.py), started with the first program, and again if it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._owner = 0  # the process that started it; a fork of this one needs its own
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, config: dict[str, Any], descriptors: Sequence[int]) -> Handle:
        """descriptors: standard input, output, error and the status pipe of the new process. Raises OSError."""
        message = json.dumps(config).encode()
        with self._lock:
            for attempt in (1, 2):
                channel = self._open()
                try:
                    socket.send_fds(channel, [message], list(descriptors))
                    pid = int(channel.recv(32))
                    return Forked(pid, os.pidfd_open(pid))
                except (OSError, ValueError) as error:  # an empty reply: it has ended
                    self._close()
                    if attempt == 2:
                        raise OSError(f"the process that starts programs ended: {error}") from error
        raise AssertionError

    def _open(self) -> socket.socket:
        if self._channel is None or self._owner != os.getpid():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [interpreter(), *PYTHON, HERE, "fork_server", str(os.getpid())],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=environment(),
                    start_new_session=True,
                )
            self._channel, self._owner = ours, os.getpid()
        return self._channel

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


FORK_SERVER = ForkServer()


@dataclass(frozen=True)
class Child:
    """A started process and our ends of its pipes. The reader closes them."""

    handle: Handle
    stdin: int
    stdout: int
    stderr: int
    status: int  # the supervisor's reports; -1 without a supervisor


def spawn(backend: Backend, config: dict[str, Any], folder: str | None, limits: Limits) -> Child:
    """Starts the process that `config` describes (inside/start.py). Raises OSError."""
    pipes = [os.pipe() for _ in range(4 if backend.has_supervisor else 3)]  # (to read, to write)
    ours = [pipes[0][1], *(pipe[0] for pipe in pipes[1:])]
    theirs = [pipes[0][0], *(pipe[1] for pipe in pipes[1:])]
    try:
        if backend.is_forked:
            handle: Handle = FORK_SERVER.fork(config, theirs)
        else:
            handle = _start(backend, config, theirs, folder, limits)
    except OSError:
        _close(ours)
        raise
    finally:
        _close(theirs)
    return Child(handle, ours[0], ours[1], ours[2], ours[3] if backend.has_supervisor else -1)


def _start(backend: Backend, config: dict[str, Any], descriptors: list[int], folder: str | None, limits: Limits) -> Handle:
    """As a command of its own."""
    reports = [descriptors[3], os.dup(descriptors[3])] if backend.has_supervisor else []  # the supervisor's, and bubblewrap's
    empty = [os.open(os.devnull, os.O_RDONLY)] if config["stdin"] else []
    inner = [interpreter(), *PYTHON, HERE, json.dumps(config | {"report": reports[0] if reports else -1, "parent": os.getpid()})]
    user = new_user() if backend.user == "outside" and os.geteuid() == 0 else None
    start = Start(limits, View(**config["view"]), reports[1] if reports else -1, empty[0] if empty else -1)
    try:
        return subprocess.Popen(
            backend.command(inner, start),
            stdin=descriptors[0],
            stdout=descriptors[1],
            stderr=descriptors[2],
            cwd=folder or "/",
            env=environment(),
            start_new_session=os.name == "posix",
            pass_fds=reports + empty,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    finally:
        _close(reports[1:] + empty)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
