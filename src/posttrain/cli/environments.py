"""The recipe's section `env`: what answers the policy between its turns. Reading, and making the Environment from it.

env: {kind: tools, tools: [my_tools.py:calculator], max_turns: 4}
env: {kind: chat, name: my_game.py:answer}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.cli.values import nearest
from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.envs import Environment


@dataclass
class EnvSection:
    kind: str = "single"  # single | tools | chat | factory | stepping | own
    tools: list = field(default_factory=list)  # with tools: functions the model may call, as file.py:function
    name: str | None = None  # of the other kinds: file.py:thing, the function that answers, or the class of the environment
    max_turns: int | None = None  # how often the policy may speak; None: as often as fits
    max_turn_tokens: int | None = None  # tokens of one turn; None: what is left of max_completion_length
    timeout: float | None = None  # with tools, factory: seconds that one call of a tool may take; None: 30
    call_format: str | None = None  # with tools: how the model writes calls; None: found out from its chat template

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"env.kind: {self.kind} is not known; use one of {', '.join(KINDS)}.{nearest(self.kind, KINDS)}")
        if (self.kind == "tools") != bool(self.tools):
            raise UserError("env.tools and env.kind: tools belong together, as in {kind: tools, tools: [my_tools.py:calculator]}")
        if (self.kind in _NAMED) != (self.name is not None):
            raise UserError(f"env.name belongs to the kinds {', '.join(_NAMED)}, as in {{kind: chat, name: my_game.py:answer}}")
        for setting, kinds in _ONLY_WITH.items():
            if getattr(self, setting) is not None and self.kind not in kinds:
                raise UserError(f"env.{setting} belongs to the kinds {', '.join(kinds)}, and the kind is {self.kind}; leave it out")

    def settings(self) -> dict[str, int]:
        """What of it is the trainer's."""
        limits = {"max_turns": self.max_turns, "max_turn_tokens": self.max_turn_tokens}
        return {name: value for name, value in limits.items() if value is not None}

    def make(self) -> Environment | None:
        """The environment; None where an episode is one question with one answer. Imports the files that it names."""
        return KINDS[self.kind](self)


def _tools(section: EnvSection) -> Environment:
    from posttrain.envs.tools import tools

    return tools([_loaded(name) for name in section.tools], call_format=section.call_format, **_timeout(section))


def _chat(section: EnvSection) -> Environment:
    from posttrain.envs.chat import chat

    return chat(_loaded(section.name))


def _factory(section: EnvSection) -> Environment:
    from posttrain.envs.methods import factory

    return factory(_loaded(section.name), **_timeout(section))


def _timeout(section: EnvSection) -> dict[str, Any]:
    return {} if section.timeout is None else {"timeout": section.timeout}


def _stepping(section: EnvSection) -> Environment:
    from posttrain.envs.adapters.stepping import stepping

    return stepping(_loaded(section.name))


def _own(section: EnvSection) -> Environment:
    """What makes an Env of a task."""
    from posttrain.envs import Environment

    return Environment(_loaded(section.name))


def _loaded(name: str | None) -> Callable[..., Any]:
    from posttrain.rewards.loading import load_function

    assert name is not None
    if ":" not in name:
        raise UserError(f"env: '{name}' names no function; write file.py:function")
    return load_function(name)


_NAMED = ("chat", "factory", "stepping", "own")
KINDS: dict[str, Callable[[EnvSection], Environment | None]] = {
    "single": lambda section: None,
    "tools": _tools,
    "chat": _chat,  # a function answers in the user's place
    "factory": _factory,  # an object whose methods are tools
    "stepping": _stepping,  # reset and step, as in Gymnasium and OpenEnv
    "own": _own,  # a class with start and reply
}
_SEVERAL_TURNS = tuple(kind for kind in KINDS if kind != "single")
_ONLY_WITH = {"timeout": ("tools", "factory"), "call_format": ("tools",), "max_turns": _SEVERAL_TURNS, "max_turn_tokens": _SEVERAL_TURNS}
