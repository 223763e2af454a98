"""How models write tool calls: a table of formats, and the way to find a model's own by rendering one call with its
chat template.

A completion is hostile text: whatever it holds, parsing answers with a message, the calls that could be read, and a
sentence for each that could not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from posttrain.characters import encodable
from posttrain.errors import UserError, did_you_mean
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parse = Callable[[str], Message]
Read = Iterator[tuple[Any, Any]]  # (name, arguments) of a call; ValueError ends the reading of one piece


@dataclass(frozen=True)
class CallFormat:
    """`mark` stands in a rendered call. `pieces` cuts a turn into its content and the texts of its calls; `read` reads
    such a text."""

    mark: str
    pieces: Callable[[str], tuple[str, list[str]]]
    read: Callable[[str], Read]

    def parse(self, text: str) -> Message:
        content, pieces = self.pieces(text)
        calls: list[dict[str, Any]] = []
        malformed: list[str] = []
        for piece in pieces:
            try:
                for name, arguments in self.read(piece):
                    calls.append(_call(len(calls), name, arguments))
            except (ValueError, RecursionError) as error:
                malformed.append(str(error)[:300])
        return as_message(content, calls, malformed)


def as_message(content: str, calls: list[dict[str, Any]], malformed: list[str]) -> Message:
    message: Message = {"content": content.strip()}
    return message | ({"tool_calls": calls} if calls else {}) | ({"malformed_calls": malformed} if malformed else {})


def _call(number: int, name: Any, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError('a tool call needs a "name" (text) and "arguments" (an object)')
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": encodable(name), "arguments": _encodable(arguments)}}


def _encodable(value: Any) -> Any:
    """With every text within it, keys included: JSON can write half a surrogate pair in plain ASCII."""
    if isinstance(value, dict):
        return {encodable(key): _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_encodable(inner) for inner in value]
    return encodable(value) if isinstance(value, str) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the tool call is not valid JSON: {error.msg} at character {error.pos}") from None


# Cutting a turn


def _between(opening: str, closing: str) -> Callable[[str], tuple[str, list[str]]]:
    """Calls stand between two marks; an opening that is never closed makes a piece of its own."""

    def pieces(text: str) -> tuple[str, list[str]]:
        head, *rest = text.split(opening)
        content, found = head, []
        for part in rest:
            piece, closed, tail = part.partition(closing)
            found.append(piece if closed else f"{_UNCLOSED}{opening} is not closed by {closing}")
            content += tail
        return content, found

    return pieces


_UNCLOSED = "\0"  # in front of what is a complaint and no call


def _after(mark: str) -> Callable[[str], tuple[str, list[str]]]:
    """Calls stand behind a mark, up to the next one or the end."""

    def pieces(text: str) -> tuple[str, list[str]]:
        content, *found = text.split(mark)
        return content, found

    return pieces


def _bare(text: str) -> tuple[str, list[str]]:
    """The whole turn is a call, or none of it is: JSON (perhaps after Llama's python tag, or in a fence) that begins
    like a call."""
    bare = text.strip().removeprefix("<|python_tag|>").strip()
    if len(bare) >= 6 and bare.startswith("```") and bare.endswith("```"):  # no pattern: white space within would take it cubic time
        bare = bare[3:-3].removeprefix("json").strip()
    is_call = text.lstrip().startswith("<|python_tag|>") or re.match(r'[\[{]\s*(?:\{\s*)?"(name|type|function|parameters|arguments)"', bare)
    return ("", [bare]) if is_call else (text, [])


# Reading a call


def _read_json(piece: str) -> Read:
    """{"name": ..., "arguments" or "parameters": {...}}, or a list of them. Several may follow each other, with a
    semicolon between."""
    _refuse_unclosed(piece)
    decoder, place = json.JSONDecoder(), 0
    piece = piece.strip()
    if not piece:
        raise ValueError("the tool call is empty")
    while place < len(piece):
        try:
            value, place = decoder.raw_decode(piece, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"the tool call is not valid JSON: {error.msg} at character {error.pos}") from None
        while place < len(piece) and piece[place] in "; \n\t\r":
            place += 1
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict):
                raise ValueError('a tool call is a JSON object {"name": ..., "arguments": {...}}')
            function = call["function"] if isinstance(call.get("function"), dict) else call
            yield function.get("name"), function.get("arguments", function.get("parameters", {}))


def _refuse_unclosed(piece: str) -> None:
    if piece.startswith(_UNCLOSED):
        raise ValueError(f"the tool call is cut: {piece[len(_UNCLOSED) :]}")


_FUNCTION = re.compile(r"\s*<function=([^<>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _read_xml(piece: str) -> Read:
    """<function=name><parameter=key>value</parameter>...</function>; values are text, made what the schema says by the
    tool."""
    _refuse_unclosed(piece)
    whole = _FUNCTION.fullmatch(piece)
    if whole is None:
        raise ValueError("a tool call is written <function=name>...</function>")
    yield whole[1], dict(_fields(_PARAMETER, whole[2]))


_KEY = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def _read_keys(piece: str) -> Read:
    """name, then <arg_key>key</arg_key><arg_value>value</arg_value>..."""
    _refuse_unclosed(piece)
    name, mark, rest = piece.partition("<arg_key>")
    yield name.strip(), dict(_fields(_KEY, mark + rest))


def _fields(pattern: re.Pattern[str], text: str) -> Iterable[tuple[str, str]]:
    place = 0
    while place < len(text) and text[place:].strip():
        found = pattern.match(text, place)
        if found is None:
            raise ValueError(f"the tool call's arguments cannot be read from {text[place : place + 40]!r} on")
        yield found[1], found[2]
        place = found.end()


def _read_mistral(piece: str) -> Read:
    """A JSON list of calls, or (since 2025) name[ARGS]{...} with an optional [CALL_ID]."""
    name, mark, arguments = piece.partition("[ARGS]")
    if not mark:
        yield from _read_json(piece)
        return
    yield name.partition("[CALL_ID]")[0].strip(), arguments.strip()


# In the order in which they are looked for: the first whose mark a rendered call holds.
FORMATS: dict[str, CallFormat] = {
    "xml": CallFormat("<function=", _between("<tool_call>", "</tool_call>"), _read_xml),  # Qwen3-Coder, Qwen3.5
    "glm": CallFormat("<arg_key>", _between("<tool_call>", "</tool_call>"), _read_keys),
    "hermes": CallFormat("<tool_call>", _between("<tool_call>", "</tool_call>"), _read_json),  # Qwen2.5, Qwen3, SmolLM3
    "mistral": CallFormat("[TOOL_CALLS]", _after("[TOOL_CALLS]"), _read_mistral),
    "plain": CallFormat('"name"', _bare, _read_json),  # Llama 3, and models told to answer in JSON
}


def find_parser(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> Parse:
    """The parser of the model's own calls. `wanted`: a name of FORMATS. Raises UserError for a model whose template
    knows no tools."""
    if wanted is not None:
        if wanted not in FORMATS:
            raise UserError(f"there is no tool call format '{wanted}'; there are: {', '.join(FORMATS)}.{did_you_mean(wanted, FORMATS)}")
        return FORMATS[wanted].parse
    if tokenizer.response_template is not None:
        return _own_parser(tokenizer)
    rendered = _rendered_call(tokenizer)
    for call_format in FORMATS.values():
        if call_format.mark in rendered:
            return call_format.parse
    raise UserError(
        "the model's chat template writes no tool calls in a known format; say how the model writes them with the setting call_format "
        f"({', '.join(FORMATS)}) and show it the tools in the prompt, or use a model that was trained with tools"
    )


_PROBE = "probe_of_calls"


def _rendered_call(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes for one call, from the end of the question on; empty where it writes none."""
    question: Message = {"role": "user", "content": "x"}
    function = {"name": _PROBE, "arguments": {"key": "value"}}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", "type": "function", "function": function}]}
    try:
        before = str(tokenizer.apply_chat_template([question], tokenize=False))
        whole = str(tokenizer.apply_chat_template([question, call], tokenize=False))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError):
        return ""
    tail = whole[len(before) :] if whole.startswith(before) else whole
    return tail if _PROBE in tail else ""


def _own_parser(tokenizer: PreTrainedTokenizerBase) -> Parse:
    """By the tokenizer's `response_template`, which some models bring."""

    def parse(text: str) -> Message:
        try:
            said: Any = tokenizer.parse_response(text, prefix="")
            calls = [
                _call(number, call["function"]["name"], call["function"]["arguments"]) for number, call in enumerate(said.get("tool_calls") or [])
            ]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return as_message(text, [], [f"the tool call cannot be read: {error}"[:300]])
        return as_message(str(said.get("content") or ""), calls, [])

    return parse
