"""What a figure was measured on, and where it is written: every benchmark's JSON holds its hardware, versions and date."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def describe(*packages: str) -> dict[str, Any]:
    """Processor, memory, accelerator, and the versions of torch and of `packages`."""
    import torch

    return {
        "date": today(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bool(torch.cpu._is_avx512_bf16_supported()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions("torch", *packages),
    }


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def line(hardware: dict[str, Any]) -> str:
    bf16 = "with" if hardware["bf16_instructions"] else "without"
    return (
        f"{hardware['processor']}, {hardware['threads']} threads, {bf16} bf16 instructions, torch {hardware['versions']['torch']}, {hardware['date']}"
    )


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/{name}.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def read(name: str, machine: dict[str, Any]) -> dict[str, Any]:
    """What was saved under this name; nothing where it was measured on another kind of machine, or with other libraries."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["hardware"] | {"date": None} == machine | {"date": None} else {}


def resident_bytes() -> int:
    """Memory this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most memory this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
