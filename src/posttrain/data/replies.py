"""Completions of conversations as trainers want them: behind their prompt, without the prompt's own messages once
more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.formats import common_turns, kind_of
from posttrain.data.messages import is_silenced, plain_message, text_of
from posttrain.errors import UserError

REPLIES = ("completion", "chosen", "rejected")


def without_repetition(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with completions that do not begin with the messages of its prompt. A prompt of text that they say becomes
    those messages, in a pair all that both begin with.

    Rows of anything else are returned as they are; what is wrong with them is said where rows are checked.
    """
    replies = {name: row[name] for name in REPLIES if row.get(name) is not None}
    if not replies or any(kind_of(reply) != "messages" for reply in replies.values()):
        return dict(row)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = _asked(prompt, next(iter(replies.values())))
        if prompt and "chosen" in replies and "rejected" in replies:
            prompt = _shared(replies["chosen"], replies["rejected"], len(prompt))
    if not prompt or kind_of(prompt) != "messages" or not all(_begins_with(reply, prompt) for reply in replies.values()):
        return dict(row)
    return {**row, "prompt": list(prompt), **{name: list(reply[len(prompt) :]) for name, reply in replies.items()}}


def _asked(question: str, reply: Sequence[Any]) -> Sequence[Any] | None:
    """The messages at the beginning of `reply` up to a user's that says `question`; None where there are none."""
    for place, message in enumerate(reply):
        if message.get("role") == "user" and _said(message) == question.strip():
            return reply[: place + 1]
    return None


def _shared(chosen: Sequence[Any], rejected: Sequence[Any], least: int) -> Sequence[Any]:
    """At least the first `least` messages, and all that both begin with up to the last one that is not the
    assistant's."""
    turns = min(common_turns(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while turns > least and chosen[turns - 1].get("role") == "assistant":
        turns -= 1
    return chosen[: max(turns, least)]


def _said(message: Mapping[str, Any]) -> str | None:
    try:
        return (text_of(message.get("content")) or "").strip()
    except UserError:  # said where rows are checked
        return None


def _begins_with(reply: Sequence[Any], prompt: Sequence[Any]) -> bool:
    """Whether the prompt's messages stand before something else in the reply."""
    try:
        return len(reply) > len(prompt) and [*map(plain_message, reply[: len(prompt)])] == [*map(plain_message, prompt)]
    except UserError:  # said where rows are checked
        return False


def check_spoken_by_the_assistant(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a completion of preference data in which somebody else speaks: every token of it would be
    trained."""
    for name in REPLIES:
        if kind_of(row.get(name)) != "messages":
            continue
        for message in row[name]:
            if message["role"] != "assistant":
                raise UserError(
                    f"{where}: its {name} holds a message of '{message['role']}', which would be trained as if the assistant wrote it; "
                    "end the prompt with that message, and let the completion begin with the assistant's reply to it"
                )
            if is_silenced(message):
                raise UserError(f"{where}: a message of its {name} has weight 0, but all of a completion is compared; leave the row out")
