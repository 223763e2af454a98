"""The formats of training data: which columns a row has and what they hold. Detected, checked row by row, explained
when wrong.

Every format comes as text ("standard") or as messages ("conversational"), one of the two in a dataset. Nothing here
changes a row: that is `convert.py`; nothing tokenizes: that is `chat.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.messages import check_message
from posttrain.errors import UserError, did_you_mean

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """`texts` hold text or messages, of one kind within a row; `replies` are those that must end with the assistant and
    are trained on."""

    name: str
    texts: tuple[str, ...]
    replies: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # columns of other types
    only: str | None = None  # "text" or "messages" where the format has one kind only

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.texts, *self.others)


STEPWISE = Format("stepwise supervision", ("prompt",), others=("completions", "labels"), only="text")
PREFERENCE = Format("preference", ("prompt", "chosen", "rejected"), replies=("chosen", "rejected"))
UNPAIRED_PREFERENCE = Format("unpaired preference", ("prompt", "completion"), replies=("completion",), others=("label",))
IMPLICIT_PREFERENCE = Format("preference with an implicit prompt", ("chosen", "rejected"), replies=("chosen", "rejected"))
PROMPT_COMPLETION = Format("prompt-completion", ("prompt", "completion"), replies=("completion",))
PROMPT_ONLY = Format("prompt-only", ("prompt",))
MESSAGES = Format("language modelling", ("messages",), only="messages")
TEXT = Format("language modelling", ("text",), only="text")

# From the most columns to the fewest: the first whose columns are all there is the format.
FORMATS = (STEPWISE, PREFERENCE, UNPAIRED_PREFERENCE, IMPLICIT_PREFERENCE, PROMPT_COMPLETION, PROMPT_ONLY, MESSAGES, TEXT)
_MORE_THAN_TEXT = ("image", "images", "video", "videos", "audio", "audios")


def kind_of(value: Any) -> str:
    """'text', 'messages', or what else it is, as a word of an error message."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and all(isinstance(item, Mapping) for item in value):
        return "messages"
    return "nothing" if value is None else f"a {type(value).__name__}"


def is_conversational(row: Row) -> bool:
    """Whether the row's texts are messages: [{"role": "user", "content": "..."}, ...]."""
    for name in ("prompt", "chosen", "rejected", "completion", "messages"):
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return "role" in value[0]
    return False


def detect_format(row: Row, among: Sequence[Format] = FORMATS, needed_by: str = "training") -> Format:
    """The format of `among` that the row's columns make. Raises UserError with the columns that were found when none
    does."""
    columns = {name for name, value in row.items() if value is not None}
    for format in among:
        if columns.issuperset(format.columns):
            return format
    wanted = " or ".join(f"({', '.join(format.columns)})" for format in among)
    missing = [name for name in min((format.columns for format in among), key=lambda names: len(set(names) - columns)) if name not in columns]
    near = next((hint for name in missing if (hint := did_you_mean(name, columns - {column for format in among for column in format.columns}))), "")
    near = near.replace("Did you mean", f"For '{missing[0]}', did you mean") if near else ""
    raise UserError(f"{needed_by} needs rows with the columns {wanted}; the data has: {', '.join(map(str, row)) or 'nothing'}.{near}")


class FormatCheck:
    """Checks one row after another against one format, which the first row decides. For streams, whose rows are seen
    only once."""

    def __init__(self, among: Sequence[Format] = FORMATS, needed_by: str = "training") -> None:
        self.among, self.needed_by = among, needed_by
        self.format: Format | None = None  # None: no row was seen
        self.seen = 0  # rows
        self._kinds: dict[str, str] = {}  # of each column, in the first row
        self._ids: dict[Any, int] = {}  # value of the column `id` -> its row

    def __call__(self, row: Row) -> Format:
        """Raises UserError, with the row's number, for whatever is wrong with it."""
        where, self.seen = f"row {self.seen}", self.seen + 1
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is {kind_of(row)}; a row is an object with named columns")
        if self.format is None:
            self.format = detect_format(row, self.among, self.needed_by)
        missing = [name for name in self.format.columns if row.get(name) is None]
        if missing:
            raise UserError(f"{where} has no '{missing[0]}', which row 0 has ({self.format.name} data); every row needs the same columns")
        media = [name for name in _MORE_THAN_TEXT if row.get(name)]
        if media:
            raise UserError(f"{where} has the column '{media[0]}': only text can be trained on; remove the column")
        self._check_kinds(row, where)
        for name in self.format.texts:
            check_text(row[name], name, where, is_reply=name in self.format.replies)
        self._check_others(row, where)
        self._check_id(row, where)
        return self.format

    def _check_kinds(self, row: Row, where: str) -> None:
        assert self.format is not None
        kinds = {name: kind_of(row[name]) for name in self.format.texts}
        for name, kind in kinds.items():
            if kind not in ("text", "messages") or self.format.only not in (None, kind):
                wanted = self.format.only or "text or messages"
                raise UserError(f"{where}: column `{name}` holds {kind}; in {self.format.name} data it must hold {wanted}")
        replies = [name for name in self.format.replies if name in kinds]
        for name in replies[1:]:
            if kinds[name] != kinds[replies[0]]:
                raise UserError(f"{where}: column `{replies[0]}` holds {kinds[replies[0]]}, `{name}` holds {kinds[name]}; use one kind for both")
        if kinds.get("prompt") == "text":  # the other way round is fine: text after a conversation is the assistant's reply
            for name in replies:
                if kinds[name] == "messages":
                    raise UserError(f"{where}: column `prompt` holds text, `{name}` holds messages; use one kind for both")
        self._kinds = self._kinds or kinds
        for name, kind in kinds.items():
            if kind != self._kinds[name]:
                raise UserError(f"column `{name}` is mixed: row 0 holds {self._kinds[name]}, {where} holds {kind}; use one kind in the whole dataset")

    def _check_others(self, row: Row, where: str) -> None:
        assert self.format is not None
        if "label" in self.format.others and not is_boolean(row["label"]):
            raise UserError(f"{where}: its label is {row['label']!r}; a label is true (a good completion) or false (a bad one), as a boolean"[:300])
        if self.format is STEPWISE:
            steps, labels = row["completions"], row["labels"]
            if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps or any(not isinstance(s, str) or not s for s in steps):
                raise UserError(f"{where}: `completions` must be a list of steps, each a text that is not empty")
            if not isinstance(labels, Sequence) or len(labels) != len(steps) or not all(map(is_boolean, labels)):
                raise UserError(f"{where}: `labels` must hold one boolean for each of the {len(steps)} steps")
        if self.format is IMPLICIT_PREFERENCE and kind_of(row["chosen"]) == "messages" and not _is_equal_pair(row):
            shared = common_turns(row["chosen"], row["rejected"])
            if shared == min(len(row["chosen"]), len(row["rejected"])):
                raise UserError(f"{where}: one of `chosen` and `rejected` begins with the whole other, so that nothing of it is left to compare")
            if not shared:
                raise UserError(f"{where}: `chosen` and `rejected` begin with different messages, so they have no prompt in common")
        if row.get("margin") is not None and (isinstance(row["margin"], bool) or not isinstance(row["margin"], int | float)):
            raise UserError(f"{where}: its margin is {row['margin']!r}; a margin is a number")
        check_keywords(row, where)

    def _check_id(self, row: Row, where: str) -> None:
        given = row.get("id")
        if isinstance(given, str | int):
            if given in self._ids:
                raise UserError(
                    f"{where} has the id {given!r}, which row {self._ids[given]} has too; ids must differ (rename the column if it is none)"
                )
            self._ids[given] = self.seen - 1


def validate_rows(rows: Iterable[Row], among: Sequence[Format] = FORMATS, needed_by: str = "training") -> Format:
    """The format of all `rows`. Raises UserError, with the row, for the first thing that is wrong; for no rows at all
    too."""
    check = FormatCheck(among, needed_by)
    for row in rows:
        check(row)
    if check.format is None:
        raise UserError(f"the dataset has no rows; {needed_by} needs at least one")
    return check.format


def check_text(value: Any, name: str, where: str, *, is_reply: bool) -> None:
    """Raises UserError for empty text, and for messages that are no messages or, in a reply, do not end with the
    assistant."""
    if not value:
        raise UserError(f"{where}: its {name} is empty" + ("; there is nothing to learn from it" if is_reply else ""))
    if isinstance(value, str):
        if is_reply and not value.strip():
            raise UserError(f"{where}: its {name} is only white space; there is nothing to learn from it")
        return
    for message in value:
        check_message(message, name, where)
    if is_reply:
        last = value[-1]
        if last["role"] != "assistant":
            raise UserError(f"{where}: its {name} ends with the role '{last['role']}'; the last message must be the assistant's")
        if not last.get("content") and not last.get("tool_calls"):
            raise UserError(f"{where}: its {name} is empty (the assistant says nothing); there is nothing to learn from it")


def tools_of(row: Row, where: str = "a row") -> list[Any] | None:
    """The row's `tools`: a list of JSON schemas, or that list as JSON text; None where it has none. Raises UserError
    for anything else."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: its tools are not valid JSON: {error.msg} at column {error.colno}") from error
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: its tools must be a list of JSON schemas, or that list as JSON text")
    for tool in tools or ():
        inner = tool.get("function", tool)
        if not isinstance(inner, Mapping) or not inner.get("name"):
            raise UserError(
                f'{where}: its tool {tool!r:.120} has no name; a tool is {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
            )
    return tools or None


def template_keywords(row: Row, defaults: Mapping[str, Any] | None = None, where: str = "a row") -> dict[str, Any]:
    """Keywords of the chat template for this row: `defaults` (a trainer's), over them the row's `chat_template_kwargs`,
    and its `tools`."""
    given = row.get("chat_template_kwargs")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: its chat_template_kwargs are not valid JSON: {error.msg} at column {error.colno}") from error
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: its chat_template_kwargs are {given!r:.100}; they must be a mapping such as {{'enable_thinking': False}}")
    keywords = {**(defaults or {}), **(given or {})}
    tools = tools_of(row, where)
    return {**keywords, "tools": tools} if tools else keywords


def check_keywords(row: Row, where: str) -> None:
    """Raises UserError for `tools` and `chat_template_kwargs` that no chat template can take, or that come with text,
    which is not rendered."""
    keywords = template_keywords(row, None, where)
    if keywords and not is_conversational(row):
        name = "tools" if "tools" in keywords else "chat_template_kwargs"
        raise UserError(
            f"{where} has `{name}`, but its texts are no messages, so there is no chat template to take them; remove or rename the column"
        )


def _is_equal_pair(row: Row) -> bool:
    """Two conversations that are the same: no mistake, but nothing to learn. The trainers count such pairs."""
    return bool(row["chosen"] == row["rejected"]) and len(row["chosen"]) > 1


def is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's is a class of its own


def common_turns(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages two conversations share from the beginning."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    return shared
