"""Runs assert-style tests in a process of its own. Names that the tests do not define are requested from the program,
by value.

So asserts, comparisons and exceptions are evaluated outside of the program's process. A reply is plain data, or a
`Remote`, which can be called, changed and asked for attributes and items, and equals nothing. What a call changes in
its arguments is changed here too.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import sys
import types
from typing import Any, NoReturn

from .changes import become
from .host import channel
from .plain import NotPlain, decode, encode

# What a program may raise in the tests. Not StopIteration or SystemExit, which would end a loop or the process of the
# tests.
RAISABLE: dict[str, type[Exception]] = {
    each.__name__: each
    for each in (
        *(ArithmeticError, OverflowError, ZeroDivisionError, TypeError, ValueError, AttributeError, NameError),
        *(LookupError, IndexError, KeyError, ImportError, ModuleNotFoundError, NotImplementedError, RecursionError, RuntimeError),
        *(OSError, EOFError, FileNotFoundError, PermissionError),
    )
}


class ProgramError(Exception):
    """An exception of the program that is not in the table."""


class Ended(BaseException):
    """The program has ended. A test's `except Exception` does not catch this."""


class Unsupported(BaseException):
    """The tests pass the program something that cannot be sent: their fault, not the program's."""


class Wire:
    """Requests to the program, and what came of them."""

    def __init__(self) -> None:
        self.replies, self.say = channel()
        self.asked = 0
        self.is_gone = False
        self.unsupported: str | None = None
        self.objects: dict[int, Remote] = {}  # one for each object of the program's, so that `is` works

    def ask(self, request: dict[str, Any], given: tuple[list[Any], dict[str, Any]] | None = None) -> Any:
        """given: the arguments of a call, which are changed as the call changed them."""
        self.asked += 1
        self.say({"ask": request})
        reply = json.loads(self.replies.readline() or '{"gone": true}')
        if "changed" in reply and given is not None:
            args, kwargs = reply["changed"]
            become(given[0], [decode(value, self.remote) for value in args])
            become(given[1], {name: decode(value, self.remote) for name, value in kwargs.items()})
        if "value" in reply:
            return decode(reply["value"], self.remote)
        if "is_over" in reply and request.get("do") == "next":
            raise StopIteration
        if "raised" in reply:
            name, message = str(reply["raised"]), str(reply.get("message", ""))
            raise RAISABLE[name](message) if name in RAISABLE else ProgramError(f"{name}: {message}")
        self.is_gone = True
        raise Ended

    def remote(self, number: int) -> Remote:
        return self.objects.setdefault(number, Remote(self, number))

    def plain(self, value: Any) -> Any:
        try:
            return encode(value, _number_of)
        except NotPlain as error:
            self.unsupported = f"the tests pass {error}, which cannot be sent to the program"
            raise Unsupported from None


class Remote:
    """An object of the program's that is not plain data. It has no truth value, equality or arithmetic here: a false
    one would decide a test."""

    __slots__ = ("_number", "_wire")

    def __init__(self, wire: Wire, number: int) -> None:
        object.__setattr__(self, "_wire", wire)
        object.__setattr__(self, "_number", number)

    def _found(self) -> Remote:
        return self

    def _do(self, operation: str, *args: Any) -> Any:
        """One of host.OPERATIONS, applied in the program's process."""
        found = self._found()
        return self._wire.ask({"of": found._number, "do": operation, "args": [self._wire.plain(value) for value in args]})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain, given = self._wire.plain, list(args)
        request = {"of": self._found()._number, "args": [plain(value) for value in args], "kwargs": {name: plain(kwargs[name]) for name in kwargs}}
        return self._wire.ask({**request, "changes": True}, (given, kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._wire.ask({"of": self._found()._number, "get": name})

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._do("delattr", name)

    def __iter__(self) -> Any:
        return self._do("iter")

    def __next__(self) -> Any:
        return self._do("next")

    def __len__(self) -> Any:
        return self._do("len")

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delitem", key)

    def __str__(self) -> Any:
        return self._do("str")

    def __repr__(self) -> Any:
        return self._do("repr")

    def __bool__(self) -> NoReturn:
        raise TypeError("an object of the program is neither true nor false here; only plain data is")

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("an object of the program cannot be compared here; only plain data can")

    __hash__ = None  # type: ignore[assignment]


class Named(Remote):
    """A name of the program's, looked up when it is used."""

    __slots__ = ("_name",)

    def __init__(self, wire: Wire, name: str) -> None:
        super().__init__(wire, 0)
        object.__setattr__(self, "_name", name)

    def _found(self) -> Any:
        return self._wire.ask({"of": 0, "get": self._name})


def _number_of(value: Any) -> Any:
    if isinstance(value, Named):  # it may name plain data too
        return encode(value._found(), _number_of)
    if isinstance(value, Remote):
        return {"object": value._number}
    raise NotPlain(f"an object of the class {type(value).__name__}")


def run_tests(message: dict[str, Any]) -> None:
    """Sends {"result": ...} for each test, in order; {"failed": why} for all that are left; {"broken": why} if the
    tests are unusable."""
    wire = Wire()
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    sources = [message["setup"], *message["tests"]]
    try:
        trees = [ast.parse(source) for source in sources]
    except (SyntaxError, ValueError) as error:
        wire.say({"broken": f"the tests are not Python: {error}"})
        return
    names = _undefined(trees)
    module.__dict__.update({name: importlib.import_module(name) for name in names & _modules(trees)})
    module.__dict__.update({name: Named(wire, name) for name in names if name not in module.__dict__})
    for index, tree in enumerate(trees):
        result = _run(tree, module, wire, is_setup=index == 0)
        if result is not None:
            wire.say(result)
            if "result" not in result:
                return
    if not wire.asked:
        wire.say({"broken": "the tests never called the program; tests that only define `check` need the column `entry_point`"})


def _run(tree: ast.Module, module: types.ModuleType, wire: Wire, is_setup: bool) -> dict[str, Any] | None:
    why = None
    try:
        exec(compile(tree, "tests.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:500]
    if wire.unsupported is not None:
        return {"broken": wire.unsupported}
    if is_setup:
        return {"failed" if wire.asked else "broken": f"the setup of the tests raised {why}"} if why else None
    if wire.is_gone:
        why = "the program had ended"
    return {"result": why is None, "why": why}


def _undefined(trees: list[ast.Module]) -> set[str]:
    """Names that the tests use and do not define."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    defined |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return used - defined - set(dir(builtins)) - {"__name__", "__file__"}


def _modules(trees: list[ast.Module]) -> set[str]:
    """Modules of the standard library that are used as modules only (`math.isclose`): imported here, not requested."""
    parents: dict[str, list[bool]] = {}
    attributes = {id(node.value) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                parents.setdefault(node.id, []).append(id(node) in attributes)
    return {name for name, uses in parents.items() if name in sys.stdlib_module_names and all(uses)}
