"""A program cannot turn its own verdict from wrong into an error, by nothing that it does to the process that supervises it."""

import json

import hostile
import ordinary
import pytest

from posttrain.sandbox.isolation import IS_LINUX

pytestmark = [
    pytest.mark.skipif(not IS_LINUX, reason="supervised so on Linux only"),
    pytest.mark.skipif(ordinary.interpreter() is None, reason="an ordinary user has no Python here"),
]

JUDGE = """
import json, sys
from posttrain.sandbox import *
from posttrain.sandbox.levels import failure_of
from posttrain.sandbox.isolation import BACKENDS
backend, programs = BACKENDS[sys.argv[1]], json.loads(sys.argv[2])
why = backend.missing() or failure_of(backend)
if why:
    print(json.dumps(why))
    sys.exit()
sandbox = Sandbox("process")
sandbox.isolation = Isolation(backend)
limits = Limits(wall_s=2.5, cpu_s=1)
tests = {"calls": Call("square", [4], 16), "input_output": InputOutput("4", "16"), "asserts": Asserts("assert square(4) == 16")}
with Pool(sandbox, workers=4) as pool:
    judged = {
        (attack, kind): pool.submit(Job(program, [test], limits=limits)) for attack, program in programs.items() for kind, test in tests.items()
    }
    verdicts = [(attack, kind, future.result()) for (attack, kind), future in judged.items()]
print(json.dumps([[attack, kind, verdict.passed, verdict.error, verdict.seconds] for attack, kind, verdict in verdicts]))
"""
# In namespaces the supervisor is process 1; elsewhere it is the program's parent.
SUPERVISOR = "import os, time\npid = 1 if os.getpid() < 10 else os.getppid()\n"
WRONG = "\ntime.sleep(0.1)\ndef square(n): return -1\n"
ATTACKS = {
    "every_signal": "for number in [*range(1, 9), *range(10, 19), *range(20, 65)]:\n    try: os.kill(pid, number)\n    except OSError: pass",
    "interrupt_in_the_call": "def square(n):\n    os.kill(pid, 2)\n    time.sleep(0.2)\n    return -1\nif __name__ == '__main__': square(1)\n_ = '''",
    "kill": "os.kill(pid, 9)",
    "stop": "os.kill(pid, 19)",
    "real_time_signals_in_number": "for _ in range(2000):\n    try: os.kill(pid, 40)\n    except OSError: break",
    "no_memory": "import resource\nfor name in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):\n"
    "    try: resource.prlimit(pid, name, (0, 0))\n    except OSError: pass",
    "no_processor": "import resource\ntry: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))\nexcept OSError: pass",
    "no_files": "import resource\nfor name in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):\n"
    "    try: resource.prlimit(pid, name, (0, 0))\n    except OSError: pass",
    "signal_by_a_descriptor": "import fcntl\nr, w = os.pipe()\ntry:\n    fcntl.fcntl(r, fcntl.F_SETOWN, pid); fcntl.fcntl(r, 10, 9)\n"
    "    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')\nexcept OSError: pass",
    "endless_children": "for _ in range(500):\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: break",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["namespaces", "bubblewrap", "rlimits"])
def test_an_ordinary_users_program_stays_wrong(backend):
    programs = {name: SUPERVISOR + attack + WRONG + ("'''" if attack.endswith("'''") else "") for name, attack in ATTACKS.items()}
    said = json.loads(ordinary.run_as_ordinary_user(JUDGE, backend, json.dumps(programs)))
    if isinstance(said, str):
        pytest.skip(said)
    assert len(said) == 3 * len(ATTACKS)
    assert [row for row in said if row[2] or row[3] is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["namespaces", "bubblewrap", "rlimits"])
def test_no_hostile_program_of_an_ordinary_user_is_right_or_an_error_or_late(backend):
    programs = {name: program.replace("{level}", "limits") for name, program in hostile.NEWER.items()}
    said = json.loads(ordinary.run_as_ordinary_user(JUDGE, backend, json.dumps(programs)))
    if isinstance(said, str):
        pytest.skip(said)
    assert len(said) == 3 * len(programs)
    assert [row for row in said if row[2] or row[3] is not None or row[4] > 3.5] == []


def test_a_program_has_the_signal_handlers_of_a_new_interpreter():
    script = """
from posttrain.sandbox import Sandbox
import signal
program = "import signal\\nprint([(s, str(signal.getsignal(s))[:20]) for s in sorted(signal.valid_signals())], sorted(signal.pthread_sigmask(0, [])))"
print(Sandbox("limits").run(program).stdout.decode())
"""
    fresh = (
        "import signal\nprint([(s, str(signal.getsignal(s))[:20]) for s in sorted(signal.valid_signals())], sorted(signal.pthread_sigmask(0, [])))"
    )
    assert ordinary.run_as_ordinary_user(script).strip() == ordinary.run_as_ordinary_user(fresh).strip()
