"""Environments of the verifiers library (0.1): its rows, its turns, its rubric. Version 0.2 and later run models
through servers of their own.

Used are its documented parts: `get_dataset`, `setup_state`, `env_response`, `is_completed`, and the rubric's functions
with their weights. A function that raises is an error here, where the library would make it a 0.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.envs.environment import Environment
from posttrain.errors import UserError
from posttrain.types import Completion, Env, Message, Task

_ROW = ("answer", "info", "task", "example_id")


def verifiers_rows(env: Any, size: int = -1) -> list[dict[str, Any]]:
    """The training rows of `vf.load_environment(...)`: `prompt` as messages, `answer`, `info` and whatever else they
    have."""
    return [{**row, "prompt": [_plain(message) for message in row["prompt"]]} for row in env.get_dataset(size)]


def verifiers_environment(env: Any) -> Environment:
    """Its turns and its rubric, whose weighted total is the environment's reward. Raises UserError for rewards of
    whole groups and for tools."""
    functions = list(_functions(env.rubric))
    if not functions:
        raise UserError(f"{type(env).__name__} has a rubric without functions, so no reward would be given")
    for function, _, _ in functions:
        plural = {"states", "completions", "prompts"} & set(inspect.signature(function).parameters)
        if plural:
            raise UserError(f"{function.__name__} scores whole groups ({', '.join(plural)}); write it as a reward of this library's")
    if getattr(env, "tool_defs", None):
        raise UserError(f"{type(env).__name__} has tools of its own; give the functions to this library: tools=[...]")
    return Environment(lambda task: VerifiersEnv(task, env), gives_reward=True)


class VerifiersEnv(Env):
    """One rollout of `env`. Its state is a mapping with the library's keys."""

    def __init__(self, task: Task, env: Any) -> None:
        if isinstance(task.prompt, str):
            raise UserError("the rows of a verifiers environment have messages as prompts: make them with verifiers_rows(env)")
        self.env = env
        self.prompt = [_plain(message) for message in task.prompt]
        row = {name: task.columns[name] for name in _ROW if name in task.columns}
        if isinstance(row.get("info"), str):
            row["info"] = json.loads(row["info"])
        self.state: dict[str, Any] = {"answer": "", "info": {}, "task": "default"} | row
        self.state |= {"prompt": self.prompt, "completion": [], "trajectory": [], "turn": 0, "responses": [], "error": None, "is_completed": False}
        self.is_set_up = False

    def start(self) -> list[Message]:
        return self.prompt

    async def reply(self, completion: Completion) -> list[Message] | None:
        if not hasattr(self.env, "env_response"):  # a question and its answer
            return None
        await self._set_up()
        self._hear(completion)
        if await _awaited(self.env.is_completed(self.state)):
            return None
        answer = await _awaited(self.env.env_response([*self.prompt, *self.state["completion"]], self.state))
        if isinstance(answer, tuple):  # older ones answer with messages and state
            answer, self.state = answer
        if await _awaited(self.env.is_completed(self.state)):
            return None
        return [_plain(message) for message in ([{"role": "user", "content": answer}] if isinstance(answer, str) else answer)]

    async def finish(self, completion: Completion) -> None:
        if not completion.turns:  # nothing was said that the rubric could read
            return
        await self._set_up()
        self._hear(completion)
        total = 0.0
        for function, weight, objects in _functions(self.env.rubric):
            score = float(await _awaited(function(**_wanted(function, self._offered(objects)))))
            completion.info[function.__name__] = score
            total += weight * score
        completion.info["reward"] = total

    async def _set_up(self) -> None:
        """Before anything reads the state, and once. A first turn that was cut is never replied to, but it is
        scored."""
        if not self.is_set_up and hasattr(self.env, "setup_state"):  # a question and its answer may have none
            self.is_set_up = True
            self.state = await _awaited(self.env.setup_state(self.state)) or self.state

    def _hear(self, completion: Completion) -> None:
        said = list(completion.messages or [])
        turns = [place for place, message in enumerate(said) if message["role"] == "assistant"]
        self.state["completion"] = said
        self.state["turn"] = len(turns)
        self.state["trajectory"] = [{"prompt": [*self.prompt, *said[:place]], "completion": [said[place]]} for place in turns]

    def _offered(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        named = {name: self.state[name] for name in ("prompt", "completion", "answer", "info", "task")}
        return {**named, "state": self.state, **objects}


def _functions(rubric: Any) -> Iterator[tuple[Any, float, Mapping[str, Any]]]:
    """(function, weight, objects such as the parser) of a rubric, and of those that it groups."""
    if hasattr(rubric, "rubrics"):
        for part in rubric.rubrics:
            yield from _functions(part)
        return
    for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
        yield function, weight, rubric.class_objects


def _wanted(function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _plain(message: Any) -> Message:
    """A message as a mapping: newer versions have classes for them."""
    return dict(message) if isinstance(message, Mapping) else message.model_dump(exclude_none=True)
