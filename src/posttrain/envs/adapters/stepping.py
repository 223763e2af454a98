"""Objects with `reset` and `step`, as in Gymnasium and in OpenEnv: each turn of the policy is one action. Known by
their shape, not their class.

Gymnasium: reset(seed=...) -> (observation, info), step(action) -> (observation, reward, terminated, truncated, info).
OpenEnv:   reset() -> result, step(action) -> result, where a result has `observation`, `reward` and `done`.

`completion.info["reward"]` is the sum of the rewards of its steps. A turn in which no action can be found is answered with a
sentence and gives no reward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.envs.environment import Environment, as_messages
from posttrain.errors import UserError
from posttrain.types import Completion, Env, Message, Task

SEED = "seed"  # the column that is given to reset, where the row has one; else the number of the row
_WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Seen:
    """What both protocols say after a step."""

    observation: Any
    reward: float
    done: bool


def stepping(
    make: Callable[..., Any],
    *,
    action: Callable[[str], Any] | None = None,
    describe: Callable[[Any], str] = str,
) -> Environment:
    """An environment of the objects that `make(**columns)` returns (of a row's columns it is given those it names).

    action: the text of a turn -> what `step` takes; it raises ValueError with a sentence for the model. None: the last
    whole number in the text, which must be in the object's `action_space` where it has one. describe: an observation ->
    text. The first one follows the row's prompt.
    """
    return Environment(lambda task: Stepping(task, make(**_columns(make, task)), action, describe), gives_reward=True)


class Stepping(Env):
    """One episode. Reports `reward`, `steps` and `invalid_actions`."""

    def __init__(self, task: Task, world: Any, action: Callable[[str], Any] | None, describe: Callable[[Any], str]) -> None:
        for method in ("reset", "step"):
            if not callable(getattr(world, method, None)):
                raise UserError(f"{type(world).__name__} has no method {method}; a stepping environment has reset and step")
        self.task, self.world, self.describe = task, world, describe
        self.action = action or self._number
        self.reward, self.steps, self.invalid = 0.0, 0, 0

    def start(self) -> list[Message]:
        seed = self.task.columns.get(SEED, self.task.id)
        parameters = inspect.signature(self.world.reset).parameters.values()
        takes_seed = any(parameter.name == SEED or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        observation = _first(self.world.reset(seed=seed) if takes_seed else self.world.reset())
        messages = as_messages(self.task.prompt)
        if messages[-1]["role"] != "user":
            raise UserError(f"prompt {self.task.id} does not end with the user, who would say what the environment shows")
        messages[-1]["content"] = f"{messages[-1]['content']}\n{self.describe(observation)}"
        return messages

    def reply(self, completion: Completion) -> list[Message] | None:
        try:
            action = self.action(completion.text)
        except ValueError as error:
            self.invalid += 1
            return _said(f"No action: {error}")
        seen = _seen(self.world.step(action))
        self.steps += 1
        self.reward += seen.reward
        return None if seen.done else _said(self.describe(seen.observation))

    def finish(self, completion: Completion) -> None:
        completion.info |= {"reward": self.reward, "steps": float(self.steps), "invalid_actions": float(self.invalid)}
        if callable(getattr(self.world, "close", None)):
            self.world.close()

    def _number(self, text: str) -> Any:
        found = _WHOLE.findall(text[-1000:])
        if not found or len(found[-1]) > 18:
            raise ValueError("answer with the number of an action")
        space = getattr(self.world, "action_space", None)
        if space is not None and not space.contains(int(found[-1])):
            raise ValueError(f"{found[-1]} is not in {space}")
        return int(found[-1])


def _said(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _first(answer: Any) -> Any:
    """The observation in what reset answered."""
    return answer[0] if isinstance(answer, tuple) else getattr(answer, "observation", answer)


def _seen(answer: Any) -> Seen:
    if isinstance(answer, tuple):
        if len(answer) != 5:
            raise TypeError(f"step answered with {len(answer)} values; Gymnasium's has five: observation, reward, terminated, truncated, info")
        observation, reward, terminated, truncated, _ = answer
        return Seen(observation, float(reward), bool(terminated or truncated))
    return Seen(answer.observation, float(answer.reward or 0.0), bool(answer.done))


def _columns(make: Callable[..., Any], task: Task) -> dict[str, Any]:
    """Of the row's columns those that `make` names; all of them for **kwargs."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (ValueError, TypeError):  # a class written in C
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return task.columns
    return {parameter.name: task.columns[parameter.name] for parameter in parameters if parameter.name in task.columns}
