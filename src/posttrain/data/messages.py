"""Messages as people write them -> plain messages: text blocks joined, the nulls that tables pad with gone, and what is
no message refused.

Plain messages are what everything else works with. How a template wants them spelled is `spelling.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain.errors import UserError
from posttrain.types import Message

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names for what the assistant thought before it spoke
EXAMPLE = '{"role": "user", "content": "..."}'
# Keys by which other tools say which messages are trained. Ours is `weight`, as in OpenAI's files.
_OTHER_WEIGHTS = ("loss", "train", "trainable", "train_on", "loss_mask", "loss_weight", "mask", "masked")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Every message plain. Raises UserError, without a row, for content that is no text."""
    return [plain_message(message) for message in messages]


def plain_message(message: Mapping[str, Any]) -> Message:
    """`message` with its text blocks joined and without `weight` and keys that hold None; a content of None stays, for
    it means something to templates.

    An argument of a call that is null is an argument, and stays.
    """
    plain = {key: value for key, value in message.items() if key != "weight" and (value is not None or key == "content")}
    if "content" in plain:
        plain["content"] = text_of(plain["content"])
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def text_of(content: Any) -> str | None:
    """The text of a message's content: itself, or that of its text blocks, joined. None: it has none. Raises UserError
    for anything else."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"a message's content is a {type(content).__name__} ({content!r:.100}); it must be text, or a list of text blocks")
    for block in content:
        if not (isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str)):
            raise UserError(f'a message holds {block!r:.150}; only text can be trained on: {{"type": "text", "text": "..."}}')
    return "".join(block["text"] for block in content)


def thought_of(message: Mapping[str, Any]) -> Any:
    """What the assistant thought, under whichever name; None where nothing is given."""
    return next((message[name] for name in THOUGHTS if message.get(name) is not None), None)


def _plain_call(call: Any) -> Any:
    """A call without the padding around its arguments; within them null is a value."""
    if not isinstance(call, Mapping):
        return call
    plain = {key: value for key, value in call.items() if value is not None}
    if isinstance(plain.get("function"), Mapping):
        plain["function"] = {key: value for key, value in plain["function"].items() if value is not None or key == "arguments"}
    return plain


def plain_schema(schema: Any) -> Any:
    """A tool's schema without keys that hold None, which a table that holds several tools pads with. A default of null
    is a default, and stays."""
    if isinstance(schema, Mapping):
        return {key: plain_schema(value) for key, value in schema.items() if value is not None or key in ("default", "const")}
    return [plain_schema(value) for value in schema] if isinstance(schema, list) else schema


def check_message(message: Any, name: str, where: str) -> None:
    """Raises UserError, with `where` (the row), for what is no message of text. `name`: the column."""
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: a message is {EXAMPLE}, not {message!r}"[:300])
    if "from" in message and "value" in message:
        raise UserError(f"{where}: the messages of '{name}' have from/value; convert them with posttrain.data.convert.maybe_convert_to_chatml")
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a message of '{name}' is {dict(message)!r}"[:250] + f"; a message is {EXAMPLE}")
    try:
        content = text_of(message.get("content"))
    except UserError as error:
        raise UserError(f"{where}, column '{name}': {error}") from error
    calls = message.get("tool_calls")
    if content is None and not calls:
        raise UserError(f"{where}: the {message['role']}'s message in '{name}' has no text ({content!r}); a message is {EXAMPLE}")
    if calls and not (
        isinstance(calls, list) and all(isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls)
    ):
        raise UserError(
            f'{where}: the tool_calls of a message in \'{name}\' must be a list of {{"type": "function", "function": {{"name": ..., "arguments": {{}}}}}}'
        )
    _check_keys(message, name, where)


def _check_keys(message: Mapping[str, Any], name: str, where: str) -> None:
    for key in _OTHER_WEIGHTS:
        if message.get(key) is not None:
            raise UserError(
                f"{where}: a message of '{name}' has the key '{key}', which is not read: say which replies are trained with `weight` (0: not, 1: trained)"
            )
    if message.get("function_call") is not None:
        raise UserError(f'{where}: a message of \'{name}\' has a function_call; write it as tool_calls: [{{"type": "function", "function": ...}}]')
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise UserError(f"{where}: the weight of a message in '{name}' is {weight!r}; it is 1 (trained) or 0 (only read)")


def is_silenced(message: Mapping[str, Any]) -> bool:
    """Whether the message says that it is not to be trained: weight 0."""
    return message.get("weight") is not None and not message["weight"]


def check_encodable(text: str) -> None:
    """Raises UserError for text with a lone surrogate: half a character, as careless cutting of UTF-16 leaves it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds half a character ({text[error.start]!a} at place {error.start}), which no tokenizer takes; repair it, "
            "with text.encode('utf-8', 'replace').decode('utf-8') for example"
        ) from error


def texts_of(value: Any) -> Iterator[str]:
    """Every text within a value of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)
