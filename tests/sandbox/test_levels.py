"""What isolation is found, and what is refused. On systems that forbid namespaces: made here by forbidding them in one."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest

from posttrain.errors import UserError
from posttrain.sandbox import Sandbox, require, strongest
from posttrain.sandbox.isolation import BACKENDS, Level
from posttrain.sandbox.levels import failure_of

NEEDS_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("unshare") is None, reason="needs Linux and unshare")


def forbidden(*arguments, stdin=""):
    """`python -m posttrain.sandbox ...` where the kernel forbids further user namespaces."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", sys.executable, "-m", "posttrain.sandbox", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_the_isolation_says_its_level_and_why_not_more():
    here = strongest()
    assert here.level.name.lower() in str(here)
    stronger = [backend.name for backend in BACKENDS.values()][: list(BACKENDS).index(here.backend.name)]
    assert list(here.refused) == stronger
    assert all(here.refused.values())


def test_an_unknown_level_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'namespaces'"):
        require("namespace")


@NEEDS_LINUX
def test_without_namespaces_the_level_is_stated():
    done = forbidden("--level")
    if "Operation not permitted" in done.stderr:
        pytest.skip("no user namespace can be made here at all")
    said = json.loads(done.stdout)
    assert said["level"] in ("limits", "process")
    assert "unshare" in said["refused"]["namespaces"]


@NEEDS_LINUX
def test_without_namespaces_nothing_is_run_and_the_sentence_says_what_to_install():
    done = forbidden("namespaces", stdin="{}\n")
    if "Operation not permitted" in done.stderr and not done.stderr.startswith("programs"):
        pytest.skip("no user namespace can be made here at all")
    assert done.returncode == 2
    assert "apt install bubblewrap" in done.stderr
    assert "set level:" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_every_backend_that_works_runs_a_program(backend):
    why = backend.missing() or failure_of(backend)
    if why:
        pytest.skip(why)
    sandbox = Sandbox("process")
    sandbox.isolation = type(sandbox.isolation)(backend)
    outcome = sandbox.run("import sys\nprint(sys.stdin.read()[::-1])\nsys.exit(7)", "abc")
    assert (outcome.ended, outcome.code, outcome.stdout.strip()) == ("exit", 7, b"cba")


@pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason="the filter is tested in namespaces")
def test_refused_system_calls_are_refused():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {numbers}
refused = []
for name, number in numbers.items():
    if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) < 0 and ctypes.get_errno() == 1:
        refused.append(name)
print(sorted(set(numbers) - set(refused)))
"""
    from posttrain.sandbox.inside.syscalls import ARCHITECTURES, REFUSED

    column = ARCHITECTURES[os.uname().machine][0]
    numbers = {name: pair[column] for name, pair in REFUSED.items() if pair[column] is not None}
    assert Sandbox("namespaces").run(program.replace("{numbers}", repr(numbers))).stdout == b"[]\n"


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="compares with x86-64's numbers")
def test_the_filter_names_the_calls_it_means():
    """getpid (39) and socket (41) by their numbers: the table's first column is this machine's."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(39) == os.getpid()
    descriptor = libc.syscall(41, 1, 1, 0)
    assert descriptor >= 0
    os.close(descriptor)
