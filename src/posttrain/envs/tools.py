"""Tools: Python functions that the model may call. Their schema comes from signature and docstring, what they answer
goes back as messages.

Whatever goes wrong in a call (JSON that cannot be read, an unknown name, an exception, no answer in time) is told to
the model and counted; only a mistake of the programmer's, found before training, stops anything. A sync tool runs in a
thread of its own, several at once; coroutines share a loop, which is left behind when one blocks it.
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.envs.environment import Environment, as_messages
from posttrain.errors import UserError, did_you_mean
from posttrain.event_loops import Outcome, UserLoop, in_thread, within
from posttrain.types import Completion, Env, Message, Task

COROUTINES = UserLoop("posttrain-tools")  # where whatever is awaited of tools and their objects runs: what one opened, another can use
MAX_CALLS = 16  # answered in one turn: a hostile turn may hold hundreds
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip


class Tool:
    """A function with the schema that the model is shown. Raises UserError for one whose signature or docstring does
    not say enough."""

    def __init__(self, function: Callable[..., Any]) -> None:
        from transformers.utils import get_json_schema
        from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

        self.function = function
        name = getattr(function, "__name__", type(function).__name__)
        try:
            self.schema: dict[str, Any] = get_json_schema(function)
        except (DocstringParsingException, TypeHintParsingException, TypeError, AttributeError) as error:
            raise UserError(
                f"the tool {name} cannot be shown to a model: {error}. It needs a type for every parameter and a docstring such as\n"
                '"""What it does.\n\nArgs:\n    expression: What this parameter is.\n"""'
            ) from error
        described = self.schema["function"]
        self.name: str = described["name"]
        described.pop("return", None)  # what it answers, the model will see
        self.parameters: dict[str, Any] = described["parameters"]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the schema wants them; text that is JSON of the right type becomes that. Raises ValueError
        with a sentence for the model."""
        known, needed = self.parameters["properties"], self.parameters.get("required", [])
        for name in given:
            if name not in known:
                raise ValueError(f"{self.name} has no parameter '{name}'; it takes: {', '.join(known) or 'nothing'}")
        for name in needed:
            if name not in given:
                raise ValueError(f"{self.name} needs the parameter '{name}'")
        return {name: _typed(value, known[name], name) for name, value in given.items()}

    async def __call__(self, arguments: dict[str, Any], seconds: float) -> Outcome | None:
        """What it answers or raises; None when it takes longer than `seconds`."""
        call, started = functools.partial(self.function, **arguments), time.monotonic()
        if inspect.iscoroutinefunction(self.function):
            return await COROUTINES.run(call(), seconds)
        outcome = await within(in_thread(call), seconds)
        if outcome is None or not inspect.isawaitable(outcome[0]):
            return outcome
        return await COROUTINES.run(outcome[0], seconds - (time.monotonic() - started))


def tools(
    functions: Sequence[Callable[..., Any]], *, timeout: float = 30.0, max_result_chars: int = 4000, call_format: str | None = None
) -> Environment:
    """An environment in which the model may call `functions`; its first turn without a call ends the episode.

    timeout: seconds for one call. max_result_chars: longer answers are cut. Rewards find the calls in the messages of a
    completion.
    """
    made = tool_table(functions)
    return Environment(
        lambda task: ToolEnv(task, made, timeout, max_result_chars),
        tools=tuple(tool.schema for tool in made.values()),
        role="tool",
        call_format=call_format,
        starts_with_prompt=True,
    )


def tool_table(functions: Sequence[Callable[..., Any]]) -> dict[str, Tool]:
    if not isinstance(functions, Sequence):
        raise UserError(f"tools is {functions!r}; give a list of functions: tools=[calculator]")
    table: dict[str, Tool] = {}
    for function in functions:
        tool = Tool(function)
        if tool.name in table:
            raise UserError(f"two tools are called {tool.name}; give them different names")
        table[tool.name] = tool
    if not table:
        raise UserError("there are no tools: give at least one function")
    return table


class ToolEnv(Env):
    """One conversation with tools. Reports `tool_calls` and `tool_failures`, malformed calls included in both."""

    def __init__(self, task: Task, table: Mapping[str, Tool], timeout: float, max_result_chars: int) -> None:
        self.task, self.table = task, table
        self.timeout, self.max_result_chars = timeout, max_result_chars
        self.calls = self.failures = 0

    def start(self) -> list[Message]:
        return as_messages(self.task.prompt)

    async def reply(self, completion: Completion) -> list[Message] | None:
        assert completion.messages is not None
        said = completion.messages[-1]
        calls, malformed = said.get("tool_calls", []), said.get("malformed_calls", [])
        if not calls and not malformed:
            return None
        answers = [await self._answer(call["function"], call["id"]) for call in calls[:MAX_CALLS]]
        answers += [
            self._failed(f"{sentence}; nothing was called", "unknown", f"call{900 + n:05d}") for n, sentence in enumerate(malformed[:MAX_CALLS])
        ]
        left_out = max(len(calls) - MAX_CALLS, 0)
        if left_out:
            answers.append(self._failed(f"{left_out} further calls of this turn were not made: at most {MAX_CALLS} at once", "unknown", "call99999"))
        return answers

    def finish(self, completion: Completion) -> None:
        completion.info |= {"tool_calls": float(self.calls), "tool_failures": float(self.failures)}

    async def _answer(self, function: Mapping[str, Any], id: str) -> Message:
        name = function["name"]
        if name not in self.table:
            return self._failed(
                f"there is no tool '{name[:80]}'; there are: {', '.join(self.table)}.{did_you_mean(name[:80], self.table)}", name[:80], id
            )
        tool = self.table[name]
        try:
            outcome = await tool(tool.arguments(function["arguments"]), self.timeout)
            if outcome is None:
                return self._failed(f"{name} did not answer within {self.timeout:g} seconds", name, id)
            result, error = outcome
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, SystemExit) as raised:
            error = raised
        if error is not None:  # the model's to deal with, whatever it is
            return self._failed(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", name, id)
        self.calls += 1
        return self._message(content, name, id)

    def _failed(self, sentence: str, name: str, id: str) -> Message:
        self.calls += 1
        self.failures += 1
        return self._message(f"error: {sentence}", name, id)

    def _message(self, content: str, name: str, id: str) -> Message:
        if len(content) > self.max_result_chars:
            content = content[: self.max_result_chars] + " [cut]"
        return {"role": "tool", "name": name, "tool_call_id": id, "content": content}


def _typed(value: Any, schema: Mapping[str, Any], name: str) -> Any:
    wanted = schema.get("type")
    if wanted is None:  # a schema of alternatives
        return value
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    if isinstance(value, str) and "string" not in kinds:
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"the parameter '{name}' must be of type {' or '.join(kinds)}, not the text {value[:40]!r}") from None
    fits = any(isinstance(value, JSON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds if kind in JSON_TYPES)
    if not fits and not (value is None and schema.get("nullable")):
        raise ValueError(f"the parameter '{name}' must be of type {' or '.join(kinds)}, not {json.dumps(value)[:40]}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"the parameter '{name}' must be one of {', '.join(map(str, schema['enum']))}")
    return value
