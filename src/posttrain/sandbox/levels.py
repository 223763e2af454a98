"""Which isolation this system gives, found by trying, and the refusal to run with less than was asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.sandbox.isolation import BACKENDS, Backend, Level
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.run import SandboxError, run

LEVELS = {level.name.lower(): level for level in Level}
# Imports modules that load late: so an interpreter that the program's user may not read fails here.
TRIAL = "import bisect, ctypes, decimal, json, os, random\nopen('written', 'w').write('x')\nprint(os.getpid() if {level} == 3 else 1, decimal.Decimal(2) + 2)"
TRIAL_LIMITS = Limits(wall_s=20.0, cpu_s=10.0)
HOW_TO = {
    Level.NAMESPACES: (
        "Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0), "
        "or install bubblewrap (apt install bubblewrap); in a container, start it with a seccomp profile that allows unshare and mount"
    ),
    Level.LIMITS: "Run on Linux or macOS, and not as root of a container whose Python other users cannot read",
}


@dataclass(frozen=True)
class Isolation:
    """The isolation that programs get here. refused: why each stronger backend does not work on this system."""

    backend: Backend
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        return self.backend.level

    def __str__(self) -> str:
        return f"isolation level '{self.level.name.lower()}' (by {self.backend.name})"

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level.name.lower(), "backend": self.backend.name, "refused": self.refused}


@functools.cache
def strongest() -> Isolation:
    """The strongest backend that runs a small trial program as it should. Tried once per process."""
    refused: dict[str, str] = {}
    for backend in BACKENDS.values():
        why = backend.missing() or failure_of(backend)
        if why is None:
            return Isolation(backend, refused)
        refused[backend.name] = why
    raise SandboxError("no program can be run here: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))


def failure_of(backend: Backend) -> str | None:
    """Why the backend does not work here; None when it does."""
    try:
        outcome = run(backend, {"do": "script", "program": TRIAL.format(level=int(backend.level))}, b"", TRIAL_LIMITS)
    except SandboxError as error:
        return str(error)
    said = outcome.stdout.split()
    if not outcome.is_clean or len(said) != 2 or said[1] != b"4":
        return f"a trial program ended with {outcome}"
    return None if int(said[0]) < 10 else "a trial program saw the processes of the host"


def require(level: str) -> Isolation:
    """The isolation here if it is at least `level`; otherwise UserError that says what was refused and what to
    install."""
    if level not in LEVELS:
        raise UserError(f"'{level}' is no isolation level; there are: {', '.join(LEVELS)}.{did_you_mean(level, LEVELS)}")
    wanted, here = LEVELS[level], strongest()
    if here.level >= wanted:
        return here
    reasons = "; ".join(f"{name}: {why}" for name, why in here.refused.items() if BACKENDS[name].level >= wanted)
    raise UserError(
        f"programs of a model are to run at isolation level '{level}', and this system gives only {here} ({reasons}). {HOW_TO[wanted]}. "
        f"Or plug in a remote runner; or, if you accept what the weaker level lets a program do (docs/sandbox.md), set level: {here.level.name.lower()}."
    )
