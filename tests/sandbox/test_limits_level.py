"""What a program reaches of the host at the level `limits`, on Linux: no socket by its name; and nobody's process or file where Landlock is there."""

import json
import os
import subprocess

import ordinary
import pytest

from posttrain.sandbox.isolation import IS_LINUX

pytestmark = [
    pytest.mark.skipif(not IS_LINUX, reason="other systems confine less (docs/sandbox.md)"),
    pytest.mark.skipif(ordinary.interpreter() is None, reason="an ordinary user has no Python here"),
]

REACH = """
import json, os, signal, socket, sys, tempfile
from posttrain.sandbox import Isolation, Sandbox
from posttrain.sandbox.inside import landlock, system
from posttrain.sandbox.levels import failure_of
from posttrain.sandbox.isolation import BACKENDS
backend = BACKENDS[sys.argv[1]]
why = backend.missing() or failure_of(backend)
if why:
    print(json.dumps(why))
    sys.exit()
sandbox = Sandbox("process")
sandbox.isolation = Isolation(backend)
folder = tempfile.mkdtemp()
os.chmod(folder, 0o777)
abstract, by_path = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
abstract.bind("\\0" + folder)
by_path.bind(folder + "/datagrams")
os.chmod(folder + "/datagrams", 0o666)
signals = []
signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
program = sys.argv[2].replace("{folder}", folder).replace("{pid}", str(os.getpid()))
outcome = sandbox.run(program, "4")
reached = {}
for name, each in (("abstract", abstract), ("by_path", by_path)):
    each.setblocking(False)
    try:
        reached[name] = bool(each.recv(10))
    except BlockingIOError:
        reached[name] = False
reached |= {"signals": bool(signals), "files": os.path.exists(folder + "/written"), "environment": b"SECRET" in outcome.stdout}
reached["landlock"] = system.libc.syscall(landlock.CREATE_RULESET, None, 0, landlock.VERSION)
print(json.dumps([reached, outcome.stdout.decode()]))
"""
PROGRAM = """
import os, socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC):
    for name in ("\\0{folder}", "{folder}/datagrams"):
        try: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b"x", name)
        except OSError: pass
try: os.kill({pid}, 10)
except OSError: pass
for path in ("{folder}/written", "/dev/shm/posttrain-written"):
    try: open(path, "w").write("x")
    except OSError: pass
try: print(open("/proc/{pid}/environ").read())
except OSError: pass
open("own", "w").write("x"); os.mkdir("d"); os.rename("own", "d/own"); os.truncate("d/own", 0); os.remove("d/own"); os.rmdir("d")
open("/dev/null", "w").write("x")
a, b = socket.socketpair()
a.send(b"y")
pid = os.fork()
if pid == 0: os.pause() if hasattr(os, "pause") else __import__("time").sleep(60)
os.kill(pid, 9)
print("still works", b.recv(1) == b"y", os.waitpid(pid, 0)[1], open("/dev/stdin").read())
"""


@pytest.mark.parametrize("backend", ["own user", "rlimits"])
def test_what_a_program_reaches_and_what_still_works(backend):
    if backend == "own user":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        environment = {"PYTHONPATH": ordinary.SOURCE, "PYTHONDONTWRITEBYTECODE": "1", "SECRET": "x"}
        command = [ordinary.interpreter(), "-c", REACH, backend, PROGRAM]
        said = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    else:
        said = json.loads(ordinary.run_as_ordinary_user("import os\nos.environ['SECRET'] = 'x'\n" + REACH, backend, PROGRAM))
    if isinstance(said, str):
        pytest.skip(said)
    reached, output = said
    assert output.splitlines()[-1] == "still works True 9 4"
    version = reached.pop("landlock")
    if version < 6:
        reached.pop("signals")
    if version < 1:
        reached.pop("files")
        reached.pop("environment")
    assert not any(reached.values()), reached


def test_a_flood_of_directories_holds_no_verdict_up_and_is_removed():
    script = """
import json, os, shutil, tempfile, time, threading
from posttrain.sandbox import InputOutput, Isolation, Job, Limits, Sandbox
from posttrain.sandbox.isolation import BACKENDS
from posttrain.sandbox.levels import failure_of
if os.geteuid() == 0 or failure_of(BACKENDS["rlimits"]):
    print(json.dumps(None))
    raise SystemExit
tempfile.tempdir = tempfile.mkdtemp()
sandbox = Sandbox("process")
sandbox.isolation = Isolation(BACKENDS["rlimits"])
program = "import os\\nfor _ in range(50): os.mkdir('d'); os.chdir('d')"
remove = shutil.rmtree
shutil.rmtree = lambda *args, **settings: time.sleep(2) or remove(*args, **settings)  # a slow disk
verdict = sandbox.judge(Job(program, [InputOutput("", "1")], limits=Limits(wall_s=2, cpu_s=1)))
for thread in threading.enumerate():
    if "remover" in thread.name: thread.join()
print(json.dumps([verdict.passed, verdict.error, verdict.seconds, os.listdir(tempfile.tempdir)]))
os.rmdir(tempfile.tempdir)
"""
    said = json.loads(ordinary.run_as_ordinary_user(script))
    if said is None:
        pytest.skip("no such isolation here")
    passed, error, seconds, left = said
    assert (passed, error, left) == (False, None, [])
    assert seconds < 2, "it waited for the disk"
