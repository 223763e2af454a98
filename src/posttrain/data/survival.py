"""Whether what a row gives to the chat template stands in what the template writes. One check for content, thoughts,
calls, names and tools.

Every part gets a mark of its own, and the conversation is rendered once more: a part whose mark is missing was dropped.
What a template drops depends on the shape of a conversation (who speaks, with which keys), so each shape is asked about
once and the answer is kept.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta

from posttrain.data.messages import THOUGHTS
from posttrain.data.spelling import REFUSALS, remembered, spelled
from posttrain.errors import UserError, did_you_mean
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_OWN = ("role", "content", "tool_calls", "tool_call_id", "name", *THOUGHTS)
# Keywords of apply_chat_template itself; and `tools`, which is marked.
_TRANSFORMERS_OWN = ("add_generation_prompt", "continue_final_message", "chat_template", "tools", "documents")
_ANOTHER = "or use another template (tokenizer.chat_template; chat_template_path in SFT)"
_ADVICE = {
    "content": f"write the text where the template reads it, {_ANOTHER}",
    "thought": f"write a thought into the content, as the model does (<think>...</think>), {_ANOTHER}",
    "call": f"write the call into the content as the model would, {_ANOTHER}",
    "name": "write the name into the content, or remove the key",
    "tools": f"describe the tools in a system message and remove the column, {_ANOTHER}",
}


@dataclass(frozen=True)
class GivenPart:
    """Something that a conversation gives to the template."""

    kind: str  # a key of _ADVICE, or "other"
    what: str  # for the sentence
    message: int | None = None  # None: tools
    key: str = ""
    place: int = 0  # of a call or a tool


def check_survives(tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: Mapping[str, Any]) -> None:
    """Raises UserError for plain messages, or `tools` and other keywords of the template among `kwargs`, that the
    template does not write."""
    problem = remembered(tokenizer, ("survives", _shape(messages, kwargs)), lambda: _problem(tokenizer, messages, kwargs))
    if problem is not None:
        raise UserError(problem)


def _shape(messages: list[Message], kwargs: Mapping[str, Any]) -> Any:
    """All that decides what a template drops: equal shapes are treated equally."""
    forms = frozenset("function" in tool for tool in kwargs.get("tools") or ())
    given = tuple((name, repr(value)) for name, value in sorted(kwargs.items()) if name != "tools")
    return forms, given, tuple(_shape_of(message) for message in messages)


def _shape_of(message: Message) -> Any:
    content = message.get("content")
    tags = ("<think" in content, "</think" in content, not content.strip()) if isinstance(content, str) else content is None
    calls = tuple(isinstance(call.get("function", call).get("arguments"), str) for call in message.get("tool_calls") or ())
    return message["role"], tags, calls, tuple(sorted(key for key, value in message.items() if value))


def _problem(tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: Mapping[str, Any]) -> str | None:
    if (unread := _unread_keyword(tokenizer, kwargs)) is not None:
        return unread
    parts = list(_parts(messages, kwargs.get("tools") or ()))
    missing = set(parts) - _written(tokenizer, messages, kwargs, parts)
    last_question = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for part in parts:
        if part not in missing:
            continue
        if part.kind == "other":
            _say_once(tokenizer, part.key)
        elif not (part.kind == "thought" and part.message is not None and part.message < last_question and _knows_thoughts(tokenizer)):
            return f"the model's chat template drops {part.what}, so the model would never see it: {_ADVICE[part.kind]}"
    return None


def _parts(messages: list[Message], tools: Any) -> Iterator[GivenPart]:
    for place, message in enumerate(messages):
        of = f"of message {place} ({message['role']})"
        if isinstance(message.get("content"), str) and message["content"].strip():
            yield GivenPart("content", f"the content {of}", place, "content")
        thought = next((name for name in THOUGHTS if isinstance(message.get(name), str) and message[name].strip()), None)
        if thought is not None:
            yield GivenPart("thought", f"the thought ({thought}) {of}", place, thought)
        for number in range(len(message.get("tool_calls") or ())):
            yield GivenPart("call", f"the name of a tool call (tool_calls) {of}", place, "name", number)
            yield GivenPart("call", f"the arguments of a tool call (tool_calls) {of}", place, "arguments", number)
        if message.get("name") and message["role"] != "tool":  # which tool answers, its call says
            yield GivenPart("name", f"the name {of}", place, "name")
        for key, value in message.items():
            if key not in _OWN and value not in (None, "", [], {}):
                yield GivenPart("other", f"the key '{key}' {of}", place, key)
    for number, tool in enumerate(tools):
        if isinstance(tool, Mapping):
            yield GivenPart("tools", "the tools of the row", None, "name", number)


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: Mapping[str, Any], parts: list[GivenPart]) -> set[GivenPart]:
    """The parts whose marks stand in what the template writes. A part that it refuses when it is marked is one that it
    reads."""
    marks = {part: f"Zq{number}qZ" for number, part in enumerate(parts)}
    text = _rendered(tokenizer, messages, kwargs, marks)
    if text is not None:
        return {part for part, mark in marks.items() if mark in text or mark.lower() in text.lower()}
    alone = {part: _rendered(tokenizer, messages, kwargs, {part: mark}) for part, mark in marks.items()}
    return {part for part, text in alone.items() if text is None or marks[part].lower() in text.lower()}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: Mapping[str, Any], marks: Mapping[GivenPart, str]) -> str | None:
    messages, tools = [dict(message) for message in messages], list(kwargs.get("tools") or ())
    for part, mark in marks.items():
        if part.message is None:
            tools[part.place] = _marked_tool(tools[part.place], mark)
        elif part.kind == "call":
            calls = list(messages[part.message]["tool_calls"])
            calls[part.place] = _marked_call(calls[part.place], part.key, mark)
            messages[part.message]["tool_calls"] = calls
        else:
            old = messages[part.message][part.key]
            messages[part.message][part.key] = f"{old} {mark}" if isinstance(old, str) else mark
    messages, spelled_tools = spelled(tokenizer, messages, tools)
    try:
        given = {**kwargs, "tools": spelled_tools} if tools else dict(kwargs)
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
    except REFUSALS:
        return None


def _marked_tool(tool: Mapping[str, Any], mark: str) -> dict[str, Any]:
    inner = tool.get("function", tool)
    changed = {**inner, "name": f"{inner.get('name', '')}{mark}"} if isinstance(inner, Mapping) else inner
    return {**tool, "function": changed} if "function" in tool else dict(changed)


def _marked_call(call: Mapping[str, Any], key: str, mark: str) -> dict[str, Any]:
    inner = dict(call.get("function", call))
    inner[key] = f"{inner.get(key, '')}{mark}" if key == "name" else _marked_arguments(inner.get(key), mark)
    return {**call, "function": inner} if "function" in call else inner


def _marked_arguments(arguments: Any, mark: str) -> Any:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return f"{arguments}{mark}"
        return json.dumps({**parsed, mark: mark}, ensure_ascii=False) if isinstance(parsed, dict) else f"{arguments}{mark}"
    return {**arguments, mark: mark} if isinstance(arguments, Mapping) else {mark: mark}


def _knows_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the thought of a last reply. Then it is its way to drop those before an earlier
    question."""
    asked: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "z"}]
    thought = GivenPart("thought", "", 1, "reasoning_content")
    return bool(remembered(tokenizer, "thoughts", lambda: bool(_written(tokenizer, asked, {}, [thought]))))


def _unread_keyword(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str | None:
    """The sentence for a keyword that the template does not mention; None where it reads all of them, or cannot be
    looked into."""
    template = tokenizer.chat_template
    if not isinstance(template, str):  # a table of several, from which the tokenizer chooses
        return None
    named = remembered(tokenizer, "keywords", lambda: _keywords(template))
    for name in kwargs:
        if named and name not in named and name not in _TRANSFORMERS_OWN:
            near = did_you_mean(name, named)
            return f"the model's chat template does not read the keyword '{name}', so it would change nothing; remove it from chat_template_kwargs.{near}"
    return None


def _keywords(template: str) -> set[str]:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # parsed only, never rendered
    without_marks = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(without_marks))
    except jinja2.TemplateError:  # rendering says what is wrong with it
        return set()


def _say_once(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    def say() -> bool:
        logger.warning("messages have the key '%s', which the chat template does not write: it is not read", key)
        return True

    remembered(tokenizer, ("said", key), say)
