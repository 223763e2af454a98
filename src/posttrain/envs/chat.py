"""A conversation of several turns: a Python function speaks for the other side.

`respond(messages, **columns)` is given the whole conversation so far and the columns of the row that it names. It
answers with text (said by the user), with messages, or with None: the conversation is over. It may be a coroutine
function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from posttrain.envs.environment import Environment, as_messages
from posttrain.errors import UserError, did_you_mean
from posttrain.types import Completion, Env, Message, Task


def chat(respond: Callable[..., Any]) -> Environment:
    """An environment in which `respond` answers the policy. Raises UserError for a function that takes no
    `messages`."""
    parameters = inspect.signature(respond).parameters
    if "messages" not in parameters:
        raise UserError(f"{_name(respond)} takes ({', '.join(parameters)}); it must take `messages`, and then any columns of the data")
    return Environment(lambda task: Chat(task, respond), starts_with_prompt=True)


class Chat(Env):
    """One conversation."""

    def __init__(self, task: Task, respond: Callable[..., Any]) -> None:
        self.respond = respond
        self.opening = as_messages(task.prompt)
        self.columns = _columns(respond, task)

    def start(self) -> list[Message]:
        return self.opening

    async def reply(self, completion: Completion) -> list[Message] | None:
        answer = self.respond([*self.opening, *(completion.messages or [])], **self.columns)
        if inspect.isawaitable(answer):
            answer = await answer
        return [{"role": "user", "content": answer}] if isinstance(answer, str) else answer


def _columns(respond: Callable[..., Any], task: Task) -> dict[str, Any]:
    parameters = [p for p in inspect.signature(respond).parameters.values() if p.name != "messages"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return task.columns
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in task.columns:
            known = ", ".join(task.columns) or "no columns"
            near = did_you_mean(parameter.name, task.columns)
            raise UserError(f"{_name(respond)} asks for the column '{parameter.name}'; the data has: {known}.{near}")
    return {p.name: task.columns[p.name] for p in parameters if p.name in task.columns}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
