"""Hosts the program in its own process, where it may do to this code what it likes: nothing here knows what the right answers are.

`script` runs it as `python program.py` would. `serve` loads it once and then calls its functions by name, a line of JSON per question and
per answer; its own printing goes to standard error meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .plain import decode, encode

SOLUTION = "Solution"  # the class whose methods LeetCode's programs define


def script(message: dict[str, Any]) -> None:
    _load(message["program"], "__main__")


def serve(message: dict[str, Any]) -> None:
    questions, answer = channel()
    objects: list[Any] = []
    failure: BaseException | None = None
    try:
        objects.append(_load(message["program"], "program"))
    except BaseException as error:  # also SystemExit: the program is not there, and every question is answered so
        failure = error
    for line in questions:
        try:
            if failure is not None:
                raise failure
            reply = _reply(json.loads(line), objects)
        except BaseException as error:
            reply = {"raised": type(error).__name__, "message": _text(error)}
        answer(reply)


def channel() -> tuple[Any, Callable[[dict[str, Any]], None]]:
    """Takes standard input and output away from the program: (lines that arrive, a function that writes one)."""
    questions = os.fdopen(os.dup(0), "rb", closefd=False)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)

    def answer(reply: dict[str, Any]) -> None:
        left = memoryview(json.dumps(reply).encode() + b"\n")
        while left:
            left = left[os.write(answers, left) :]

    return questions, answer


def _load(text: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _reply(question: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    """{"value": plain}, or {"object": number} for what is not plain; `objects[0]` is the program's module."""

    def keep(value: Any) -> dict[str, int]:
        objects.append(value)
        return {"object": len(objects) - 1}

    if "get" in question:
        value = objects[question["of"]]
        names = question["get"].split(".")
        if "or_method" in question and not hasattr(value, names[0]) and hasattr(value, SOLUTION):
            names = [SOLUTION, *names]
        for name in names:
            if isinstance(value, type):
                value = value()  # "Solution.solve" is a method of an instance
            try:
                value = getattr(value, name)
            except AttributeError:
                if isinstance(value, types.ModuleType):
                    raise NameError(f"name '{name}' is not defined") from None
                raise
        if "args" not in question:
            return {"value": encode(value, keep)}
    else:
        value = objects[question["of"]]
    args = [decode(item, objects.__getitem__) for item in question["args"]]
    kwargs = {name: decode(item, objects.__getitem__) for name, item in question["kwargs"].items()}
    return {"value": encode(value(*args, **kwargs), keep)}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return "(its message raised)"
