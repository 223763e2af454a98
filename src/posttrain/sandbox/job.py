"""A program with its tests, and the verdict on it. Both are plain data with a JSON form, which a remote runner receives
and sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.errors import UserError
from posttrain.sandbox.inside.plain import NotPlain, decode, encode
from posttrain.sandbox.limits import Limits

DEFAULT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class InputOutput:
    """The program reads `input` from standard input and must write `output` (compare.same_output) and end with exit
    code 0."""

    input: str
    output: str


@dataclass(frozen=True)
class Call:
    """A function of the program, called with plain data, must return `expected` (compare.same_value). "Solution.solve"
    is a method, and so is "solve" of a program that defines it in its class Solution alone."""

    function: str
    args: Sequence[Any]
    expected: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    also: Sequence[Any] = ()  # further values that are right


@dataclass(frozen=True)
class Asserts:
    """Python text that must run without an exception. Names that it does not define are the program's."""

    source: str


Test = InputOutput | Call | Asserts
TESTS: dict[str, type] = {"input_output": InputOutput, "call": Call, "asserts": Asserts}


@dataclass(frozen=True)
class Job:
    """Tests are of one kind. setup: Python text that runs before the asserts, in their process. Raises UserError for
    invalid tests."""

    program: str
    tests: Sequence[Test]
    setup: str = ""
    limits: Limits = field(default_factory=Limits)
    tolerance: float = DEFAULT_TOLERANCE  # of floats, relative or absolute
    stop_at_failure: bool = False  # tests after the first that fails count as failed

    def __post_init__(self) -> None:
        if not self.tests or len({type(test) for test in self.tests}) != 1 or type(self.tests[0]) not in TESTS.values():
            raise UserError("a program needs tests, all of one kind: input and output, calls, or asserts")

    def to_json(self) -> dict[str, Any]:
        kind = next(name for name, each in TESTS.items() if isinstance(self.tests[0], each))
        try:
            tests = [{name: encode(value) for name, value in vars(test).items()} for test in self.tests]
        except NotPlain as error:
            raise UserError(f"a test cannot be sent to a program: {error}") from error
        settings = {name: getattr(self, name) for name in ("program", "setup", "tolerance", "stop_at_failure")}
        return {**settings, "kind": kind, "tests": tests, "limits": self.limits.to_json()}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Job:
        kind = TESTS[said["kind"]]
        tests = [kind(**{name: decode(value) for name, value in test.items()}) for test in said["tests"]]
        settings = {name: said[name] for name in ("program", "setup", "tolerance", "stop_at_failure")}
        return cls(tests=tests, limits=Limits.from_config(said["limits"]), **settings)


@dataclass(frozen=True)
class Result:
    """One test: passed, or why not. `why` may quote the program, so it is hostile text."""

    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """One result for each test, in order; or `error`: no verdict, and not the program's fault.

    is_unusable: the error is in the tests (they are not Python, or never call the program), so trying again will not
    help.
    """

    results: tuple[Result, ...] = ()
    error: str | None = None
    is_unusable: bool = False
    seconds: float = 0.0  # of wall clock

    @property
    def passed(self) -> bool:
        return self.error is None and bool(self.results) and all(result.passed for result in self.results)

    @property
    def fraction(self) -> float | None:
        """The fraction of tests passed; None after an error."""
        return None if self.error is not None else sum(result.passed for result in self.results) / len(self.results)

    def to_json(self) -> dict[str, Any]:
        return {
            "results": [[result.passed, result.why] for result in self.results],
            "error": self.error,
            "is_unusable": self.is_unusable,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Verdict:
        results = tuple(Result(passed is True, str(why)) for passed, why in said["results"])
        return cls(results, None if said["error"] is None else str(said["error"]), said["is_unusable"] is True, float(said["seconds"]))


class Runner(Protocol):
    """Judges programs: `Sandbox` here, `CommandRunner` elsewhere, or your own. Called from many threads at once; errors
    go into the verdict."""

    def judge(self, job: Job) -> Verdict: ...
