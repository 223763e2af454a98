"""Limits that a process puts on itself and cannot lift: setrlimit, no new privileges, no capabilities, another user."""

from __future__ import annotations

import os
import resource
import signal
import sys

IS_LINUX = sys.platform.startswith("linux")
if IS_LINUX:
    from . import system

STACK = 64 * 2**20  # many programs recurse deeply; the memory limit holds as well

NOT_TO_CATCH = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}


def ignore_signals() -> None:
    """For supervisors, which a program of the same user may signal. SIGCHLD keeps its default, which waiting needs."""
    for number in signal.valid_signals() - NOT_TO_CATCH:
        signal.signal(number, signal.SIG_IGN)


def default_signals() -> None:
    """Those of a new interpreter."""
    for number in signal.valid_signals() - NOT_TO_CATCH - {signal.SIGPIPE, signal.SIGXFSZ}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def be_killed_first() -> None:
    """When memory runs out, the kernel kills programs before the training. Inherited by children; any user may raise a
    score."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # no /proc, or a system without this file
        pass


def give_up_rights(user: int | None, *, has_capabilities: bool) -> None:
    """Becomes `user` (None: keeps its user), without capabilities or groups, and cannot gain any by executing a
    program."""
    if IS_LINUX and has_capabilities:
        system.drop_bounding_set()
        system.prctl(system.PR_CAP_AMBIENT, system.PR_CAP_AMBIENT_CLEAR_ALL)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if IS_LINUX:
        system.drop_capabilities()
        system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)


def set_limits(limits: dict[str, int], others: int) -> None:
    """others: further processes of the same user, which the system counts towards the limit."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["files"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"] + others,
        resource.RLIMIT_STACK: min(STACK, limits["memory"] // 4),
        resource.RLIMIT_AS: limits["memory"],
    }
    if IS_LINUX:
        wanted |= {resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_SIGPENDING: 64}
    for name, value in wanted.items():
        _, hard = resource.getrlimit(name)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(name, (most, most))
        except (ValueError, OSError):
            if IS_LINUX:  # macOS refuses RLIMIT_AS; docs/sandbox.md says so
                raise


def processes_of(user: int) -> int:
    """Threads of all processes of a user, which RLIMIT_NPROC counts. 0 without /proc."""
    if not os.path.isdir("/proc/self/task"):
        return 0
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it ended meanwhile
            continue
    return count
