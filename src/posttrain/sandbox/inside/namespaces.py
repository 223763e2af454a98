"""Namespaces without a helper program: files, processes, network and users of the program's own. Linux 5.12 or later.

Files: those of the view (view.py), read-only, some devices, and an empty /tmp of limited size. There is no /proc, no
shell, no network device that is up. The program's root is a directory below the namespace's root (chroot), where the
kernel allows no further user namespace, hence no mounts by the program.
"""

from __future__ import annotations

import os
from typing import Any

from . import system

USER_INSIDE = 1000
BASE = "/tmp"  # where the new root is built; the host's files there become invisible
DEVICES = ("null", "zero", "full", "urandom", "random")
OWNERS_INSIDE = 2000  # and following: users who own a directory on the way to a visible one
FILES_AT_MOST = 1024


def enter(outside_user: int, owners: list[int], groups: list[int]) -> None:
    """New namespaces for this process and its children. outside_user: the program's user number outside.

    owners, groups: of directories that root has to enter (view.View).
    """
    ready, go = os.pipe()
    mine = os.getpid()
    helper = os.fork()  # stays outside, where it may map the users
    if helper == 0:
        try:
            os.close(go)
            os._exit(0 if os.read(ready, 1) and _map_users(mine, outside_user, (owners, groups)) else 1)
        finally:
            os._exit(1)
    every = system.NEWUSER | system.NEWNS | system.NEWPID | system.NEWNET | system.NEWIPC | system.NEWUTS | system.NEWCGROUP
    try:
        system.unshare(every)
        os.write(go, b".")
    finally:
        os.close(go)
        os.close(ready)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError("the users of the namespace could not be mapped (/proc/PID/uid_map)")


def _map_users(process: int, outside_user: int, owners: tuple[list[int], list[int]]) -> bool:
    """Root keeps its number, in order to mount, and the program gets another; another user can map only itself."""
    users = (os.geteuid(), os.getegid())
    for name, user, more in zip(("uid_map", "gid_map"), users, owners, strict=True):
        path = f"/proc/{process}/{name}"
        if users[0] == 0:
            text = f"0 {user} 1\n{USER_INSIDE} {outside_user} 1\n"
            others = "".join(f"{OWNERS_INSIDE + index} {owner} 1\n" for index, owner in enumerate(more))
            try:
                _write(path, text + others)
            except OSError:  # this root has only some users mapped itself, as in a container
                _write(path, text)
        else:
            if name == "gid_map":
                _write(f"/proc/{process}/setgroups", "deny")
            _write(path, f"{USER_INSIDE} {user} 1\n")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build_root(config: dict[str, Any]) -> None:
    """Mounts the program's view and enters it. For process 1 of the new process namespace."""
    system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
    system.mount("tmpfs", BASE, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for name in ("old", "jail"):
        os.mkdir(f"{BASE}/{name}")
    system.pivot_root(BASE, f"{BASE}/old")
    os.chdir("/")
    os.mkdir("/jail/tmp")
    options = f"size={config['limits']['files']},nr_inodes={FILES_AT_MOST},mode=1777"
    system.mount("tmpfs", "/jail/tmp", "tmpfs", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC, options)
    view = config["view"]
    for path in view["shown"]:
        _show(path)
    for path, target in view["links"].items():
        os.makedirs(os.path.dirname("/jail" + path), exist_ok=True)
        os.symlink(target, "/jail" + path)
    for path in view["empty"]:
        system.mount("tmpfs", "/jail" + path, "tmpfs", system.MS_RDONLY, "size=4k,nr_inodes=2,mode=755")
    os.mkdir("/jail/dev")
    for name in DEVICES:
        os.close(os.open(f"/jail/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        system.mount(f"/old/dev/{name}", f"/jail/dev/{name}", None, system.MS_BIND)
    if config["stdin"]:
        _make_stdin()
    system.unmount("/old")
    os.rmdir("/old")
    system.make_read_only("/", recursive=False)
    os.chroot("/jail")
    os.chdir("/tmp")


def _make_stdin() -> None:
    """A file for the content of standard input: on the program's own file system, and there without a name."""
    os.close(os.open("/jail/dev/stdin", os.O_CREAT | os.O_WRONLY, 0o644))
    content = os.open("/jail/tmp/stdin", os.O_CREAT | os.O_WRONLY)
    os.fchmod(content, 0o666)
    os.close(content)
    system.mount("/jail/tmp/stdin", "/jail/dev/stdin", None, system.MS_BIND)
    os.unlink("/jail/tmp/stdin")


def _show(path: str) -> None:
    """A directory or file of the host, read-only. The path has no links in it, and is not inside another that is
    shown."""
    source, target = "/old" + path, "/jail" + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    system.mount(source, target, None, system.MS_BIND | system.MS_REC)
    system.make_read_only(target)
