"""An object whose public methods are the tools, as in TRL's `environment_factory`: one object an episode, so that it
can hold state.

`reset(**columns)` prepares it and may answer with text, which follows the last user message. `get_reward()`, if there
is one, gives the reward at the end (None: nothing can be said), and `close()` is called then. TRL uses one object for many
episodes; here each has its own, and `reset` is called once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from posttrain.envs.environment import Environment, as_messages
from posttrain.envs.tools import COROUTINES, ToolEnv, tool_table
from posttrain.errors import UserError
from posttrain.event_loops import settled
from posttrain.types import Completion, Message, Task

_NOT_TOOLS = ("reset", "get_reward", "close")


def factory(make: Callable[[], Any], *, timeout: float = 30.0, max_result_chars: int = 4000) -> Environment:
    """An environment of the objects that `make()` returns. Raises UserError where they have no `reset` or no method
    that could be a tool."""
    if not callable(make):
        raise UserError(f"environment_factory is {make!r}; give a class, or a function without arguments, that makes one environment")
    sample = make()
    if not callable(getattr(sample, "reset", None)):
        raise UserError(f"{type(sample).__name__} has no method reset(**columns); an environment's object is prepared by it for its row")
    methods = _methods(sample)
    if not methods:
        raise UserError(f"{type(sample).__name__} has no public method but reset and get_reward; its other public methods are the model's tools")
    gives_reward = callable(getattr(sample, "get_reward", None))
    for error in settled([_close(sample)]):
        if isinstance(error, Exception):
            raise error
    return Environment(
        lambda task: ObjectEnv(task, make(), timeout, max_result_chars),
        tools=tuple(tool.schema for tool in tool_table(methods).values()),
        role="tool",
        gives_reward=gives_reward,
    )


def _methods(instance: Any) -> list[Callable[..., Any]]:
    return [method for name, method in inspect.getmembers(instance, inspect.ismethod) if not name.startswith("_") and name not in _NOT_TOOLS]


class ObjectEnv(ToolEnv):
    """One episode with one object."""

    def __init__(self, task: Task, instance: Any, timeout: float, max_result_chars: int) -> None:
        super().__init__(task, tool_table(_methods(instance)), timeout, max_result_chars)
        self.instance = instance

    def start(self) -> list[Message]:
        messages = as_messages(self.task.prompt)
        said = self.instance.reset(prompt=self.task.prompt, **self.task.columns)
        if said is None:
            return messages
        if not isinstance(said, str):
            raise UserError(
                f"reset of {type(self.instance).__name__} answered with {str(said)[:60]!r}; it is a plain function that answers with text or None"
            )
        if messages[-1]["role"] != "user":
            raise UserError(
                f"reset of {type(self.instance).__name__} answered with text, but prompt {self.task.id} does not end with the user to say it"
            )
        messages[-1]["content"] = f"{messages[-1]['content']}{said}"
        return messages

    async def finish(self, completion: Completion) -> None:  # type: ignore[override]
        super().finish(completion)
        try:
            if completion.turns and callable(getattr(self.instance, "get_reward", None)):
                reward = await _awaited(self.instance.get_reward())
                if reward is not None:
                    completion.info["reward"] = float(reward)
        finally:
            await _close(self.instance)


async def _close(instance: Any) -> None:
    if callable(getattr(instance, "close", None)):
        await _awaited(instance.close())


async def _awaited(value: Any) -> Any:
    """Where the object's tools are awaited too: a session that one of them opened belongs to that loop."""
    if not inspect.isawaitable(value):
        return value
    outcome = await COROUTINES.run(value, None)
    assert outcome is not None, "without a limit nothing is late"
    result, error = outcome
    if error is not None:
        raise error
    return result
