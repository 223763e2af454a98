"""System calls that Python does not offer, through ctypes. Linux only; each raises OSError that names the call."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 36, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, first: int = 0, second: int = 0) -> int:
    return call("prctl", libc.prctl, option, *(ctypes.c_ulong(value) for value in (first, second, 0, 0)))


def unshare(flags: int) -> None:
    call("unshare", libc.unshare, flags)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    arguments = (source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options and options.encode())
    call(f"mount {target}", libc.mount, *arguments)


def make_read_only(target: str, *, devices: bool = False, recursive: bool = True) -> None:
    """The mount at `target`, and those below it: read-only, without set-user-id programs and (unless `devices`) without
    devices."""
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV), 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, target.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))
    call(f"mount_setattr {target}", libc.syscall, *arguments)


def pivot_root(new: str, old: str) -> None:
    number = SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root has no number here for {os.uname().machine}")
    call("pivot_root", libc.syscall, ctypes.c_long(number), new.encode(), old.encode())


def unmount(target: str) -> None:
    call(f"umount {target}", libc.umount2, target.encode(), MNT_DETACH)


def drop_capabilities() -> None:
    """Every capability, irrevocably."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    call("capset", libc.capset, header, bytes(24))


def drop_bounding_set() -> None:
    """No program executed later can have capabilities. Needs CAP_SETPCAP. The kernel refuses the first number that it
    does not know."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return
