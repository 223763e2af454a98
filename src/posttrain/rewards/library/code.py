"""Rewards for programs: the program in a completion is run against the tests of its row, in a sandbox
(docs/sandbox.md).

The program is the last fenced block that is marked as Python or not marked at all. A sandbox that fails is an error and
never a score.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from posttrain.errors import RewardError, UserError, did_you_mean
from posttrain.rewards.library.code_tests import read_tests
from posttrain.rewards.reward import RewardFunction, reward, verifier
from posttrain.sandbox import Job, Limits, Pool, Sandbox

LANGUAGES = ("", "python", "py", "python3")
_MARKS = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)


class Fence(NamedTuple):
    """A line that opens or closes a block."""

    start: int
    end: int  # where the next line begins
    marks: str
    word: str  # the first one after the marks: a language, or nothing


def program_in(completion: str, fence: bool = True) -> str | None:
    """The program of a completion, or None. A truncated block counts to its end. fence=False: without any block the
    whole text is the program."""
    found: str | None = None
    opened: Fence | None = None
    fences = list(_fences(completion))
    for mark in fences:
        if opened is None:
            opened = mark
        elif not mark.word and mark.marks.startswith(opened.marks):
            found = completion[opened.end : mark.start] if opened.word.lower() in LANGUAGES else found
            opened = None
    if opened is not None and opened.word.lower() in LANGUAGES:
        found = completion[opened.end :]
    if found is None and not fence and not fences:
        found = completion
    return found if found is None or found.strip() else None


def _fences(text: str) -> Iterator[Fence]:
    """The rest of a line is read without a pattern, which would backtrack."""
    for marks in _MARKS.finditer(text):
        end = text.find("\n", marks.end())
        rest = text[marks.end() : end if end >= 0 else len(text)]
        if "`" not in rest:
            words = rest.split(maxsplit=1)
            yield Fence(marks.start(), end + 1 if end >= 0 else len(text), marks[1], words[0] if words else "")


def program_given(fence: bool = True) -> RewardFunction:
    """1 if the completion has a program, else 0. It is not run."""
    return reward(name="program_given", range=(0.0, 1.0))(lambda completion: 0.0 if program_in(completion, fence) is None else 1.0)


SCORINGS = ("all", "fraction")


def passes_tests(
    *,
    scoring: str = "all",
    level: str = "namespaces",
    limits: dict[str, Any] | None = None,
    fence: bool = True,
    packages: bool = False,
    tolerance: float = 1e-9,
    programs_at_once: int | None = None,
) -> RewardFunction:
    """1 if the program passes every test of the column `tests`, else 0. None for a row without tests, or with tests
    that cannot judge.

    scoring: "all", a verifier, or the "fraction" of tests passed. level: the least isolation, without which nothing is
    run (UserError). limits: as sandbox.Limits. packages: programs may import what is installed here. tolerance: of
    floats. programs_at_once: None: one for each core. The columns `entry_point` and `setup` are used when a row has
    them.
    """
    if scoring == "share":
        warnings.warn("code: scoring: share is called fraction now", FutureWarning, stacklevel=2)
        scoring = "fraction"
    if scoring not in SCORINGS:
        raise UserError(f"scoring={scoring!r}: use one of {', '.join(SCORINGS)}.{did_you_mean(scoring, SCORINGS)}")
    if programs_at_once is not None and (type(programs_at_once) is not int or programs_at_once < 1):
        raise UserError(f"programs_at_once={programs_at_once!r}: give a whole number, 1 or more")
    pool = _pool(level, packages, programs_at_once)
    bounds = Limits.from_config(limits or {})

    async def score(completion: str, tests: Any, log_metric: Any, entry_point: Any = None, setup: Any = None) -> bool | float | None:
        """None where the tests cannot tell. Raises RewardError when the sandbox failed."""
        found = read_tests(tests, entry_point)
        if not found:
            return None
        program = program_in(completion, fence)
        if program is None:
            return False
        verdict = await asyncio.wrap_future(pool.submit(Job(program, found, setup or "", bounds, tolerance, stop_at_failure=scoring == "all")))
        log_metric("code/unusable_tests", float(verdict.is_unusable))
        if verdict.error is not None and not verdict.is_unusable:
            raise RewardError(f"a program could not be judged: {verdict.error}")
        if verdict.is_unusable:
            return None
        return verdict.passed if scoring == "all" else verdict.fraction

    # Without a time limit: every program has its own, and may have to wait for its turn.
    if scoring == "all":
        return verifier(name="passes_tests", timeout=math.inf)(score)
    return reward(name="fraction_of_tests", range=(0.0, 1.0), decides=True, timeout=math.inf)(score)


@functools.wraps(passes_tests, assigned=())  # for its settings, which recipes are checked against
def code(**settings: Any) -> list[RewardFunction]:
    """A program in a fenced block (0.1), and its tests passed (1). The settings are those of `passes_tests`."""
    given = program_given(settings.get("fence", True))
    given.weight = 0.1
    return [given, passes_tests(**settings)]


@functools.cache
def _pool(level: str, packages: bool, programs_at_once: int | None) -> Pool:
    """One for all rewards with these settings, so that programs_at_once counts all of their programs."""
    return Pool(Sandbox(level, packages=packages), programs_at_once)
