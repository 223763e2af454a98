"""What a process gives up through Landlock, where there are no namespaces: writing outside of its directory, and access
to other processes.

Linux 5.13 gives the first, and hides the environment and memory of other processes; 6.12 also forbids signals to them
and their abstract sockets.
"""

from __future__ import annotations

import ctypes
import os
import struct

from . import system

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
# Rights to files by the version that knows them: writing, removing and making of every kind; moving to another
# directory; truncating.
RIGHTS = {1: WRITE_FILE | sum(1 << bit for bit in range(4, 13)), 2: 1 << 13, 3: TRUNCATE}
CONNECT_AND_BIND, ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3
DEVICES = ("/dev/null", "/dev/zero", "/dev/full")


def confine_to(folder: str) -> int:
    """Returns the version of the kernel's Landlock; 0 where it has none. Needs no-new-privileges. Raises OSError."""
    version = int(system.libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), VERSION))
    if version < 1:
        return 0
    rights = sum(each for since, each in RIGHTS.items() if version >= since)
    settings = struct.pack("=Q", rights)
    if version >= 4:
        settings += struct.pack("=Q", CONNECT_AND_BIND)
    if version >= 6:
        settings += struct.pack("=Q", ABSTRACT_SOCKETS_AND_SIGNALS)
    rules = system.call("landlock_create_ruleset", system.libc.syscall, ctypes.c_long(CREATE_RULESET), settings, ctypes.c_size_t(len(settings)), 0)
    try:
        for path in (folder, *DEVICES):
            _allow(rules, path, rights if path == folder else rights & (WRITE_FILE | TRUNCATE))
        system.call("landlock_restrict_self", system.libc.syscall, ctypes.c_long(RESTRICT_SELF), rules, 0)
    finally:
        os.close(rules)
    return version


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = struct.pack("=Qi", rights, place)
    try:
        system.call("landlock_add_rule", system.libc.syscall, ctypes.c_long(ADD_RULE), rules, PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
