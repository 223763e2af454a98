"""How many threads compute and how they wait for each other, decided before torch is loaded. What the user has set is
left alone.

A thread that waits for the others at the end of a parallel loop can spin or sleep. Spinning for long (the default of
OpenMP's libraries) takes the core from the very thread that everybody waits for, once other programs run on the
machine: a step then takes ten times as long, or more. benchmarks/busy_machine.py has the figures.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

# OpenMP's own variables, read once when the library is loaded: GNU's (Linux), LLVM's and Intel's (macOS, Windows).
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SPINS = 1000  # about 2 microseconds: longer than what two cores that are both free are apart at the end of a loop


def prepare(environ: MutableMapping[str, str] | None = None) -> None:
    """Set OpenMP's variables for this process and its children, unless torch is loaded already (it would not hear of
    them)."""
    if "torch" in sys.modules:
        return
    environ = os.environ if environ is None else environ
    if not any(name in environ for name in WAITING):
        environ["OMP_WAIT_POLICY"] = "passive"
        environ["GOMP_SPINCOUNT"] = str(SPINS)
    quota = cpu_quota()
    if quota is not None and quota < _cores() and not any(name in environ for name in COUNTS):
        environ["OMP_NUM_THREADS"] = str(quota)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The cores that a container may use, rounded up, from its cgroup (version 2, then 1); None: no quota is set. torch
    knows of none."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return math.ceil(int(quota) / int(period)) if quota.isdigit() and int(quota) > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
