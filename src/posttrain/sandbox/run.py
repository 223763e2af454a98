"""One program in isolation: start it, exchange data with it, end it, and report how it ended.

A program's output is bytes, capped and not trusted. How it ended comes from the supervisor, on a pipe that the program
does not have. A sandbox that could not be set up raises SandboxError, which is never the program's fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from posttrain.sandbox.isolation import Backend, Level, end, new_user
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.pipes import EndSignal, Feeder, Pipe
from posttrain.sandbox.spawn import spawn
from posttrain.sandbox.view import View, package_paths, view

MOST_IN_A_FILE = 4 * 2**20  # bytes of standard input that are also in a file /dev/stdin, as without /proc it cannot be reopened
STDERR_KEPT = 4096  # bytes at the end of standard error that an outcome keeps
GRACE_S = 0.5  # for a killed process to end
LAST_BYTES_S = 30.0  # for the rest in the pipes: this process may be stalled, and output that it has not read is not wrong output


class SandboxError(RuntimeError):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended, whether it was right or not."""

    ended: str  # "exit", "signal", or the limit that it reached: "wall", "cpu", "output"
    code: int | None  # the exit code, or the signal's number; None when it was killed at a limit
    stdout: bytes  # at most the cap
    stderr: str  # its last characters
    seconds: float  # of wall clock
    cpu_s: float | None = None  # of the program's main process and the children it waited for; None when it was killed

    @property
    def is_clean(self) -> bool:
        return self.ended == "exit" and self.code == 0

    def __str__(self) -> str:
        words = {"exit": f"exit code {self.code}", "signal": f"signal {self.code}"}
        last = self.stderr.strip().splitlines()[-1:] or [""]
        return (words.get(self.ended) or f"the limit of {self.ended} was reached") + (f" ({last[0][:200]})" if last[0] else "")


class Process:
    """A running program. `close`, or leaving the `with` block, ends it and all that it started."""

    def __init__(self, backend: Backend, message: dict[str, Any], limits: Limits, *, packages: bool = False, visible: tuple[str, ...] = ()) -> None:
        self.backend, self.limits = backend, limits
        self.started = time.monotonic()
        self.changed = threading.Condition()
        self.first: int | None = None  # a pidfd of the namespace's first process
        self.report: dict[str, Any] = {}  # what the supervisor reported so far
        self.outcome: Outcome | None = None
        self._read_to = 0  # of standard output, by `line`
        self._reported_to = 0  # of the status
        self._is_closed = False
        self.folder: str | None = None
        try:
            child = spawn(backend, self._config(message, packages, visible), self.folder, limits)
        except OSError as error:
            self._remove_folder()
            raise SandboxError(f"a process could not be started: {error}") from error
        self.handle = child.handle
        cap = int(limits.output_kb * 1024)
        self.end = EndSignal()
        self.stdout = Pipe(child.stdout, cap, self.changed, self.end)
        self.stderr = Pipe(child.stderr, cap, self.changed, self.end)
        self.status = Pipe(child.status, cap, self.changed, self.end) if backend.has_supervisor else None
        self.feeder = Feeder(child.stdin, self.end)
        frame = json.dumps(message).encode()
        self.write(b"%010d" % len(frame) + frame)

    def _config(self, message: dict[str, Any], packages: bool, visible: tuple[str, ...]) -> dict[str, Any]:
        """For inside/start.py. Makes a working directory if the backend has none of its own. Raises OSError."""
        user = new_user() if self.backend.user == "inside" else None
        if self.backend.level < Level.NAMESPACES:
            self.folder = tempfile.mkdtemp(prefix="posttrain-")
            if user is not None and os.geteuid() == 0:
                os.chown(self.folder, user, user)
        return {
            "do": message["do"],
            "stdin": "stdin" in message,
            "posix": self.backend.has_supervisor,
            "backend": self.backend.name,
            "user": user,
            "folder": self.folder,
            "packages": package_paths() if packages else [],
            "view": (view(packages, visible) if self.backend.level == Level.NAMESPACES else View()).to_json(),
            "limits": self.limits.inside(),
        }

    def write(self, data: bytes | None) -> None:
        """Queues input; None ends it."""
        self.feeder.put(data)

    def line(self) -> bytes | None:
        """The next line of standard output; None at its end: then `outcome` is set."""
        with self.changed:
            while True:
                self._listen()
                end_of_line = self.stdout.content.find(b"\n", self._read_to)
                if end_of_line >= 0:
                    found = bytes(self.stdout.content[self._read_to : end_of_line])
                    self._read_to = end_of_line + 1
                    return found
                if self.stdout.is_done or self._limit_reached() is not None or not self.changed.wait(self._left()):
                    break
        self.wait()
        return None

    def wait(self) -> Outcome:
        """Until the program ends or reaches a limit. Raises SandboxError when it never started."""
        if self.outcome is None:
            with self.changed:
                while not self._has_ended() and self._limit_reached() is None:
                    self.changed.wait(min(self._left(), 0.05 if self.status is None else 60.0))
            reached = self._limit_reached() if not self._has_ended() or self.stdout.is_over or self.stderr.is_over else None
            self.close()
            self.outcome = self._outcome(reached)
        return self.outcome

    def close(self) -> None:
        """Ends all that is left of the program and frees its resources. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        with self.changed:
            self._listen()
        end(self.handle, self.first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.handle.wait(GRACE_S)
        self.end.give()
        self.feeder.put(None)
        until = time.monotonic() + LAST_BYTES_S
        for pipe in (self.stdout, self.stderr, self.status):
            if pipe is not None:
                pipe.join(max(0.0, until - time.monotonic()))
        if self.stdout.was_open or self.stderr.was_open:
            _collect_sockets()
        with self.changed:
            self._listen()
        if self.first is not None:
            os.close(self.first)
            self.first = None
        self._remove_folder()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _left(self) -> float:
        return max(0.0, self.started + self.limits.wall_s - time.monotonic())

    def _has_ended(self) -> bool:
        self._listen()
        if self.status is None:
            return self.handle.poll() is not None
        return self.status.is_done

    def _limit_reached(self) -> str | None:
        if self.stdout.is_over or self.stderr.is_over:
            return "output"
        return "wall" if self._left() <= 0 else None

    def _listen(self) -> None:
        """Reads the new reports of the supervisor."""
        if self.status is None:
            return
        content = self.status.content
        while (end_of_line := content.find(b"\n", self._reported_to)) >= 0:
            said = json.loads(content[self._reported_to : end_of_line])
            self._reported_to = end_of_line + 1
            self.report |= said
            pid = said.get("pid", said.get("child-pid"))
            if pid is not None and self.first is None and not self._is_closed:
                with contextlib.suppress(OSError):  # it has ended already
                    self.first = os.pidfd_open(pid)

    def _outcome(self, reached: str | None) -> Outcome:
        stderr = bytes(self.stderr.content[-STDERR_KEPT:]).decode("utf-8", "replace")
        seconds = time.monotonic() - self.started
        if self.backend.has_supervisor and "ready" not in self.report:
            why = self.report.get("failed") or (f"it was not ready within {self.limits.wall_s} s" if reached else stderr.strip() or "it ended early")
            raise SandboxError(f"the sandbox ({self.backend.name}) could not be set up: {why}")
        if not self.stdout.is_done:
            raise SandboxError(f"the sandbox ({self.backend.name}): a program's output was not read to its end within {LAST_BYTES_S:g} s")
        stdout = bytes(self.stdout.content)
        if reached is not None:
            return Outcome(reached, None, stdout, stderr, seconds)
        code = self.report.get("exit") if self.backend.has_supervisor else self.handle.poll()
        if code is None and self.backend.supervisor_is_safe:  # the machine is out of memory, or a user killed it
            raise SandboxError(f"the sandbox ({self.backend.name}) was ended from outside")
        if code is None:  # the program may have ended its supervisor
            return Outcome("signal", 9, stdout, stderr, seconds)
        cpu_s = self.report.get("cpu_s")
        if code < 0 and cpu_s is not None and cpu_s >= self.limits.cpu_s - 0.1:
            return Outcome("cpu", None, stdout, stderr, seconds, cpu_s)
        return Outcome("signal" if code < 0 else "exit", abs(code), stdout, stderr, seconds, cpu_s)

    def _remove_folder(self) -> None:
        """At once if the program left no files; many files may take longer than the verdict should."""
        if self.folder is not None:
            try:
                os.rmdir(self.folder)
            except OSError:
                threading.Thread(target=_remove, args=(self.folder,), name="posttrain-sandbox-remover").start()
            self.folder = None


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # the program nested directories deeper than Python's stack
        subprocess.run(["rm", "-rf", "--", folder], check=False, capture_output=True)


def _collect_sockets() -> None:
    """Closing a unix socket makes the kernel free sockets that only hold each other, which count against this user's
    quota."""
    if os.name == "posix":
        for each in socket.socketpair():
            each.close()


def run(backend: Backend, message: dict[str, Any], stdin: bytes, limits: Limits, *, packages: bool = False, visible: tuple[str, ...] = ()) -> Outcome:
    """Runs one program to its end. `message` says what it is (inside/start.py)."""
    if backend.level == Level.NAMESPACES and len(stdin) <= min(MOST_IN_A_FILE, limits.inside()["files"] // 2):
        message = message | {"stdin": stdin.decode()}
    with Process(backend, message, limits, packages=packages, visible=visible) as process:
        process.write(stdin)
        process.write(None)
        return process.wait()
