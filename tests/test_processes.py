"""Guarded processes end with the one that guards them, however it ends; others are left alone."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from posttrain import processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups")

# A guarded process that ignores what it can, with a child in its group.
STUBBORN = "import signal, subprocess, sys, time; signal.signal(15, 1); subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
PARENT = f"""
import os, subprocess, sys, time
from posttrain import processes
made = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
processes.guard(made.pid)
{{more}}
print("ready", flush=True)
time.sleep(60)
"""


def parent_of_guarded(more=""):
    return subprocess.Popen([sys.executable, "-c", PARENT.format(more=more)], stdout=subprocess.PIPE, text=True)


def descendants(parent, expected):
    """Once there are as many."""
    assert parent.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while len(found := psutil.Process(parent.pid).children(recursive=True)) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == expected
    return found


def started(more="", expected=3):
    """(parent, its descendants)"""
    parent = parent_of_guarded(more)
    return parent, descendants(parent, expected)


def test_they_end_however_the_parent_ends():
    parents = {how: parent_of_guarded() for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV)}
    found = {how: descendants(parent, 3) for how, parent in parents.items()}
    for how, parent in parents.items():
        parent.send_signal(how)
        parent.wait()
    assert {how: left for how, each in found.items() if (left := psutil.wait_procs(each, timeout=10)[1])} == {}


def test_a_forked_child_that_holds_the_pipe_open_does_not_keep_them_alive():
    parent, found = started("if os.fork() == 0: time.sleep(60); os._exit(0)", expected=4)
    forked = next(each for each in found if each.cmdline() == psutil.Process(parent.pid).cmdline())
    parent.kill()
    parent.wait()
    left = psutil.wait_procs([each for each in found if each != forked], timeout=10)[1]
    forked.kill()
    assert left == []


def test_a_guard_that_is_killed_is_replaced_by_one_that_knows_all():
    more = "os.killpg(processes._guards[os.getpid()][0].pid, 9); processes._guards[os.getpid()][0].wait(); processes.guard(2**22 + 1)"
    parent, found = started(more)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(found, timeout=10)[1] == []


def test_what_was_released_goes_on_and_a_parent_that_ends_by_itself_leaves_no_guard():
    code = PARENT.format(more="processes.release(made.pid); print(made.pid, flush=True)").replace("time.sleep(60)\n", "")
    begun = time.monotonic()
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[0])
    assert time.monotonic() - begun < 30
    assert psutil.Process(pid).is_running()
    os.killpg(pid, signal.SIGKILL)


def test_releasing_what_was_never_guarded_starts_no_guard():
    before = dict(processes._guards)
    if not before:
        processes.release(1)
        assert processes._guards == {}
