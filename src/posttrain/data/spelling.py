"""The same conversation, spelled as a chat template wants it: arguments of calls as a mapping or as JSON text, content
as text or as blocks.

Templates differ, and none says what it wants, so each is asked once, with a stand-in conversation: the first spelling
whose parts all stand in what it writes, as JSON and not as Python's repr, is its own. The data's spelling comes first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import jinja2

from posttrain.data.messages import thought_of
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSALS = (jinja2.TemplateError, ValueError, TypeError, KeyError)  # what a template raises that does not like a conversation
_CALL_ID = "call00000"  # nine letters and digits, as Mistral's templates want
_ASK: Message = {"role": "user", "content": "XaskX"}
_TOOL = {
    "name": "XtoolX",
    "description": "XaboutX",
    "parameters": {"type": "object", "properties": {"XparX": {"type": "string", "description": "XparX"}}},
}
_WRAPPED = {"type": "function", "function": _TOOL}

_known: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()  # tokenizer -> what was found out about its templates


def remembered(tokenizer: PreTrainedTokenizerBase, key: Any, find: Callable[[], Any]) -> Any:
    """What `find` found out about the tokenizer's present chat template, once for each key."""
    template = tokenizer.chat_template
    known = _known.setdefault(tokenizer, {})
    key = (template if isinstance(template, str) else repr(template), key)
    if key not in known:
        known[key] = find()
    return known[key]


def spelled(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[Any] | None) -> tuple[list[Message], list[Any] | None]:
    """Plain messages and tools as the tokenizer's chat template wants them."""
    if tools:
        tools = [_tool(tokenizer, tool) for tool in tools]
    messages = [_with_calls(tokenizer, message) if message.get("tool_calls") else message for message in messages]
    messages = [_with_thought(message) for message in messages]
    if remembered(tokenizer, "blocks", lambda: _wants_blocks(tokenizer)):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m for m in messages]
    return messages, list(tools) if tools else None


def _with_thought(message: Message) -> Message:
    """A thought under every name that templates give it. Newer versions of transformers do the same."""
    thought = thought_of(message)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **kwargs: Any) -> str | None:
    """What the template writes; None where it refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except REFUSALS:
        return None


def _wants_blocks(tokenizer: PreTrainedTokenizerBase) -> bool:
    plain = _text(tokenizer, [_ASK])
    if plain is not None and "XaskX" in plain:
        return False
    blocks = _text(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "XaskX"}]}])
    return blocks is not None and "XaskX" in blocks and "'XaskX'" not in blocks


def _tool(tokenizer: PreTrainedTokenizerBase, tool: Any) -> Any:
    """A schema within {"type": "function", "function": ...}, or without, if that is how the template reads it."""
    if not isinstance(tool, Mapping):
        return tool
    is_bare = "function" not in tool and "name" in tool
    forms = (_TOOL, _WRAPPED) if is_bare else (_WRAPPED, _TOOL)

    def other_is_read() -> bool:
        texts = [_text(tokenizer, [_ASK], tools=[form]) for form in forms]
        given, other = (text is not None and "XtoolX" in text and "'XtoolX'" not in text for text in texts)
        return other and not given

    if not remembered(tokenizer, ("tool", is_bare), other_is_read):
        return tool
    return {"type": "function", "function": dict(tool)} if is_bare else tool.get("function", tool)


def _with_calls(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """A message of the assistant that calls tools. A content that says nothing may be null, empty or missing: they mean
    the same."""
    content = "missing" if "content" not in message else "null" if message["content"] is None else "empty" if message["content"] == "" else "text"
    as_text = all(isinstance(_function(call).get("arguments"), str) for call in message["tool_calls"])
    content, as_text = remembered(tokenizer, ("call", content, as_text), lambda: _wanted_call(tokenizer, content, as_text))
    made = {**message, "tool_calls": [_respelled(call, as_text) for call in message["tool_calls"]]}
    if content == "missing":
        made.pop("content", None)
    elif content != "text":
        made["content"] = None if content == "null" else ""
    return made


def _wanted_call(tokenizer: PreTrainedTokenizerBase, content: str, as_text: bool) -> tuple[str, bool]:
    """(content, whether arguments are text) as the template wants them; as they are given where no spelling is read."""
    contents = ["text"] if content == "text" else list(dict.fromkeys([content, "missing", "null", "empty"]))
    for wanted in (as_text, not as_text):
        for silence in contents:
            if _is_read(tokenizer, silence, wanted):
                return silence, wanted
    return content, as_text


def _is_read(tokenizer: PreTrainedTokenizerBase, content: str, as_text: bool) -> bool:
    arguments = '{"XargX": "XvalX"}' if as_text else {"XargX": "XvalX"}
    call: Message = {
        "role": "assistant",
        "tool_calls": [{"id": _CALL_ID, "type": "function", "function": {"name": "XtoolX", "arguments": arguments}}],
    }
    if content != "missing":
        call["content"] = {"null": None, "empty": "", "text": "XsayX"}[content]
    text = _text(tokenizer, [_ASK, call], tools=[_WRAPPED]) or _text(tokenizer, [_ASK, call])
    if text is None or not {"XtoolX", "XargX", "XvalX"} <= {part for part in ("XtoolX", "XargX", "XvalX") if part in text}:
        return False
    without = _text(tokenizer, [_ASK], tools=[_WRAPPED]) or _text(tokenizer, [_ASK]) or ""
    is_repr = "'XargX'" in text or '\\"XargX' in text  # of Python, or JSON within JSON
    return not is_repr and text.count("None") == without.count("None")


def _function(call: Any) -> Mapping[str, Any]:
    found = call.get("function", call) if isinstance(call, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _respelled(call: Any, as_text: bool) -> Any:
    arguments = _function(call).get("arguments")
    if as_text and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return call
        arguments = parsed if isinstance(parsed, dict) else arguments
    else:
        return call
    changed = {**_function(call), "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
