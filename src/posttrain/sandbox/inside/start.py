"""The entry point inside the sandbox: confine this process, then host the program, which arrives on standard input.

A frame (ten digits, then that many bytes of JSON) holds the program's text and what to do with it. The rest of standard
input is the program's. Everything needed is imported before files become invisible.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

FRAME_DIGITS = 10
LOOK_S = 1.0  # between looks at the parent, on systems that do not signal its end


def main() -> None:
    """argv: the directory of this package; then the configuration as JSON, or "fork_server" and its parent's pid. A
    child of the fork server is sent its configuration."""
    from . import host

    if sys.argv[2] == "fork_server":
        from . import fork_server

        config = fork_server.next_child(int(sys.argv[3]))
    else:
        config = json.loads(sys.argv[2])
    if config["do"] == "run_tests":
        from . import test_runner

        action = test_runner.run_tests
    else:
        action = {"script": host.script, "serve": host.serve}[config["do"]]
    sys.path[:] = [entry for entry in sys.path if entry not in ("", sys.argv[1])]
    if config["folder"] is not None:
        os.chdir(config["folder"])
        os.environ.update(HOME=config["folder"], TMPDIR=config["folder"])
    sys.path += config["packages"]
    if sys.platform.startswith("linux"):
        from . import confine

        confine.be_killed_first()
    if config["posix"]:
        from . import supervisor

        supervisor.confine_and_supervise(config)  # returns in the confined process only
    else:
        _end_with(config["parent"])
    message = _frame()
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]  # a program with a module of its own called `host` must not get this one
    action(message)


def _end_with(parent: int) -> None:
    """Without a supervisor: this process ends when `parent` does. The program can undo that."""
    if sys.platform.startswith("linux"):
        from . import system

        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    else:
        threading.Thread(target=_wait_for_end, args=(parent,), daemon=True).start()


def _wait_for_end(parent: int) -> None:
    if sys.platform == "win32":
        import ctypes

        kernel = ctypes.windll.kernel32
        kernel.OpenProcess.restype, synchronize, for_ever = ctypes.c_void_p, 0x00100000, 0xFFFFFFFF
        handle = kernel.OpenProcess(synchronize, False, parent)
        kernel.WaitForSingleObject(ctypes.c_void_p(handle), for_ever)
    else:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
    os._exit(1)


def _frame() -> dict[str, Any]:
    return dict(json.loads(_exactly(int(_exactly(FRAME_DIGITS)))))


def _exactly(count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = os.read(0, count - len(found))
        if not piece:
            raise SystemExit("standard input ended before the program arrived")
        found += piece
    return found
