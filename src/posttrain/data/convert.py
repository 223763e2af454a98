"""From one format of data to another, under the names that users of TRL know. Each function takes a row, a list of rows
or a `datasets` dataset.

A row comes back as a new dictionary; columns that a function does not know stay. `apply_chat_template` needs a
tokenizer, the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import check_whole, opening, render, split_reply
from posttrain.data.formats import (
    IMPLICIT_PREFERENCE,
    MESSAGES,
    PREFERENCE,
    PROMPT_COMPLETION,
    PROMPT_ONLY,
    Row,
    common_turns,
    detect_format,
    is_conversational,
    kind_of,
    template_keywords,
)
from posttrain.data.messages import is_silenced
from posttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERSATIONAL = (PREFERENCE, IMPLICIT_PREFERENCE, PROMPT_COMPLETION, PROMPT_ONLY, MESSAGES)


def apply_chat_template(data: Any, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None, **template_kwargs: Any) -> Any:
    """Conversations -> the text that the chat template writes: `messages` becomes `text`, the other columns keep their
    names.

    A prompt gets the opening of the reply, a reply what the template writes after it. `tools` and keywords in the row
    come before those given. Raises UserError for a row that is no conversation or that the template refuses.
    """
    return each(lambda row: _templated(row, tokenizer, tools, template_kwargs), data)


def maybe_apply_chat_template(data: Any, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None, **template_kwargs: Any) -> Any:
    """As `apply_chat_template`; rows of text are returned as they are."""
    return each(lambda row: _templated(row, tokenizer, tools, template_kwargs) if is_conversational(row) else dict(row), data)


def extract_prompt(data: Any) -> Any:
    """Preferences with an implicit prompt -> explicit: what `chosen` and `rejected` share from the beginning becomes
    `prompt`.

    Messages are compared turn by turn. Text is shared up to the last word boundary, so that no word is cut in two.
    """
    return each(_extracted, data)


def maybe_extract_prompt(data: Any) -> Any:
    """As `extract_prompt`; rows that are no preferences, or whose prompt stands apart already, are returned as they
    are."""

    def extracted(row: Row) -> dict[str, Any]:
        is_pair = "chosen" in row and "rejected" in row
        has_prompt = row.get("prompt") is not None and kind_of(row["prompt"]) == kind_of(row.get("chosen"))
        return _extracted(row) if is_pair and not has_prompt else dict(row)

    return each(extracted, data)


def unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """Pairs -> rows (prompt, completion, label): every chosen completion with True, then every rejected one with False.

    Other columns of a pair go with both of its rows. `num_proc` and `desc` are those of `Dataset.map`.
    """
    if isinstance(dataset, list):
        return [_half(row, name) for name in ("chosen", "rejected") for row in dataset]
    if _is_split_dict(dataset):
        return type(dataset)({split: unpair_preference_dataset(rows, num_proc, desc) for split, rows in dataset.items()})
    from datasets import IterableDataset, concatenate_datasets

    names = [name for name in _columns(dataset) if name in ("chosen", "rejected")]
    extra = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": desc}

    def half(name: str) -> Any:
        return dataset.map(_half, fn_kwargs={"name": name}, remove_columns=names, **extra)

    return concatenate_datasets([half("chosen"), half("rejected")])


def maybe_unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """As `unpair_preference_dataset`; a dataset without the columns chosen and rejected is returned as it is."""
    if _is_split_dict(dataset):
        return type(dataset)({split: maybe_unpair_preference_dataset(rows, num_proc, desc) for split, rows in dataset.items()})
    paired = {"chosen", "rejected"} <= set(_columns(dataset))
    return unpair_preference_dataset(dataset, num_proc, desc) if paired else dataset


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant", "observation": "tool"}


def maybe_convert_to_chatml(data: Any) -> Any:
    """Messages with from/value -> role/content, and a column `conversations` -> `messages`. Everything else is returned
    as it is."""

    def converted(row: Row) -> dict[str, Any]:
        names = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
        new = {name: [_chatml(m) for m in value] if name in names and isinstance(value, list) else value for name, value in row.items()}
        if "conversations" in new and "messages" not in new:
            new["messages"] = new.pop("conversations")
        return new

    return each(converted, data)


def _chatml(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message or "value" not in message:
        return message
    return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}


def as_messages(reply: str | list[Any]) -> list[Any]:
    """A reply given as text is one message of the assistant."""
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply


def each(function: Callable[[Row], dict[str, Any]], data: Any) -> Any:
    """`function` of a row, of every row of a list, or of every row of a `datasets` dataset (whose old columns go)."""
    if _is_split_dict(data):
        return type(data)({split: each(function, rows) for split, rows in data.items()})
    if isinstance(data, Mapping):
        return function(data)
    if isinstance(data, list):
        return [function(row) for row in data]
    return data.map(function, remove_columns=_columns(data))


def _is_split_dict(data: Any) -> bool:
    return isinstance(data, dict) and type(data).__module__.startswith("datasets.")


def _columns(data: Any) -> list[str]:
    if isinstance(data, list):
        return list(data[0]) if data else []
    return list(data.column_names or next(iter(data)))  # a stream may not know its columns before its first row


def _templated(row: Row, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    format = detect_format(row, _CONVERSATIONAL, "apply_chat_template")
    if not is_conversational(row):
        raise UserError("apply_chat_template takes conversations, but this row holds text; use maybe_apply_chat_template for data that may be either")
    options = template_keywords(row, {**kwargs, "tools": tools} if tools else kwargs)
    new = {name: value for name, value in row.items() if name not in ("messages", "tools", "chat_template_kwargs")}
    if any(is_silenced(message) for name in format.texts if isinstance(row[name], list) for message in row[name]):
        raise UserError("a message has weight 0, which text cannot say; give the messages to the trainer, with assistant_only_loss=True")
    if format is MESSAGES:
        return {**new, "text": _whole(tokenizer, row["messages"], options)}
    if format is PROMPT_ONLY:
        return {**new, "prompt": _whole(tokenizer, row["prompt"], opening(row["prompt"]) | options)}
    if format is IMPLICIT_PREFERENCE:
        return {**new, **{name: _whole(tokenizer, row[name], options) for name in format.replies}}
    split = {name: split_reply(tokenizer, row["prompt"], as_messages(row[name]), **options) for name in format.replies}
    shortest = min((prompt for prompt, _ in split.values()), key=len)  # templates that open a reply with a thought may write it for one only
    return {**new, "prompt": shortest, **{name: (prompt + reply)[len(shortest) :] for name, (prompt, reply) in split.items()}}


def _whole(tokenizer: PreTrainedTokenizerBase, messages: list[Any], options: dict[str, Any]) -> str:
    text = render(tokenizer, messages, **options)
    check_whole(tokenizer, messages, options)
    return text


def _extracted(row: Row) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if kind_of(chosen) != kind_of(rejected):
        raise UserError(f"column `chosen` holds {kind_of(chosen)}, `rejected` holds {kind_of(rejected)}; use one kind for both")
    shared = common_turns(chosen, rejected)
    if isinstance(chosen, str):
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        shared = len(chosen[:shared].rstrip())  # the space belongs to the replies: tokens begin with it
    else:
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # of the same conversation twice the last reply is left
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _half(row: Row, name: str) -> dict[str, Any]:
    rest = {column: value for column, value in row.items() if column not in ("chosen", "rejected")}
    return {**rest, "completion": row[name], "label": name == "chosen"}
