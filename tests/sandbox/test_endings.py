"""Programs end with the process that started them, however that ends; and pipes end with programs, whoever holds them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ordinary
import pytest

from posttrain.sandbox import Call, InputOutput, Job, Limits, Sandbox, strongest
from posttrain.sandbox.inside.tree import descendants
from posttrain.sandbox.isolation import IS_LINUX, Level
from posttrain.sandbox.pipes import EndSignal, Feeder, Pipe

NEEDS_LINUX = pytest.mark.skipif(not IS_LINUX, reason="looks into /proc")
NEEDS_NAMESPACES = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")

# A program that a signal of the kernel's does not reach: a daemon which has forgotten that it wants to know of its parent's death, and spins.
STAYS = """
import ctypes, os, signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(1, 0)
    if os.fork() == 0:
        while True: pass
    time.sleep(10**6)
ctypes.CDLL(None).prctl(1, 0)
print("up", flush=True)
time.sleep(10**6)
"""
PARENT = """
import os, sys, time
from posttrain.sandbox import Limits, Sandbox
from posttrain.sandbox.levels import Isolation, failure_of
from posttrain.sandbox.isolation import BACKENDS
backend = BACKENDS[sys.argv[1]]
why = backend.missing() or failure_of(backend)
if why:
    print(why, flush=True)
    sys.exit()
sandbox = Sandbox("process")
sandbox.isolation = Isolation(backend)
with sandbox.start({"do": "script", "program": sys.argv[2]}, Limits(wall_s=100, cpu_s=100)) as process:
    process.line()
    sibling = os.fork()  # holds all that its parent held, as a forked data loader does
    if sibling == 0:
        time.sleep(100)
    print("up", sibling, flush=True)
    time.sleep(100)
"""


@NEEDS_LINUX
@pytest.mark.parametrize("backend", ["namespaces", "bubblewrap", "own user", "rlimits"])
def test_nothing_is_left_of_a_program_when_the_training_is_killed(backend):
    if backend == "own user":  # only root starts programs as other users
        if os.geteuid() != 0 or ordinary.interpreter() is None:
            pytest.skip("needs root, and a Python that others may read")
        environment = {"PYTHONPATH": ordinary.SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
        parent = subprocess.Popen([ordinary.interpreter(), "-c", PARENT, backend, STAYS], stdout=subprocess.PIPE, text=True, env=environment)
    elif ordinary.interpreter() is None:
        pytest.skip("an ordinary user has no Python here")
    else:
        parent = ordinary.start_as_ordinary_user(PARENT, backend, STAYS)
    with parent:
        said = parent.stdout.readline().split()
        if said[:1] != ["up"]:
            pytest.skip(" ".join(said) or parent.stderr.read())
        sibling = int(said[1])
        started = [pid for pid in descendants(parent.pid) if pid != sibling]
        assert len(started) >= 4, "the fork server, the supervisor, the program and its children"
        parent.kill()
        try:
            assert not left_of(started, patience_s=10)
        finally:
            os.kill(sibling, signal.SIGKILL)


@NEEDS_LINUX
def test_nothing_is_left_at_the_weakest_level_but_what_a_program_hides():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "process", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE, text=True)
    with parent:
        sibling = int(parent.stdout.readline().split()[1])
        started = [pid for pid in descendants(parent.pid) if pid != sibling]
        assert started
        parent.kill()
        try:
            assert not left_of(started, patience_s=10)
        finally:
            os.kill(sibling, signal.SIGKILL)


@NEEDS_LINUX
def test_a_command_that_judges_elsewhere_ends_when_nobody_reads_its_verdicts():
    job = Job("import time\ntime.sleep(100)", [InputOutput("", "")], limits=Limits(wall_s=100))
    command = [sys.executable, "-m", "posttrain.sandbox", "process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as there:
        there.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        there.stdin.flush()
        until = time.monotonic() + 20
        while len(descendants(there.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        started = [there.pid, *descendants(there.pid)]
        there.stdout.close()
        assert not left_of(started, patience_s=10)


# What runs beyond the start of a program, told that it is on another system, where the kernel does not say that a parent has ended.
ELSEWHERE = """
import posttrain.sandbox.spawn as spawn, posttrain.sandbox.isolation as isolation
boot = "import sys; sys.platform = 'darwin'; " + isolation.BOOT
spawn.PYTHON = ("-S", "-s", "-X", "utf8", "-c", boot)
isolation.IS_LINUX = False
"""


@NEEDS_LINUX
@pytest.mark.parametrize("backend", ["rlimits", "process"])
def test_a_program_ends_with_its_parent_also_where_the_kernel_does_not_say_so(backend):
    if ordinary.interpreter() is None:
        pytest.skip("an ordinary user has no Python here")
    with ordinary.start_as_ordinary_user(ELSEWHERE + PARENT, backend, "print(1, flush=True)\nwhile True: pass") as parent:
        said = parent.stdout.readline().split()
        assert said[:1] == ["up"], (said, parent.stderr.read() if not said else "")
        sibling = int(said[1])
        started = [pid for pid in descendants(parent.pid) if pid != sibling]
        assert len(started) == (2 if backend == "rlimits" else 1), "the supervisor and the program, without a fork server"
        parent.kill()
        try:
            assert not left_of(started, patience_s=10)
        finally:
            os.kill(sibling, signal.SIGKILL)


def left_of(pids, patience_s):
    until = time.monotonic() + patience_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


HOLDERS = {
    "sockets_in_a_cycle": "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 0, 1, 2])",
    "sockets_in_a_chain": "import socket\nfor _ in range(10):\n    a, b = socket.socketpair(); c, d = socket.socketpair()\n"
    "    socket.send_fds(a, [b'x'], [c.fileno(), d.fileno(), 0, 1, 2]); socket.send_fds(c, [b'x'], [a.fileno(), b.fileno(), 0, 1, 2])",
    "a_daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)",
}


@NEEDS_NAMESPACES
@pytest.mark.parametrize("name", HOLDERS)
def test_whoever_holds_its_pipes_keeps_nobody_waiting(name):
    """Fed with more than a pipe holds, so that the writer waits too."""
    sandbox, limits = Sandbox(), Limits(wall_s=1, cpu_s=1)
    tests = ([Call("square", [4], 16)], [InputOutput("7\n" * 200_000, "49\n")])
    for _ in range(3):
        for test in tests:
            verdict = sandbox.judge(Job(HOLDERS[name] + "\ndef square(n): return -1", test, limits=limits))
            assert verdict.error is None
            assert not verdict.passed
            assert verdict.seconds < 2


@NEEDS_NAMESPACES
def test_no_thread_waits_for_a_pipe_that_is_held():
    before = threading.active_count()
    Sandbox().run(HOLDERS["sockets_in_a_cycle"], "7\n" * 200_000)
    until = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.02)
    assert threading.active_count() <= before


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows cannot be asked")
def test_a_pipe_that_is_held_is_read_to_what_lies_in_it():
    reader, writer = os.pipe()
    end, changed = EndSignal(), threading.Condition()
    os.write(writer, b"x" * 60_000)
    pipe = Pipe(reader, 10**6, changed, end)
    end.give()
    pipe.join(5)
    assert (len(pipe.content), pipe.is_done, pipe.was_open) == (60_000, True, True)
    os.close(writer)


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows cannot be asked")
def test_a_writer_stops_at_the_programs_end():
    reader, writer = os.pipe()
    end = EndSignal()
    feeder = Feeder(writer, end)
    feeder.put(b"x" * 10**6)
    feeder.join(0.2)
    assert feeder.is_alive()
    end.give()
    feeder.join(5)
    assert not feeder.is_alive()
    os.close(reader)


ASYNCIO = """
import asyncio, socket
async def answer(n):
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    _, other = await asyncio.open_connection(sock=theirs)
    other.write(b"x" * 500_000 + str(n * n).encode() + b"\\n")
    line = await reader.readline() if False else (await reader.readuntil(b"\\n"))[500_000:]
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, int, line)
def square(n): return asyncio.run(answer(n))
"""


@NEEDS_NAMESPACES
def test_an_honest_program_may_use_sockets_in_pairs_and_threads():
    program = ASYNCIO.replace("sock=ours)", "sock=ours, limit=2**20)")
    assert Sandbox().judge(Job(program, [Call("square", [4], 16)])).passed
