"""How much memory there is: sizes as people write them, and what this machine has free now.

"16GB" is 16 * 10^9 bytes, which is about what a card sold as such leaves to a process; "16GiB" is 16 * 2^30.
"""

from __future__ import annotations

import re
from pathlib import Path
from shutil import which

from posttrain.errors import UserError

GB = 10**9
COMMON_CARDS = (8, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of the GPUs that are sold and rented most
_UNITS = {"GB": GB, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def read_size(text: str) -> int:
    """Bytes of "16GB", "15.5 GiB" or "16" (GB). Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper() or "GB") if found else None
    if found is None or unit is None:
        raise UserError(f"{text!r} is no size of memory; write 16GB or 15.5GiB")
    return int(float(found[1]) * unit)


def as_text(size: float) -> str:
    """In GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:.0f} MiB"


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch could use, asked without torch: by the driver's device files or its
    tool."""
    return any(Path(file).exists() for file in ("/dev/nvidia0", "/dev/dxg", "/dev/kfd")) or which("nvidia-smi") is not None


def free_memory(device: str) -> int | None:
    """Bytes that a process could still take of this machine's GPU ("cuda") or memory ("cpu"). None: it cannot be known
    here."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    return _available(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _available(meminfo: Path, group: Path) -> int | None:
    """What the kernel calls available, and no more than a container's limit leaves."""
    if not meminfo.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    if found is None:
        return None
    available = int(found[1]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text(encoding="utf-8").strip() != "max":
        cached = (
            re.search(r"^inactive_file (\d+)$", stat.read_text(encoding="utf-8"), re.MULTILINE) if (stat := group / "memory.stat").is_file() else None
        )
        held = int(used.read_text(encoding="utf-8")) - (int(cached[1]) if cached else 0)  # the kernel gives its cache of files back
        available = max(0, min(available, int(limit.read_text(encoding="utf-8")) - held))
    return available
