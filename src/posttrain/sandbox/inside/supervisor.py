"""The parent process of the program: sets up the isolation, starts the program in a child, waits, and reports on a pipe
that the child closes.

In namespaces it is process 1 of its process namespace, and everything in there dies with it. Elsewhere it adopts the
processes that the program leaves behind and kills them. It knows no tests and no expected values.

The program cannot stop it: signals are ignored (process 1 cannot be killed from within its namespace), and while it
waits it needs nothing that could run out. It ends with its parent, however that ends, and kills the program then.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any, NoReturn

from . import confine
from .tree import end_descendants

IS_LINUX = sys.platform.startswith("linux")
if IS_LINUX:  # here, since these files are not visible from within the sandbox
    from . import landlock, namespaces, syscalls, system

WITHOUT_NAMESPACES = ("own user", "rlimits")  # backends where the supervisor adopts what the program leaves behind
LOOK_S = 1.0  # how often it looks whether its parent is still there
PATIENCE_S = 60.0  # beyond the time limit, which the parent process enforces; a busy machine may be late


def confine_and_supervise(config: dict[str, Any]) -> None:
    """Returns in the confined child only. Errors before the program starts are reported as {"failed": why}."""
    report = int(config["report"])
    os.closerange(3, report)
    os.closerange(report + 1, 4096)
    confine.ignore_signals()
    try:
        _enter(config, report)
        others = _others(config)
        program = os.fork()
    except OSError as error:
        _say(report, {"failed": str(error)})
        os._exit(1)
    if program != 0:
        _supervise(program, report, config)
    try:
        confine.default_signals()
        _confine_program(config, others)
        _say(report, {"ready": True})
    except (OSError, ValueError) as error:
        _say(report, {"failed": str(error)})
        os._exit(1)
    os.close(report)


def _enter(config: dict[str, Any], report: int) -> None:
    if config["backend"] in WITHOUT_NAMESPACES and os.getppid() != config["parent"]:
        os._exit(1)  # the parent has ended already
    if not IS_LINUX:
        return
    if config["backend"] in WITHOUT_NAMESPACES:
        system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)
        system.prctl(system.PR_SET_DUMPABLE, 0)
        return
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)  # the parent's end ends this process and the namespace
    if config["backend"] == "bubblewrap":
        system.prctl(system.PR_SET_DUMPABLE, 0)
        return
    namespaces.enter(config["user"], config["view"]["owners"], config["view"]["groups"])
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)  # again: the kernel resets it when a process changes its user
    if os.getppid() != config["parent"]:
        os._exit(1)
    first = os.fork()
    if first != 0:
        _say(report, {"pid": first})
        for descriptor in (0, 1, 2, report):
            os.close(descriptor)
        os.waitpid(first, 0)
        os._exit(0)
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    namespaces.build_root(config)
    system.prctl(system.PR_SET_DUMPABLE, 0)


def _others(config: dict[str, Any]) -> int:
    """Further processes that count towards the program's limit. Since Linux 5.14 a user namespace counts only those
    inside."""
    if config["user"] is not None and os.geteuid() == 0:
        return 0  # the program gets its own user number
    supervisors = 2
    if IS_LINUX and config["backend"] != "rlimits" and _kernel() >= (5, 14):
        return supervisors
    return supervisors + confine.processes_of(os.geteuid())


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)


def _confine_program(config: dict[str, Any], others: int) -> None:
    if IS_LINUX:  # a signal to the process group also reaches processes outside of the namespace
        os.setsid()
    is_root = os.geteuid() == 0
    user = config["user"] if is_root else None
    if user is not None and config["backend"] == "namespaces":
        user = namespaces.USER_INSIDE
    elif user is not None:
        for descriptor in (0, 1, 2):  # so that it may reopen them as /dev/stdin, /dev/stdout and /dev/stderr
            os.fchown(descriptor, user, user)
    confine.give_up_rights(user, has_capabilities=is_root or config["backend"] == "namespaces")
    confine.set_limits(config["limits"], others)
    if IS_LINUX:
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        if config["folder"] is not None:
            landlock.confine_to(config["folder"])
        syscalls.refuse(programs=config["backend"] in ("namespaces", "bubblewrap"))


def _supervise(program: int, report: int, config: dict[str, Any]) -> NoReturn:
    for descriptor in (0, 1, 2):  # only the program holds them then
        os.close(descriptor)
    ended = _until_it_ends(program, report, config)
    if config["backend"] in WITHOUT_NAMESPACES:
        end_descendants(os.getpid())
    if ended is not None:
        status, usage = ended
        cpu_s = round(usage.ru_utime + usage.ru_stime, 3)
        _say(report, {"exit": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s, "peak_kb": usage.ru_maxrss})
    if not IS_LINUX:  # what the program left can only be found in its process group, which includes this process
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _until_it_ends(program: int, report: int, config: dict[str, Any]) -> tuple[int, Any] | None:
    """(status, usage) by wait4; None if the parent has ended, the report has no reader, or the time limit is long
    over."""
    parent = config["parent"] if config["backend"] in WITHOUT_NAMESPACES else os.getppid()
    until = time.monotonic() + config["limits"]["wall_s"] + PATIENCE_S
    child_ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    poller = select.poll()
    poller.register(child_ended, select.POLLIN)
    poller.register(report, 0)  # an error: its reader has closed it
    while True:
        while (ended := os.wait4(-1, os.WNOHANG))[0] != 0:
            if ended[0] == program:
                return ended[1], ended[2]
        if os.getppid() != parent or time.monotonic() > until:
            return None
        for descriptor, _ in poller.poll(LOOK_S * 1000):
            if descriptor == report:
                return None
            os.read(child_ended, 4096)


def _say(report: int, message: dict[str, Any]) -> None:
    try:
        os.write(report, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:  # the parent has closed the pipe
        os._exit(1)
