"""Reads the forms of tests in datasets into the sandbox's three kinds: input and output, calls, asserts. Nothing is run
here.

- text: Python with asserts (one test), or JSON of what follows
- a list of texts: one assert-style test each
- a list of {input, output}: standard input and output; of {function, args, kwargs, expected}: calls
- {inputs: [...], outputs: [...], fn_name}: input and output, or calls of `fn_name`

Some datasets wrap what `fn_name` returns in a list, some do not. Where every output of a row is a list of one element,
the two cannot be told apart and either counts; otherwise outputs are taken as they are, so that 3 does not pass for [3]
beside an output of two elements.
"""

from __future__ import annotations

import json
import re
from typing import Any

from posttrain.errors import UserError
from posttrain.sandbox import Asserts, Call, InputOutput, Test

_NAME = re.compile(r"[A-Za-z_]\w*(\(\))?(\.[A-Za-z_]\w*)*")
_DEFINES_CHECK = re.compile(r"^def check\(", re.MULTILINE)
_CALLS_CHECK = re.compile(r"^check\(", re.MULTILINE)
FORMS = "asserts as text, a list of them, a list of {input, output} or {args, expected}, or {inputs, outputs}"


def read_tests(tests: Any, entry_point: Any = None) -> list[Test]:
    """[] for a row without tests. `entry_point`: the function that calls and a bare `def check(candidate)` mean. Raises
    UserError."""
    if tests is None or tests == "" or tests == []:
        return []
    name = _checked_name(entry_point)
    if isinstance(tests, str):
        if tests.lstrip()[:1] not in ("{", "["):
            return [_asserts(tests, name)]
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the tests {_short(tests)} begin as JSON and are not: {error}") from error
    if isinstance(tests, dict) and "inputs" in tests and "outputs" in tests:
        return _columns(tests)
    if not isinstance(tests, list):
        raise UserError(f"the tests {_short(tests)} are in no known form; give {FORMS}")
    read = [_one(test, name) for test in tests]
    if len({type(test) for test in read}) > 1:
        raise UserError(f"the tests {_short(tests)} are of several kinds; a row has tests of one kind")
    return read


def _columns(tests: dict[str, Any]) -> list[Test]:
    """Inputs beside outputs. With `fn_name` an input is the list of arguments."""
    name, inputs, outputs = _checked_name(tests.get("fn_name")), tests["inputs"], tests["outputs"]
    if len(inputs) != len(outputs):
        raise UserError(f"the tests have {len(inputs)} inputs and {len(outputs)} outputs")
    pairs = list(zip(inputs, outputs, strict=True))
    if name is None:
        return [_one({"input": given, "output": wanted}, None) for given, wanted in pairs]
    may_be_wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    return [Call(name.replace("()", ""), list(args), output, also=output if may_be_wrapped else ()) for args, output in pairs]


def _text(value: Any) -> Any:
    """Some datasets keep a text as the list of its lines, and a line that is a number as a number."""
    lines = value if isinstance(value, list) else [value]
    return "\n".join(map(str, lines)) if all(isinstance(line, (str, int, float)) for line in lines) else value


def _one(test: Any, entry_point: str | None) -> Test:
    if isinstance(test, str):
        return _asserts(test, entry_point)
    if not isinstance(test, dict):
        raise UserError(f"the test {_short(test)} is in no known form; give {FORMS}")
    said = {key: value for key, value in test.items() if value is not None or key == "expected"}  # Arrow fills missing keys with None
    if "input" in said and "output" in said:
        if said.get("testtype") == "functional":
            said = {"args": [_json(line) for line in said["input"].splitlines()], "expected": _json(said["output"])}
        elif isinstance(given := _text(said["input"]), str) and isinstance(wanted := _text(said["output"]), str):
            return InputOutput(given, wanted)
    if "args" not in said or "expected" not in said:
        raise UserError(f"the test {_short(test)} is in no known form; give {FORMS}")
    function = _checked_name(said.get("function")) or entry_point
    if function is None:
        raise UserError(f"the test {_short(test)} does not say which function it calls; name it in `function` or in the column `entry_point`")
    kwargs = {name: value for name, value in said.get("kwargs", {}).items() if value is not None}
    return Call(function.replace("()", ""), list(said["args"]), said["expected"], kwargs)


def _asserts(source: str, entry_point: str | None) -> Asserts:
    if entry_point and _DEFINES_CHECK.search(source) and not _CALLS_CHECK.search(source):
        source = f"{source}\n\ncheck({entry_point})\n"
    return Asserts(source)


def _checked_name(name: Any) -> str | None:
    if name is None or name == "":
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"the entry point {_short(name)} is not the name of a function")
    return name


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the test's value {_short(text)} is not JSON: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
