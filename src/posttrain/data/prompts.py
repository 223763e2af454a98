"""From rows to tasks: templates fill the columns `prompt`, `answer` and others; what is not a prompt is explained
before training.

A prompt is text or a conversation (a list of messages), one kind in a dataset. Nothing here tokenizes: that is
`chat.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.data.fields import TemplateField
from posttrain.data.formats import check_keywords
from posttrain.data.messages import check_message, plain_messages
from posttrain.data.sources import Rows, RowStream, column_names
from posttrain.errors import UserError, did_you_mean
from posttrain.types import Prompt, Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Template:
    """How a row of somebody's dataset becomes a row of ours. Every original column is kept, unless a template has its
    name."""

    prompt: str | None = None  # "{question}"; None: the data has a column `prompt`
    columns: Mapping[str, str] = field(default_factory=dict)  # {"answer": "{answer|after:####}"}
    system: str | None = None  # put before the prompt: as a message where `chat`, else as text

    def apply(self, rows: Rows | Dataset | RowStream, *, chat: bool) -> Any:
        """The rows with `prompt` and the named columns filled; a stream stays one.

        With `chat` (the tokenizer has a chat template) a system text makes conversations of text prompts.
        """
        templates = {name: TemplateField(text, name) for name, text in self.columns.items()}
        if self.prompt is not None:
            templates["prompt"] = TemplateField(self.prompt, "prompt")

        def filled(row: Mapping[str, Any], number: int) -> dict[str, Any]:
            new = {**row, **{name: template.fill(row, number) for name, template in templates.items()}}
            return new if self.system is None else with_system(self.system, new, chat, number)

        known = list(next(iter(rows), {})) if isinstance(rows, RowStream) else column_names(rows)
        for template in templates.values():
            template.check(known)
        return rows.map(filled) if isinstance(rows, RowStream) else [filled(row, number) for number, row in enumerate(rows)]


def with_system(system: str, row: Mapping[str, Any], chat: bool, number: int) -> dict[str, Any]:
    """`row` with the system text before its prompt, or before its conversations where the prompt is part of them."""
    if row.get("prompt") is None:
        whole = [name for name in ("messages", "chosen", "rejected") if isinstance(row.get(name), list)]
        if whole:
            return {**row, **{name: _with_system(system, row[name], chat) for name in whole}}
    if "prompt" not in row:
        raise UserError(f"row {number} has no column 'prompt'; it has: {', '.join(map(str, row)) or 'nothing'}.{did_you_mean('prompt', row)}")
    _check_prompt(row["prompt"], number)
    return {**row, "prompt": _with_system(system, row["prompt"], chat)}


def _with_system(system: str, prompt: Prompt, chat: bool) -> Prompt:
    if isinstance(prompt, str):
        if not chat:
            return f"{system}\n\n{prompt}"
        prompt = [{"role": "user", "content": prompt}]
    elif prompt[0]["role"] == "system":
        raise UserError("the recipe gives a system text, but the data's conversations have their own; leave data.system out")
    return [{"role": "system", "content": system}, *prompt]


def validate_prompts(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises UserError, with the row, for an empty dataset, a missing or misnamed column, an empty prompt, or two kinds
    of prompt."""
    first: type | None = None
    number = -1
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise UserError(f"row {number} has no column 'prompt'; it has: {', '.join(map(str, row)) or 'nothing'}.{did_you_mean('prompt', row)}")
        _check_prompt(row["prompt"], number)
        check_keywords(row, f"row {number}")
        first = first or type(row["prompt"])
        if not isinstance(row["prompt"], first):
            raise UserError(f"row 0's prompt is {_KIND[first]}, row {number}'s is {_KIND[type(row['prompt'])]}; use one kind in the whole dataset")
    if number < 0:
        raise UserError("the dataset has no rows; training needs at least one prompt")


_KIND: dict[type, str] = {str: "text", list: "a conversation"}


def _check_prompt(prompt: Any, number: int) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(f"row {number}: its prompt is empty")
    elif isinstance(prompt, list):
        if not prompt:
            raise UserError(f"row {number}: its conversation has no messages")
        for message in prompt:
            check_message(message, "prompt", f"row {number}")
    else:
        raise UserError(f"row {number}: its prompt is {type(prompt).__name__} {prompt!r}; a prompt is text or a list of messages"[:300])


def to_tasks(rows: Iterable[Mapping[str, Any]]) -> list[Task]:
    """One task a row, its id the row's number. Raises what `validate_prompts` raises."""
    listed = list(rows)
    validate_prompts(listed)
    return [
        Task(number, plain_prompt(row["prompt"]), {name: value for name, value in row.items() if name != "prompt"})
        for number, row in enumerate(listed)
    ]


def plain_prompt(prompt: Prompt) -> Prompt:
    """Text as it is, messages plain."""
    return prompt if isinstance(prompt, str) else plain_messages(prompt)
