"""The process above the program's: it sets up the walls, starts the program in a child, waits, and reports on a pipe that the child closes.

In namespaces it is the first process of its own process namespace, and everything in there dies with it. Elsewhere it adopts what the
program leaves behind and ends it. It holds nothing that a program might want: no tests, no answers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

from . import confine
from .tree import end_descendants

IS_LINUX = sys.platform.startswith("linux")
if IS_LINUX:  # here, since beyond the wall these files are out of sight
    from . import namespaces, syscalls, system


def confine_and_keep(config: dict[str, Any]) -> None:
    """Returns in the confined child only. What goes wrong before the program starts is reported as {"failed": why}."""
    report = int(config["report"])
    os.closerange(3, report)
    os.closerange(report + 1, 4096)
    try:
        _enter(config, report)
        others = _others(config)
        program = os.fork()
    except OSError as error:
        _say(report, {"failed": str(error)})
        os._exit(1)
    if program != 0:
        _keep(program, report, config)
    try:
        _confine_program(config, others)
        _say(report, {"ready": True})
    except (OSError, ValueError) as error:
        _say(report, {"failed": str(error)})
        os._exit(1)
    os.close(report)


def _enter(config: dict[str, Any], report: int) -> None:
    if not IS_LINUX:
        return
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever started this is gone: so are we
    if config["wall"] != "namespaces":
        system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)
        system.prctl(system.PR_SET_DUMPABLE, 0)
        return
    namespaces.enter(config["user"])
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)  # again: the kernel forgets it when a process becomes another user
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
    """Processes that the kernel counts with the program's. In a user namespace it counts those inside only, since Linux 5.14."""
    if config["user"] is not None and os.geteuid() == 0:
        return 0  # the program gets a user number of its own
    keepers = 2
    if IS_LINUX and config["wall"] != "rlimits" and _kernel() >= (5, 14):
        return keepers
    return keepers + confine.processes_of(os.geteuid())


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)


def _confine_program(config: dict[str, Any], others: int) -> None:
    if IS_LINUX:  # a signal to the process group reaches those outside of the process namespace too
        os.setsid()
    is_root = os.geteuid() == 0
    user = config["user"] if is_root else None
    if user is not None and config["wall"] == "namespaces":
        user = namespaces.USER_INSIDE
    confine.give_up_rights(user, has_capabilities=is_root or config["wall"] == "namespaces")
    confine.set_limits(config["limits"], others)
    if IS_LINUX:
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.refuse()


def _keep(program: int, report: int, config: dict[str, Any]) -> NoReturn:
    for descriptor in (0, 1, 2):  # the program's to close
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break
    code = os.waitstatus_to_exitcode(status)
    if config["wall"] in ("own user", "rlimits"):
        end_descendants(os.getpid())
    _say(report, {"exit": code, "cpu_s": round(usage.ru_utime + usage.ru_stime, 3), "peak_kb": usage.ru_maxrss})
    if not IS_LINUX:  # no way to find what the program left, but for those that stayed in its group, with this process
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _say(report: int, message: dict[str, Any]) -> None:
    try:
        os.write(report, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:  # nobody listens any more: the run was given up
        os._exit(1)
