"""System calls that a program does not need, refused by a seccomp filter. Linux on x86-64 and arm64.

Those listed open a network, reach a socket, queue or segment of the host, allocate memory that no limit counts (System
V, memfd), look into other processes, or have often been the way into the kernel. Each fails with "operation not
permitted". The isolation does not rest on the filter; it is a second defence.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import system

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column below, the kernel's name (AUDIT_ARCH)
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
EXEC: dict[str, tuple[int, int]] = {"execve": (59, 221), "execveat": (322, 281)}  # refused where no executable is visible
PRLIMIT = (302, 261)  # refused for other processes: that of a supervisor with the same user number could be starved
SOCKETPAIR = (53, 199)  # refused but for streams and packets: a datagram socket sends to any address without connecting
STREAM, PACKETS, KIND_OF_SOCKET = 1, 5, 0xF
CLONE = (56, 220)  # refused with the flag for a new user namespace
CLONE3 = 435  # its flags lie in memory, which a filter cannot read; "no such call" makes the C library use clone
X32 = 0x40000000  # calls of x86-64's second interface

LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # BPF
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


def refuse(*, programs: bool) -> None:
    """For this process and all it starts, irrevocably. programs: no other program may be executed either.

    Needs no-new-privileges. Raises OSError on other architectures.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"there is no table of system calls for {machine}")
    column, name = ARCHITECTURES[machine]
    code = b"".join(struct.pack("=HBBI", *step) for step in _program(column, name, programs))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    system.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _program(column: int, architecture: int, programs: bool) -> list[tuple[int, int, int, int]]:
    """(operation, steps to skip if true, steps to skip if false, operand)."""
    refused, allowed = (RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if column == 0:
        steps += [(AT_LEAST, 0, 1, X32), refused]
    for numbers in (REFUSED | EXEC if programs else REFUSED).values():
        number = numbers[column]
        if number is not None:
            steps += [(EQUAL, 0, 1, number), refused]
    steps += [(EQUAL, 0, 4, PRLIMIT[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, 0), refused, allowed]
    kind = [(LOAD, 0, 0, SECOND_ARGUMENT), (AND, 0, 0, KIND_OF_SOCKET), (EQUAL, 2, 0, STREAM), (EQUAL, 1, 0, PACKETS), refused, allowed]
    steps += [(EQUAL, 0, len(kind), SOCKETPAIR[column]), *kind]
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    steps += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, system.NEWUSER), refused]
    return [*steps, allowed]
