"""Judges a program by its tests. The program never sees the expected values, and the verdict is not made in its
process.

Outputs and returned values are compared in this process, as data. Assert-style tests run in a second sandbox, the test
runner; this process passes requests and replies between the two.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from posttrain.errors import UserError
from posttrain.sandbox.compare import read_answer, same_output, same_value
from posttrain.sandbox.inside.plain import NotPlain, encode
from posttrain.sandbox.job import Asserts, Call, InputOutput, Job, Result, Verdict
from posttrain.sandbox.levels import require
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.run import Outcome, Process, SandboxError, run
from posttrain.sandbox.view import checked

ENDED = "the program had ended"
TEST_RUNNER_EXTRA_S = 0.5  # the test runner outlives the program, to report how its tests ended


class Sandbox:
    """Runs programs on this machine. Raises UserError if it cannot give this isolation level (levels.LEVELS).

    packages: programs may import the packages installed here. visible: further directories that they may read;
    UserError for a missing one.
    """

    def __init__(self, level: str = "namespaces", *, packages: bool = False, visible: tuple[str, ...] = ()) -> None:
        self.isolation = require(level)
        self.packages, self.visible = packages, checked(visible)

    def judge(self, job: Job) -> Verdict:
        """The verdict on one program. A sandbox that fails twice is the verdict's `error`; see Job for the
        UserErrors."""
        start = time.monotonic()
        for _ in range(2):
            try:
                verdict = JUDGES[type(job.tests[0])](self, job)
                break
            except SandboxError as error:
                verdict = Verdict(error=str(error))
        return dataclasses.replace(verdict, seconds=round(time.monotonic() - start, 3))

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Runs a program without judging it. Raises SandboxError."""
        message = {"do": "script", "program": program}
        return run(
            self.isolation.backend, message, stdin.encode("utf-8", "replace"), limits or Limits(), packages=self.packages, visible=self.visible
        )

    def start(self, message: dict[str, Any], limits: Limits) -> Process:
        return Process(self.isolation.backend, message, limits, packages=self.packages, visible=self.visible)


def _input_output(sandbox: Sandbox, job: Job) -> Verdict:
    results: list[Result] = []
    for test in job.tests:
        assert isinstance(test, InputOutput)
        if job.stop_at_failure and results and not results[-1].passed:
            results.append(Result(False, "not run: a test before it failed"))
            continue
        outcome = sandbox.run(job.program, test.input, job.limits)
        is_right = outcome.is_clean and same_output(test.output, outcome.stdout, job.tolerance)
        results.append(Result(is_right, "" if is_right else "wrong output" if outcome.is_clean else str(outcome)))
    return Verdict(tuple(results))


def _calls(sandbox: Sandbox, job: Job) -> Verdict:
    """One process for all calls: all requests are sent at once and answered in order."""
    try:
        right = [[encode(value) for value in (test.expected, *test.also)] for test in job.tests if isinstance(test, Call)]
        requests = [json.dumps(_request(test)).encode() + b"\n" for test in job.tests if isinstance(test, Call)]
    except NotPlain as error:
        raise UserError(f"a test cannot be sent to a program: {error}") from error
    with sandbox.start({"do": "serve", "program": job.program}, job.limits) as program:
        program.write(b"".join(requests))
        program.write(None)
        outcome = program.wait()
    answers = outcome.stdout.split(b"\n")[:-1]
    answered = [_judged(values, answer, job.tolerance) for values, answer in zip(right, answers, strict=False)]
    left = [Result(False, f"no answer: {outcome}")] * (len(right) - len(answered))
    return Verdict((*answered, *left))


def _request(test: Call) -> dict[str, Any]:
    return {
        "of": 0,
        "get": test.function,
        "or_method": True,
        "args": [encode(value) for value in test.args],
        "kwargs": {name: encode(value) for name, value in test.kwargs.items()},
    }


def _judged(right: list[Any], answer: bytes, tolerance: float) -> Result:
    """right: all values that are right, encoded."""
    try:
        said = read_answer(answer)
    except (ValueError, RecursionError):
        return Result(False, "the answer is not JSON")
    if not isinstance(said, dict) or "value" not in said:
        return Result(False, f"raised {said.get('raised')}: {said.get('message')}"[:300] if isinstance(said, dict) else "no answer")
    return Result(True) if any(same_value(value, said["value"], tolerance) for value in right) else Result(False, "wrong value")


def _asserts(sandbox: Sandbox, job: Job) -> Verdict:
    sources = [test.source for test in job.tests if isinstance(test, Asserts)]
    longer = dataclasses.replace(job.limits, wall_s=job.limits.wall_s + TEST_RUNNER_EXTRA_S)
    with (
        sandbox.start({"do": "serve", "program": job.program}, job.limits) as program,
        sandbox.start({"do": "run_tests", "setup": job.setup, "tests": sources}, longer) as test_runner,
    ):
        results: list[Result] = []
        was_asked = False
        while (line := test_runner.line()) is not None:
            said = _said(line)
            if "ask" in said:
                was_asked = True
                program.write(json.dumps(said["ask"]).encode() + b"\n")
                test_runner.write((program.line() or b'{"gone": true}') + b"\n")
            elif "result" in said:
                results.append(Result(said["result"] is True, _why(said["why"], program)))
            elif "failed" in said:
                return Verdict((*results, *[Result(False, said["failed"])] * (len(sources) - len(results))))
            else:
                return Verdict(error=said["broken"], is_unusable=True)
        outcome = test_runner.wait()
    if len(results) < len(sources) and not was_asked:
        return Verdict(error=f"the tests ended before they called the program: {outcome}", is_unusable=True)
    left = [Result(False, f"the tests ended early: {outcome}")] * (len(sources) - len(results))
    return Verdict((*results, *left))


def _said(line: bytes) -> dict[str, Any]:
    """A line from the test runner. Tests may write there themselves, and then there is no verdict."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        said = None
    known = isinstance(said, dict) and any(set(keys) <= set(said) for keys in (("ask",), ("failed",), ("broken",), ("result", "why")))
    return said if known else {"broken": "the tests wrote to the channel of their own verdict"}


def _why(why: str | None, program: Process) -> str:
    return f"{why}: {program.outcome}" if why == ENDED and program.outcome is not None else why or ""


JUDGES: dict[type, Callable[[Sandbox, Job], Verdict]] = {InputOutput: _input_output, Call: _calls, Asserts: _asserts}
