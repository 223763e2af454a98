"""What a program sees of the host's files: what it needs, wherever that lies, and nothing that could be executed."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ordinary
import pytest

from posttrain.errors import UserError
from posttrain.sandbox import Sandbox, strongest
from posttrain.sandbox.isolation import Level
from posttrain.sandbox.view import checked, resolve, view

pytestmark = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")

JUDGE = """
import sys
from posttrain.sandbox import Call, Job, Limits, Sandbox, strongest
assert sys.prefix != sys.base_prefix
job = Job("import planted\\ndef square(n): return n * n + planted.zero", [Call("square", [3], 9)])
print(Sandbox("namespaces", packages=True).judge(job).error, Sandbox("namespaces", packages=True).judge(job).passed)
"""
EXECUTABLES = """
import os
found = []
for root, _, names in os.walk("/"):
    for name in names:
        path = os.path.join(root, name)
        if root.startswith(("/dev", "{standard}")) or ".so" in name or not os.access(path, os.X_OK):
            continue
        if open(path, "rb").read(2) in (b"\\x7fE", b"#!"): found.append(path)
print(found)
"""


@pytest.fixture
def below(request):
    """A new directory below one of the system's."""
    try:
        path = Path(tempfile.mkdtemp(dir=request.param, prefix="posttrain-view-"))
    except OSError:
        pytest.skip(f"{request.param} cannot be written here")
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("below", "kind"),
    [
        ("/tmp", "plain"),
        ("/tmp", "behind_a_link"),
        ("/tmp", "behind_a_relative_link"),
        ("/tmp", "private"),
        ("/home", "private"),
        ("/var/tmp", "plain"),
    ],
    indirect=["below"],
)
def test_packages_are_imported_from_an_environment_anywhere(below, kind):
    place = below / "real"
    place.mkdir()
    path = place / "env"
    if kind == "behind_a_link":
        (below / "link").symlink_to(place)
        path = below / "link/env"
    if kind == "behind_a_relative_link":
        (below / "link").symlink_to("real")
        path = below / "link/env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    (next(path.glob("lib/python*/site-packages")) / "planted.py").write_text("zero = 0")
    if kind == "private":
        place.chmod(0o700)
        if os.geteuid() == 0:  # another user's, which root in a namespace of its own may not enter just so
            os.chown(place, 12345, 12345)
    command = [path / "bin/python", "-c", JUDGE]
    done = subprocess.run(command, env={"PYTHONPATH": ordinary.SOURCE}, capture_output=True, text=True, check=False)
    assert done.stdout == "None True\n", done.stderr


def test_a_directory_under_tmp_is_shown_beside_the_programs_own_files(tmp_path):
    (tmp_path / "given.txt").write_text("given")
    (tmp_path / "link").symlink_to(tmp_path)
    tmp_path.chmod(0o755)  # a program of root's is another user
    said = Sandbox("namespaces", visible=(str(tmp_path / "link"),)).run(
        f"print(open({str(tmp_path / 'link/given.txt')!r}).read())\nopen('/tmp/own', 'w').write('x')\nprint(open('/tmp/own').read())\n"
        f"open({str(tmp_path / 'given.txt')!r}, 'w')"
    )
    assert said.stdout == b"given\nx\n"
    assert "Read-only file system" in said.stderr or "Permission denied" in said.stderr


@pytest.mark.parametrize("path", ["/no/such/directory", "/", "/tmp", "/dev", "/proc/self"])
def test_what_cannot_be_shown_is_refused(path):
    with pytest.raises(UserError, match="programs"):
        Sandbox("namespaces", visible=(path,))


def test_a_relative_directory_is_one_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert checked(["here"]) == (str(tmp_path / "here"),)


def test_links_on_the_way_are_found(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "one").symlink_to("a")
    (tmp_path / "a/two").symlink_to(tmp_path / "one/b")
    (tmp_path / "loop").symlink_to("loop")
    links: dict[str, str] = {}
    root = os.path.realpath(tmp_path)
    assert resolve(f"{root}/one/two/../b", links) == f"{root}/a/b"
    assert links == {f"{root}/one": "a", f"{root}/a/two": f"{tmp_path}/one/b"}
    assert resolve(f"{root}/loop", {}) is None
    assert resolve(f"{root}/missing", {}) is None


def test_no_executable_of_the_host_is_seen():
    (standard,) = {os.path.realpath(path) for path in view(False, ()).shown if path.endswith(f"python3.{sys.version_info.minor}")}
    assert Sandbox("namespaces").run(EXECUTABLES.replace("{standard}", standard)).stdout == b"[]\n"


@pytest.mark.parametrize("packages", [False, True])
def test_nothing_can_be_executed(packages):
    """Also what is seen with the packages' libraries, and the loader of programs itself."""
    program = """
import glob, os, subprocess
for path in (glob.glob("/lib*/ld-*") + glob.glob("/usr/lib/*/ld-*") + ["/bin/sh", os.__file__])[:20]:
    try: subprocess.run([path]); print("ran", path)
    except PermissionError: pass
print("done")
"""
    assert Sandbox("namespaces", packages=packages).run(program).stdout == b"done\n"


def test_packages_are_out_of_sight_unless_asked_for():
    program = "import sys, os\nprint([p for p in sys.path if os.path.isdir(p + '/site-packages') and os.listdir(p + '/site-packages')])"
    assert Sandbox("namespaces").run(program).stdout == b"[]\n"


def test_the_standard_library_is_whole():
    """Every extension module finds its libraries, and the time zones are there."""
    program = """
import glob, importlib, os, sys, zoneinfo, datetime
for folder in sys.path:
    for path in glob.glob(folder + "/*.so"):
        name = os.path.basename(path).partition(".")[0]
        if "tkinter" in name or "test" in name or "xx" in name: continue
        importlib.import_module(name)
print(datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")).utcoffset())
"""
    outcome = Sandbox("namespaces").run(program)
    assert outcome.stdout == b"2:00:00\n", outcome
