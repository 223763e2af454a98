"""What is to happen when a reward breaks: how long a call may take, how often it is tried, and whether the run goes on.

Whatever is not said (None) is filled in from the next wider place: the reward, its rubric, the trainer, and at last BASE.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

from posttrain.errors import UserError, did_you_mean

ON_ERROR = ("stop", "drop")


@dataclass(frozen=True)
class FailurePolicy:
    """Raises UserError for values that cannot be meant."""

    timeout: float | None = None  # seconds that one call may take; math.inf: as long as it likes
    on_error: str | None = None  # "stop": RewardError; "drop": the completion leaves its group unscored
    retries: int | None = None  # further attempts before that
    workers: int | None = None  # processes that the reward runs in, at most
    memory_mb: int | None = None  # what each of them may allocate beyond what the imported reward holds, in MiB; Linux only

    def __post_init__(self) -> None:
        if self.timeout is not None and (not _is_number(self.timeout) or not self.timeout > 0):
            raise UserError(f"timeout={self.timeout!r}: give the seconds that one call of the reward may take, above 0")
        if self.on_error is not None and self.on_error not in ON_ERROR:
            raise UserError(f"on_error={self.on_error!r}: use 'stop' or 'drop'.{did_you_mean(str(self.on_error), ON_ERROR)}")
        for name, value, least in (("retries", self.retries, 0), ("workers", self.workers, 1), ("memory_mb", self.memory_mb, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"{name}={value!r}: give a whole number, {least} or more")

    @classmethod
    def of(cls, values: dict[str, Any]) -> FailurePolicy:
        """From keywords."""
        for name in values:
            if name not in POLICY_KEYS:
                raise UserError(
                    f"'{name}' is not a setting of a reward; when it breaks, {', '.join(POLICY_KEYS)} count.{did_you_mean(name, POLICY_KEYS)}"
                )
        return cls(**values)

    def over(self, wider: FailurePolicy) -> FailurePolicy:
        """This policy, with what it leaves open taken from a wider one."""
        return FailurePolicy(*(getattr(wider, name) if getattr(self, name) is None else getattr(self, name) for name in POLICY_KEYS))

    @property
    def seconds(self) -> float | None:
        """The time limit of a call; None: there is none."""
        return None if self.timeout is None or math.isinf(self.timeout) else self.timeout

    @property
    def drops(self) -> bool:
        return self.on_error == "drop"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


POLICY_KEYS = tuple(field.name for field in fields(FailurePolicy))
OPEN = FailurePolicy()  # nothing said
BASE = FailurePolicy(math.inf, "stop", 0, min(4, os.cpu_count() or 1))
