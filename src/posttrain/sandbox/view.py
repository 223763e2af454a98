"""The host's files that a program in namespaces sees: the standard library, the libraries that it needs, the time
zones. None can be executed.

Each is shown under its real path, and the symbolic links that lead there are made again. So the interpreter, a virtual
environment and the packages may be anywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import stat
import subprocess
import sys
import sysconfig
import zoneinfo
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from posttrain.errors import UserError

LOADED_FROM = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32")  # where the system's loader looks by default
OWN = ("/", "/tmp", "/dev", "/proc", "/posttrain")  # what the program has of its own
MOST_LINKS = 40  # on the way to one file: the kernel's limit
HELPER_S = 60.0
# Loads the extension modules of the standard library (but not Tk, which needs a display) without running them, and what
# the C library loads on demand; prints the files that were mapped.
LOADER = """
import ctypes, glob, json, sys
names = [name for folder in sys.path for name in glob.glob(glob.escape(folder) + "/*.so") if "_tkinter" not in name]
names += ["libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "libgcc_s.so.1"]
for name in names:
    try:
        ctypes.CDLL(name)
    except OSError:
        pass
with open("/proc/self/maps") as maps:
    print(json.dumps(sorted({line.split(None, 5)[5].strip() for line in maps if ".so" in line})))
"""


@dataclass
class View:
    """Paths without symbolic links in them, outer ones first."""

    shown: list[str] = field(default_factory=list)  # directories and files
    links: dict[str, str] = field(default_factory=dict)  # path of a link -> its target
    empty: list[str] = field(default_factory=list)  # directories inside those shown that appear empty
    owners: list[int] = field(default_factory=list)  # users who own a directory on the way that only they may enter
    groups: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def view(packages: bool, more: tuple[str, ...]) -> View:
    """packages: with the packages installed here, and all libraries of the system that they may need. Raises
    OSError."""
    made = View()
    libraries = _needed_libraries()
    wanted = [*_standard_library(), *time_zones(), *(package_paths() if packages else ()), *more]
    wanted += sorted({os.path.dirname(path) for path in libraries}) if packages else libraries
    paths = {real for path in wanted if (real := resolve(path, made.links)) is not None}
    for folder in LOADED_FROM:
        resolve(folder, made.links)
    made.links |= _links_to(set(libraries), {os.path.dirname(path) for path in libraries} | {os.path.realpath(path) for path in LOADED_FROM})
    for path in sorted(paths, key=lambda path: path.count("/")):
        if not _is_below(path, made.shown):
            made.shown.append(path)
    made.links = {path: target for path, target in made.links.items() if not _is_below(path, made.shown)}
    shown_packages = {os.path.realpath(path) for path in package_paths()} if packages else set()
    own = {os.path.realpath(os.path.join(path, name)) for path in _standard_library() for name in ("site-packages", "dist-packages")}
    made.empty = sorted(path for path in own - shown_packages if os.path.isdir(path) and not any(_is_below(each, [path]) for each in shown_packages))
    made.owners, made.groups = _owners(made.shown)
    return made


def checked(more: Iterable[str]) -> tuple[str, ...]:
    """Directories to show, as absolute paths. Raises UserError for those that cannot be shown."""
    paths = tuple(os.path.abspath(path) for path in more)
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"programs are to see {path}, and there is no such directory")
        if os.path.realpath(path) in OWN or _is_below(os.path.realpath(path), ["/dev", "/proc"]):
            raise UserError(
                f"programs cannot be shown {path}: they have one of their own; name a directory inside it, or copy what they need elsewhere"
            )
    return paths


def package_paths() -> list[str]:
    """Directories of this interpreter's installed packages."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def time_zones() -> list[str]:
    """Directories of zone data: the system's, or that of the package tzdata."""
    found = [path for path in zoneinfo.TZPATH if os.path.isdir(path)]
    if not found and (package := importlib.util.find_spec("tzdata")) is not None:
        found = [os.path.join(path, "zoneinfo") for path in package.submodule_search_locations or ()]
    return found


def interpreter() -> str:
    """The Python that a program runs in: this one, without its virtual environment."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # CPython's own name for what a virtual environment was made from


def resolve(path: str, links: dict[str, str]) -> str | None:
    """The path without symbolic links; those on the way are added to `links`. None if there is no such file."""
    left = [name for name in path.split("/") if name]
    real, followed = "", 0
    while left:
        name = left.pop(0)
        if name == "..":
            real = os.path.dirname(real)
        elif name != ".":
            here = f"{real}/{name}"
            if not os.path.lexists(here):
                return None
            if not os.path.islink(here):
                real = here
                continue
            followed += 1
            if followed > MOST_LINKS:
                return None
            target = links[here] = os.readlink(here)
            left = [part for part in target.split("/") if part] + left
            real = "" if target.startswith("/") else real
    return real or "/"


def _standard_library() -> list[str]:
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_platbase": sys.base_exec_prefix}
    return list(dict.fromkeys(sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")))


@functools.cache
def _needed_libraries() -> list[str]:
    """Files, as the kernel names them: without symbolic links."""
    command = [interpreter(), "-I", "-S", "-c", LOADER]
    try:
        done = subprocess.run(command, capture_output=True, timeout=HELPER_S, check=False, cwd="/", env={"LC_ALL": "C.UTF-8"})
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the libraries that Python needs were not found within {HELPER_S:g} s") from error
    if done.returncode != 0:
        raise OSError(f"the libraries that Python needs were not found: {done.stderr.decode('utf-8', 'replace').strip()[-300:]}")
    return [path for path in json.loads(done.stdout) if os.path.isfile(path)]


def _links_to(files: set[str], folders: set[str]) -> dict[str, str]:
    """The links to these files, such as libz.so.1 to libz.so.1.2.13."""
    found: dict[str, str] = {}
    for folder in folders:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                found |= {entry.path: os.readlink(entry.path) for entry in entries if entry.is_symlink() and os.path.realpath(entry.path) in files}
    return found


def _owners(paths: list[str]) -> tuple[list[int], list[int]]:
    """Root in a user namespace may enter only directories of users that are mapped there."""
    users, groups = set(), set()
    for folder in {path[:end] for path in paths for end in range(1, len(path) + 1) if path[end : end + 1] in ("/", "")}:
        about = os.stat(folder)
        if not about.st_mode & stat.S_IXOTH and about.st_uid != 0:
            users.add(about.st_uid)
            groups.add(about.st_gid)
    return sorted(users), sorted(groups - {0})


def _is_below(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith(other + "/") for other in others)
