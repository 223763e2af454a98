"""Rows of supervised fine-tuning -> token ids and which of them are trained. And bins: examples that are counted as one
(packing).

One rule decides what is trained: what the model would write itself at that place. What is not trained is read all the
same.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.data.chat import all_stops, encode_example, encode_text, ended
from posttrain.data.conversation import encode_conversation
from posttrain.data.convert import as_messages, maybe_convert_to_chatml
from posttrain.data.formats import MESSAGES, PROMPT_COMPLETION, TEXT, Format, FormatCheck, is_conversational, template_keywords
from posttrain.data.messages import is_silenced
from posttrain.data.replies import without_repetition
from posttrain.data.tokenized import is_tokenized, read_tokenized
from posttrain.errors import NothingToLearn, UserError, at_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """Token ids of one row, compactly. The first token is never trained: nothing predicts it."""

    ids: array[int]  # [S]
    trained: bytes  # [S] 1: the token is a target
    number: int  # of its row in the dataset

    @property
    def targets(self) -> int:
        """Trained tokens."""
        return self.trained.count(1)


@dataclass(frozen=True)
class ExampleOptions:
    """What of a row is trained. The names and defaults are SFTConfig's."""

    max_length: int | None = 1024  # tokens; the rest of a longer example is left out
    text_field: str = "text"
    completion_only: bool | None = None  # None: where rows have prompt and completion
    assistant_only: bool = False
    append_eos: bool = False  # where a chat template ends a reply with no stop token


class ExampleMaker:
    """Row after row into examples, each checked. Raises UserError, with the row, for whatever cannot be trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ExampleOptions, stop_ids: Sequence[int] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.stops = all_stops(tokenizer, stop_ids)
        self.check = FormatCheck((PROMPT_COMPLETION, MESSAGES, TEXT), "SFT")

    def __call__(self, row: Mapping[str, Any]) -> Example:
        number = self.check.seen
        if is_tokenized(row):
            self.check.seen += 1
            with at_row(number):
                options = self.options
                ids, trained = read_tokenized(row, completion_only=options.completion_only, assistant_only=options.assistant_only)
                return self._cut(ids, trained, number)
        row = without_repetition(maybe_convert_to_chatml(row))
        if self.options.text_field != "text" and self.options.text_field in row:
            row = {**row, "text": row[self.options.text_field]}
        format = self.check(row)
        with at_row(number):
            ids, trained = self._encode(row, format)
            return self._cut(ids, trained, number)

    def ends(self, example: Example) -> bool:
        """Whether the model learns to stop here: some trained token is a stop token."""
        return any(id in self.stops and trained for id, trained in zip(example.ids, example.trained, strict=True))

    def _encode(self, row: Mapping[str, Any], format: Format) -> tuple[list[int], list[bool]]:
        options, tokenizer = self.options, self.tokenizer
        if format is not PROMPT_COMPLETION and options.completion_only:
            raise UserError("completion_only_loss needs rows with prompt and completion; for messages use assistant_only_loss")
        if options.assistant_only and not is_conversational(row):
            raise UserError("assistant_only_loss needs conversations, but the data are text; leave it out")
        if format is TEXT:
            ids = ended(encode_text(tokenizer, row["text"]), tokenizer)
            return ids, [True] * len(ids)
        kwargs = template_keywords(row)
        if format is MESSAGES:
            only = options.assistant_only
            return encode_conversation(
                tokenizer, row["messages"], assistant_only=only, stop_ids=tuple(self.stops), append_eos=options.append_eos, **kwargs
            )
        return self._encode_pair(row["prompt"], row["completion"], completion_only=options.completion_only is not False, kwargs=kwargs)

    def _encode_pair(self, prompt: Any, completion: Any, *, completion_only: bool, kwargs: dict[str, Any]) -> tuple[list[int], list[bool]]:
        stops, end = tuple(self.stops), self.options.append_eos
        if not isinstance(prompt, str):
            reply = as_messages(completion)
            others = any(message["role"] != "assistant" for message in reply)  # results of tools, say: the model does not write them
            if others or self.options.assistant_only or any(map(is_silenced, reply)):
                first = len(prompt) if completion_only else 0
                return encode_conversation(
                    self.tokenizer, [*prompt, *reply], assistant_only=True, first_turn=first, stop_ids=stops, append_eos=end, **kwargs
                )
        before, after = encode_example(self.tokenizer, prompt, completion, stop_ids=stops, append_eos=end, **kwargs)
        limit = self.options.max_length
        if limit is not None and len(before) >= limit:
            raise NothingToLearn(f"its prompt has {len(before)} tokens, which leaves no room for its completion within max_length={limit}")
        return [*before, *after], [not completion_only] * len(before) + [True] * len(after)

    def _cut(self, ids: list[int], trained: list[bool], number: int) -> Example:
        limit = self.options.max_length
        example = Example(array("i", ids[:limit]), bytes([False, *trained[1:limit]]), number)
        if not example.targets:
            cut = "" if limit is None or len(ids) <= limit else f" within max_length={limit} (it has {len(ids)})"
            raise NothingToLearn(f"none of its tokens is trained{cut}; lengthen max_length or remove the row")
        return example


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in `lengths`, in bins of at most `size` tokens: best fit, the longest first. The bins are in the order of
    their first members."""
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect.bisect_left(rooms, (lengths[place], -1))
        if at == len(rooms):
            room, number = size, len(found)
            found.append([])
        else:
            room, number = rooms.pop(at)
        found[number].append(place)
        bisect.insort(rooms, (room - lengths[place], number))
    return sorted((sorted(members) for members in found), key=lambda members: members[0])


def pieces(example: Example, size: int) -> list[Example]:
    """An example that is too long, as several of at most `size` tokens. Each but the first reads nothing of those
    before it."""
    parts = []
    for start in range(0, len(example.ids), size):
        trained = bytes([0]) + example.trained[start + 1 : start + size]
        part = Example(example.ids[start : start + size], trained, example.number)
        if part.targets:
            parts.append(part)
    return parts
