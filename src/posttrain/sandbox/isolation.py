"""The isolation backends, strongest first: how each starts a program, and how all that the program started is ended.

This is the parent's side. The inner side of each backend is inside/supervisor.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from posttrain.sandbox.inside.tree import end_descendants
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.view import View, time_zones

IS_LINUX = sys.platform.startswith("linux")
HERE = str(Path(__file__).parent)
DEVICES = ("null", "zero", "full", "urandom", "random")
SHOWN_AS = "/posttrain"  # HERE, where bubblewrap shows it
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.start import main; main()"
# A range of user numbers that no account has. Each program gets one of its own: programs cannot see or signal each
# other, nor share a quota.
FIRST_USER, USERS = 1_500_000_000, 500_000_000


class Handle(Protocol):
    """A started process."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Level(IntEnum):
    """How strong the isolation is. docs/sandbox.md has the table."""

    PROCESS = 1  # another process, a clock, capped output, an empty directory, a bare environment
    LIMITS = 2  # and limits of memory, processor, files and processes, as a user of its own where root starts it
    NAMESPACES = 3  # and no network, no files but the interpreter's, no other processes


@dataclass(frozen=True)
class Start:
    """What a backend's command line depends on."""

    limits: Limits
    view: View
    status: int  # a descriptor to report on
    empty: int  # a descriptor of an empty file, if the program needs a file /dev/stdin; or -1


@dataclass(frozen=True)
class Backend:
    """One way of starting a program in isolation. command: from the inner command line to the whole one."""

    name: str
    level: Level
    has_supervisor: bool  # a process that reports on a pipe which the program does not have
    supervisor_is_safe: bool  # the program cannot end it
    user: str  # when root starts it, the program becomes another user: "inside" the backend, before it ("outside"), or not ("same")
    command: Callable[[list[str], Start], list[str]]
    missing: Callable[[], str | None]  # why it cannot work here, if that is known without a trial

    @property
    def is_forked(self) -> bool:
        """Whether the supervisor does all of it, so that its process can be a fork."""
        return IS_LINUX and self.has_supervisor and self.command is bare


def bare(inner: list[str], start: Start) -> list[str]:
    return inner


def bubblewrap(inner: list[str], start: Start) -> list[str]:
    """bwrap's arguments: the view, some devices and an empty /tmp. The supervisor is process 1, which no signal from
    inside can end."""
    shown = [["--ro-bind", path, path] for path in start.view.shown]
    links = [["--symlink", target, path] for path, target in start.view.links.items()]
    empty = [["--tmpfs", path, "--remount-ro", path] for path in start.view.empty]
    devices = [["--dev-bind", f"/dev/{name}", f"/dev/{name}"] for name in DEVICES]
    inner = [SHOWN_AS if argument == HERE else argument for argument in inner]
    own = [["--ro-bind", inner[0], inner[0]], ["--ro-bind", HERE, SHOWN_AS]]
    if start.empty >= 0:
        devices.append(["--bind-data", str(start.empty), "/dev/stdin"])
    return [
        str(shutil.which("bwrap")),
        *("--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--die-with-parent", "--cap-drop", "ALL", "--as-pid-1"),
        *("--json-status-fd", str(start.status)),
        *("--size", str(start.limits.inside()["files"]), "--tmpfs", "/tmp"),
        *(argument for arguments in (*shown, *links, *empty, *own, *devices) for argument in arguments),
        *("--chdir", "/tmp", "--remount-ro", "/"),
        *("--", *inner),
    ]


def _no_linux() -> str | None:
    return None if IS_LINUX else f"it needs Linux, and this is {sys.platform}"


def _no_bubblewrap() -> str | None:
    return _no_linux() or (None if shutil.which("bwrap") else "bubblewrap is not installed (bwrap is not on the PATH)")


def _no_posix() -> str | None:
    return None if os.name == "posix" else f"it needs Linux or macOS, and this is {sys.platform}"


def _no_root() -> str | None:
    return _no_posix() or (None if os.geteuid() == 0 else "it needs root to begin with")


def _no_other_user() -> str | None:
    return _no_posix() or (None if os.geteuid() != 0 else "root is not bound by the limit of processes; start it as another user")


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("namespaces", Level.NAMESPACES, True, True, "inside", bare, _no_linux),
        Backend("bubblewrap", Level.NAMESPACES, True, True, "outside", bubblewrap, _no_bubblewrap),
        Backend("own user", Level.LIMITS, True, True, "inside", bare, _no_root),
        Backend("rlimits", Level.LIMITS, True, False, "same", bare, _no_other_user),
        Backend("process", Level.PROCESS, False, False, "same", bare, lambda: None),
    )
}


def new_user() -> int:
    return FIRST_USER + secrets.randbelow(USERS)


@functools.cache
def environment() -> dict[str, str]:
    """The program's environment variables. The hash seed is fixed, so that a program gives the same output each
    time."""
    names = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": "/tmp", "MALLOC_ARENA_MAX": "1"}
    if (zones := time_zones()) and not set(zones) <= set(zoneinfo.TZPATH):  # those of the tzdata package
        names["PYTHONTZPATH"] = os.pathsep.join(zones)
    if os.name != "posix":  # Windows starts no Python without it
        names["SYSTEMROOT"] = os.environ.get("SYSTEMROOT", "")
    return names


def end(process: Handle, first: int | None) -> None:
    """Kills the program and all that it started. first: a pidfd of the first process of its process namespace, if it
    has one."""
    if os.name != "posix":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], check=False, capture_output=True)
    elif first is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)  # it ends when the last process of the namespace is gone
    elif process.poll() is None:
        end_descendants(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
