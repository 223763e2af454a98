"""Hosts the program in its own process. The program may change this code as it likes: nothing here knows the right
answers.

`script` runs it as `python program.py` would. `serve` loads it once and then calls its functions by name, one line of
JSON per request and per reply; what the program prints goes to standard error then.
"""

from __future__ import annotations

import inspect
import json
import numbers
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .plain import decode, encode

SOLUTION = "Solution"  # the class whose methods LeetCode's programs define
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{each.__name__: each for each in (setattr, delattr, iter, next, len, str, repr)},
    **{each.__name__: each for each in (operator.getitem, operator.setitem, operator.delitem)},
}


class Kept:
    """Objects of the program that are not plain data, by number, for as long as it runs. Number 0 is its module."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def __getitem__(self, number: int) -> Any:
        return self.objects[number]

    def number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]


def script(message: dict[str, Any]) -> None:
    if "stdin" in message:
        with open("/dev/stdin", "w", encoding="utf-8", newline="") as file:
            file.write(message["stdin"])
    _load(message["program"], "__main__")


def serve(message: dict[str, Any]) -> None:
    requests, reply_with = channel()
    objects = Kept()
    failure: BaseException | None = None
    try:
        objects.number(_load(message["program"], "program"))
    except BaseException as error:  # also SystemExit: the reply to every request
        failure = error
    for line in requests:
        try:
            if failure is not None:
                raise failure
            reply = _reply(json.loads(line), objects)
        except BaseException as error:
            reply = {"raised": type(error).__name__, "message": _text(error)}
        reply_with(reply)


def channel() -> tuple[Any, Callable[[dict[str, Any]], None]]:
    """Takes standard input and output away from the program. Returns (incoming lines, a function that writes a
    line)."""
    requests = os.fdopen(os.dup(0), "rb", closefd=False)
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)

    def reply_with(reply: dict[str, Any]) -> None:
        left = memoryview(json.dumps(reply).encode() + b"\n")
        while left:
            left = left[os.write(replies, left) :]

    return requests, reply_with


def _load(text: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _reply(request: dict[str, Any], objects: Kept) -> dict[str, Any]:
    """{"value": plain}; {"object": number} stands for an object that is not plain data."""

    def keep(value: Any) -> Any:
        number = _number(value)
        return {"object": objects.number(value)} if number is None else encode(number)

    if "do" in request:
        try:
            args = [decode(item, objects.__getitem__) for item in request["args"]]
            return {"value": encode(OPERATIONS[request["do"]](objects[request["of"]], *args), keep)}
        except StopIteration:
            return {"is_over": True} if request["do"] == "next" else {"raised": "StopIteration", "message": ""}
    value = _found(objects[request["of"]], request["get"], "or_method" in request) if "get" in request else objects[request["of"]]
    if "args" not in request:
        return {"value": encode(value, keep)}
    args = [decode(item, objects.__getitem__) for item in request["args"]]
    kwargs = {name: decode(item, objects.__getitem__) for name, item in request["kwargs"].items()}
    try:
        reply = {"value": encode(value(*args, **kwargs), keep)}
    except BaseException as error:
        reply = {"raised": type(error).__name__, "message": _text(error)}
    if "changes" in request:  # send the arguments as the call left them
        changed = [[encode(item, keep) for item in args], {name: encode(item, keep) for name, item in kwargs.items()}]
        if changed != [request["args"], request["kwargs"]]:
            reply["changed"] = changed
    return reply


def _found(value: Any, path: str, or_method: bool) -> Any:
    names = path.split(".")
    if or_method and not hasattr(value, names[0]) and hasattr(value, SOLUTION):
        names = [SOLUTION, *names]
    for name in names:
        if isinstance(value, type) and isinstance(inspect.getattr_static(value, name, None), types.FunctionType):
            value = value()  # "Solution.solve" is a method of an instance
        try:
            value = getattr(value, name)
        except AttributeError:
            if isinstance(value, types.ModuleType):
                raise NameError(f"name '{name}' is not defined") from None
            raise
    return value


def _number(value: Any) -> Any:
    """The value of a number of another library's class, such as numpy's; None for anything else."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, numbers.Complex):
        return complex(value)
    is_numpys_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    return bool(value) if is_numpys_bool else None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return "(its message raised)"
