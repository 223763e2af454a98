"""What a trainer must know to play: how an episode is made of a task, which tools the template shows, and who answers
the policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.types import Env, Message, Prompt, Task


@dataclass(frozen=True)
class Environment:
    """`Environment(MyEnv)` for a class that is made of a task; `envs.tools.tools`, `envs.chat.chat` and the adapters
    make others."""

    make: Callable[[Task], Env]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, for the chat template
    role: str = "user"  # of the messages that answer the policy: user | tool
    call_format: str | None = None  # a name of envs.formats.FORMATS; None: found out from the chat template
    gives_reward: bool = False  # it reports a reward of its own (`completion.info["reward"]`)
    starts_with_prompt: bool = False  # `start` is the row's prompt, so that all of them can be checked before training


def as_messages(prompt: Prompt) -> list[Message]:
    """A text prompt is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
