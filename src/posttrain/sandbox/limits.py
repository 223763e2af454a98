"""What a program may use. A program that reaches a limit is ended, and counts as wrong."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from posttrain.errors import UserError, did_you_mean

MIB = 2**20
SMALLEST_MEMORY_MB = 64  # of which Python itself needs about 30


@dataclass(frozen=True)
class Limits:
    """Limits of one program, from its start to the end of the last process it started."""

    wall_s: float = 10.0  # seconds on the clock, the start of Python included
    cpu_s: float = 5.0  # seconds of processor time, for each of its processes; the system rounds up to whole seconds
    memory_mb: int = 256  # MiB of address space, for each of its processes
    processes: int = 8  # processes and threads at once, the program itself included
    files_mb: int = 16  # MiB of one file, and (in namespaces) of all files together
    open_files: int = 64  # file descriptors of one process
    output_kb: int = 1024  # KiB of standard output; as much again of standard error

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise UserError(f"the limit {each.name} must be a positive number, not {value!r}")
        if self.memory_mb < SMALLEST_MEMORY_MB:
            raise UserError(f"memory_mb is {self.memory_mb}, which Python does not start in; give at least {SMALLEST_MEMORY_MB}")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Limits:
        """From a recipe or a message. Raises UserError for names that are no limits."""
        known = [each.name for each in fields(cls)]
        for name in config:
            if name not in known:
                raise UserError(f"'{name}' is not a limit; there are: {', '.join(known)}.{did_you_mean(name, known)}")
        return cls(**config)

    def inside(self) -> dict[str, int]:
        """In the units of setrlimit, for the process that confines itself."""
        return {
            "wall_s": math.ceil(self.wall_s),
            "cpu_s": math.ceil(self.cpu_s),
            "memory": int(self.memory_mb * MIB),
            "processes": int(self.processes),
            "files": int(self.files_mb * MIB),
            "open_files": int(self.open_files),
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
