"""How rewards break, and the policy for it: how long a call may take, how often it is tried, whether the run goes on.

What a policy leaves open (None) is filled in from the next wider place: the reward, its rubric, the trainer, and last
BASE.
"""

from __future__ import annotations

import math
import os
import traceback
from dataclasses import dataclass, fields
from typing import Any

from posttrain.errors import UserError, did_you_mean

ON_ERROR = ("stop", "drop")
MESSAGE, TRACE = 2_000, 20_000  # characters of an exception's message and of its frames
FRAMES, CHAIN = 30, 5  # innermost frames that are shown, and exceptions that led to one another


@dataclass
class Failure:
    """Why completions have no score."""

    # "raised" (or its worker died), "timed_out", "not_finite" (or beyond 1e15), "wrong_type" (no score), "wrong_length"
    # (of a batch's scores)
    kind: str
    message: str  # names the reward, the row and the cause
    trace: str = ""  # the traceback, where something was raised
    error: BaseException | None = None  # what was raised, if that was in this process
    is_fatal: bool = False  # the input is wrong (UserError): the run stops whatever the policy


@dataclass(frozen=True)
class FailurePolicy:
    """Raises UserError for values that make no sense."""

    timeout: float | None = None  # seconds that one call may take; math.inf: no limit
    on_error: str | None = None  # "stop": RewardError; "drop": the completion leaves its group unscored
    retries: int | None = None  # further attempts before that
    workers: int | None = None  # processes that the reward runs in, at most
    memory_mb: int | None = None  # what each of them may allocate beyond the imported reward, in MiB; Linux only

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
OPEN = FailurePolicy()
BASE = FailurePolicy(math.inf, "stop", 0, min(4, os.cpu_count() or 1))


def what_of(error: BaseException) -> str:
    """'ValueError: no number at rewards.py:7', with the beginning of a long message."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return _named(error) + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def trace_of(error: BaseException) -> str:
    """The traceback as Python writes it, but of long messages the beginning: Python itself takes half a minute for one
    of 50 MB."""
    chain: list[BaseException] = []
    while len(chain) < CHAIN and error not in chain:
        chain.append(error)
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            break
        error = earlier
    written = []
    for each in reversed(chain):
        frames = "".join(traceback.format_tb(each.__traceback__, limit=-FRAMES))
        written.append(f"Traceback (most recent call last):\n{shortened(frames, TRACE)}{_named(each)}\n")
    return "\nThis led to another exception:\n\n".join(written)


def _named(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be read)"
    return f"{type(error).__name__}: {shortened(message, MESSAGE)}" if message else type(error).__name__


def shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} [{len(text) - characters} characters more]"
