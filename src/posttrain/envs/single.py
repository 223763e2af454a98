"""One question, one answer: what every episode is when nobody says otherwise. To build upon: override what differs."""

from __future__ import annotations

from posttrain.types import Completion, Env, Message, Prompt, Task


class Single(Env):
    """The row's prompt, and no reply."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def start(self) -> Prompt:
        return self.task.prompt

    def reply(self, completion: Completion) -> list[Message] | None:
        return None
