"""Hostile programs: none harms this process or this machine, none is judged right, each is over within its limit and a second."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import hostile
import pytest

from posttrain.sandbox import Asserts, Call, InputOutput, Job, Limits, Pool, Sandbox, strongest
from posttrain.sandbox.inside.tree import descendants
from posttrain.sandbox.isolation import Level
from posttrain.sandbox.spawn import FORK_SERVER

LIMITS = Limits(wall_s=3.0, cpu_s=1.0, memory_mb=128, processes=6, files_mb=1, output_kb=64)
TESTS = {
    "asserts": [Asserts("assert square(3) == 9"), Asserts("def check(f):\n    assert abs(f(4) - 16) < 1e-6\n    assert f(7) == 49\ncheck(square)")],
    "calls": [Call("square", [4], 16), Call("square", [7], 49)],
    "input_output": [InputOutput("7\n", "49\n"), InputOutput("3\n", "9\n")],
}
HONEST = "def square(n): return n * n\nif __name__ == '__main__': print(square(int(input())))"

pytestmark = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")


class Field:
    """What a program might reach: a secret, a place to write, listeners, this process's signal handler."""

    def __init__(self, folder):
        self.marker, self.secret = folder / "marker", folder / "secret"
        self.secret.write_text("secret")
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "unix"))
        self.abstract.bind(f"\0posttrain-{os.getpid()}")
        self.datagrams, self.datagram_path = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        self.datagrams.bind(f"\0posttrain-datagrams-{os.getpid()}")
        self.datagram_path.bind(str(folder / "datagrams"))
        os.chmod(folder / "datagrams", 0o666)
        self.sockets = [self.tcp, self.udp, self.unix, self.abstract, self.datagrams, self.datagram_path]
        for each in self.sockets:
            each.setblocking(False)
        for each in (self.unix, self.abstract):
            each.listen()
        self.signals = []
        signal.signal(signal.SIGUSR1, lambda number, frame: self.signals.append(number))
        self.words = {
            "{marker}": str(self.marker),
            "{secret}": str(self.secret),
            "{port}": str(self.tcp.getsockname()[1]),
            "{udp}": str(self.udp.getsockname()[1]),
            "{unix}": str(folder / "unix"),
            "{abstract}": f"posttrain-{os.getpid()}",
            "{datagrams}": f"posttrain-datagrams-{os.getpid()}",
            "{datagram_path}": str(folder / "datagrams"),
            "{level}": "namespaces",
            "{pids}": repr([os.getpid(), os.getppid()]),
        }

    def fill_in(self, program):
        for word, value in self.words.items():
            program = program.replace(word, value)
        return program

    def was_reached(self, listener):
        try:
            listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()
        except BlockingIOError:
            return False
        return True


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    before = signal.getsignal(signal.SIGUSR1)
    made = Field(tmp_path_factory.mktemp("field"))
    yield made
    signal.signal(signal.SIGUSR1, before)
    for each in made.sockets:
        each.close()


def verdicts_on(programs, kind, field, limits=LIMITS):
    with Pool(Sandbox("namespaces"), workers=8) as pool:  # many only wait
        jobs = [Job(field.fill_in(program), TESTS[kind], limits=limits) for program in programs.values()]
        return dict(zip(programs, pool.judge_all(jobs), strict=True))


@pytest.fixture(scope="module")
def others():
    """Processes that other tests of this process have left: workers of rewards and their guard."""
    return {*descendants(os.getpid())}


@pytest.fixture(scope="module")
def verdicts(others, field):
    return verdicts_on(hostile.PROGRAMS, "asserts", field)


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_it_is_judged_wrong_and_in_time(verdicts, name):
    verdict = verdicts[name]
    assert verdict.error is None, "a hostile program is wrong, not the sandbox broken"
    assert [result.passed for result in verdict.results] == [False, False]
    assert verdict.seconds < LIMITS.wall_s + 1


@pytest.mark.parametrize("kind", ["calls", "input_output"])
def test_no_forger_is_judged_right_by_other_tests(field, kind):
    verdicts = verdicts_on(hostile.FORGERS, kind, field)
    assert {name: verdict.error for name, verdict in verdicts.items() if verdict.error} == {}
    assert [name for name, verdict in verdicts.items() if any(result.passed for result in verdict.results)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["calls", "input_output"])
def test_no_program_is_judged_right_by_other_tests(field, kind):
    verdicts = verdicts_on(hostile.PROGRAMS, kind, field)
    assert [name for name, verdict in verdicts.items() if verdict.error or any(result.passed for result in verdict.results)] == []


@pytest.mark.parametrize("kind", TESTS)
def test_the_honest_program_is_judged_right(field, kind):
    assert verdicts_on({"honest": HONEST}, kind, field)["honest"].passed


def test_nothing_outside_was_reached(verdicts, field):
    assert not field.marker.exists()
    assert field.secret.read_text() == "secret"
    assert [listener for listener in field.sockets if field.was_reached(listener)] == []
    assert field.signals == []
    assert not os.path.exists("/tmp/posttrain-hostile-shell")
    assert not os.path.exists("/dev/shm/posttrain-hostile")


def test_nobody_is_left_behind_but_the_process_that_starts_them(others, verdicts):
    kept = {FORK_SERVER._process.pid}
    deadline = time.monotonic() + 2
    while {*descendants(os.getpid())} - others - kept and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {*descendants(os.getpid())} - others <= kept


def test_programs_are_started_again_when_that_process_has_ended(field):
    FORK_SERVER._process.kill()
    assert verdicts_on({"honest": HONEST}, "calls", field)["honest"].passed


DAEMONS = ["daemon_by_double_fork", "daemon_that_holds_stdout", "parent_exits_child_stays", "orphans_in_a_chain", "fork_bomb", "stop_supervisor"]


@pytest.mark.parametrize("name", DAEMONS)
def test_its_process_namespace_is_empty_afterwards(name):
    """A daemon may have any parent, but it cannot leave its namespace."""
    limits = dataclasses.replace(LIMITS, wall_s=1.5)
    with Sandbox("namespaces").start({"do": "script", "program": "import time\ntime.sleep(0.5)\n" + hostile.PROGRAMS[name]}, limits) as process:
        while "pid" not in process.report:
            with process.changed:
                process._listen()
            time.sleep(0.01)
        time.sleep(0.2)
        namespace, started = namespace_of(process.report["pid"]), descendants(process.handle.pid)
        assert process.report["pid"] in started
        assert os.geteuid() != 0 or namespace not in (None, namespace_of("self"))
        process.wait()
    everybody = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    if namespace is None:  # only root may ask for the namespace of a process that hides its memory
        assert [pid for pid in started if pid in everybody] == []
    else:
        assert [pid for pid in everybody if namespace_of(pid) == namespace] == []


def namespace_of(pid):
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def test_no_thread_and_no_descriptor_is_left(field):
    """After programs that flood, steal, close and outlive."""
    names = ["endless_output", "stdin_stolen", "close_every_descriptor", "daemon_that_holds_stdout", "sys_exit_0", "huge_program"]
    programs = {name: hostile.PROGRAMS[name] for name in names}
    limits = dataclasses.replace(LIMITS, wall_s=1.0)
    verdicts_on(programs, "asserts", field, limits)  # whatever is made once is made now
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    verdicts_on(programs, "asserts", field, limits)
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_programs_die_with_the_process_that_started_them():
    script = (
        "from posttrain.sandbox import Sandbox\n"
        "import time\nfrom posttrain.sandbox import Limits\n"
        "with Sandbox().start({'do': 'script', 'program': 'while True: pass'}, Limits(wall_s=60, cpu_s=60)) as process:\n"
        "    while 'pid' not in process.report:\n        time.sleep(0.01)\n        process._listen()\n"
        "    print(process.report['pid'], flush=True)\n    process.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        namespace = namespace_of(parent.stdout.readline().strip())
        assert namespace is not None
        parent.kill()
    deadline = time.monotonic() + 2
    while (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and namespace_of(pid) == namespace]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
