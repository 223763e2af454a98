"""An interpreter with everything imported that forks a process for each program, since starting Python takes longer
than a small program.

It never sees a program, a test or an answer. It receives the new process's descriptors over its standard input, a
socket, and sends back the pid. It ends, with every process that it forked, when the socket is closed or its parent has
ended (a fork of the parent may still hold the socket).
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
from typing import Any

MOST_BYTES = 2**20  # of one configuration


def next_child(parent: int) -> dict[str, Any]:
    """Returns in the new process only, with its configuration; its standard descriptors are those that were sent.
    parent: the pid of this one's."""
    from . import confine, supervisor, test_runner  # noqa: F401  # imported once, for all

    confine.ignore_signals()
    channel = socket.socket(fileno=0)
    poller = _watching(channel, parent)
    gc.freeze()
    mine = os.getpid()
    while True:
        if any(descriptor != channel.fileno() for descriptor, _ in poller.poll()):
            os._exit(0)
        message, descriptors, _, _ = socket.recv_fds(channel, MOST_BYTES, 4)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(child).encode())
        _reap()
    channel.detach()
    os.setsid()
    for standard, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, standard)
    config: dict[str, Any] = json.loads(message)
    return config | {"report": descriptors[3], "parent": mine}


def _watching(channel: socket.socket, parent: int) -> select.poll:
    """Polls the socket, and for the parent's end."""
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(0)
    if os.getppid() != parent:  # it has ended, and its pid is another process's
        os._exit(0)
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(watched, select.POLLIN)
    return poller


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
