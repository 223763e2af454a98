"""Whole conversations as token ids, and which of the tokens the assistant itself would write: "assistant-only" loss for
any chat template.

The template is rendered on the beginnings of the conversation, and the texts are compared. No template is known by
name, and none needs marks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import all_stops, check_whole, encode_continuation, ended, no_end, render, shared_beginning, split_reply, token_ids
from posttrain.data.messages import is_silenced
from posttrain.errors import NothingToLearn, UserError
from posttrain.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    assistant_only: bool,
    first_turn: int = 0,
    stop_ids: Sequence[int] | None = None,
    append_eos: bool = False,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[bool]]:
    """([S], [S]) ids of a whole conversation, and which of them are trained: all, or what the assistant itself would
    write, stop tokens included.

    `first_turn`: the messages before it are read only. A reply with `weight` 0 is read only, too. A tokenizer's own
    stop token and `stop_ids` both end a reply. append_eos: where the template writes no stop token, replies are trained
    as far as it writes them, and the tokenizer's stop token is appended to the last. Raises UserError where the
    assistant's part cannot be told apart, or a reply has no end; NothingToLearn where no reply is trained.
    """
    stops = all_stops(tokenizer, stop_ids)
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        whole = "".join(split_reply(tokenizer, messages[:-1], messages[-1:], **chat_template_kwargs))
    else:
        whole = render(tokenizer, messages, **chat_template_kwargs)
        check_whole(tokenizer, messages, chat_template_kwargs)
    silenced = [place for place, message in enumerate(messages) if is_silenced(message)]
    if not assistant_only and not silenced:
        ids = token_ids(tokenizer, whole)
        if append_eos and not stops.intersection(ids):
            ids = ended(ids, tokenizer)
        if not stops.intersection(ids):
            raise UserError(no_end(tokenizer, whole))
        return ids, [True] * len(ids)
    if not assistant_only and any(messages[place]["role"] != "assistant" for place in silenced):
        raise UserError("a message that is not the assistant's has weight 0; set assistant_only_loss=True, so that only replies are trained")
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant" and place >= first_turn]
    if assistant_only and turns and set(turns) <= set(silenced):
        raise NothingToLearn("every reply has weight 0, so none of its tokens is trained; remove the row")
    ids, trained, at = [], [], 0
    spans = assistant_spans(tokenizer, messages, whole, stops, first_turn, needs_end=not append_eos, **chat_template_kwargs)
    for turn, (start, end) in zip(turns, spans, strict=True):
        for text, is_reply in ((whole[at:start], False), (whole[start:end], True)):
            piece = encode_continuation(tokenizer, text) if at or is_reply else token_ids(tokenizer, text)
            ids += piece
            trained += [turn not in silenced if is_reply else not assistant_only] * len(piece)
        at = end
    if append_eos and ids and not whole[at:] and ids[-1] not in stops:
        ids, trained = ended(ids, tokenizer), [*trained, turns[-1] not in silenced]
    rest = encode_continuation(tokenizer, whole[at:])
    return [*ids, *rest], [*trained, *[not assistant_only] * len(rest)]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    whole: str,
    stops: Collection[int],
    first_turn: int = 0,
    *,
    needs_end: bool = True,
    **kwargs: Any,
) -> list[tuple[int, int]]:
    """[start, end) in `whole` of what the assistant writes: from the opening of each reply, which is not its own, up to
    the stop token.

    A reply starts where the conversation before it, rendered with the opening, ends. It ends at the last stop token of
    the conversation rendered up to it, or without one, unless needs_end, where that conversation ends; where the
    template writes that differently later on (it drops thoughts), at the first stop token after the start.
    """
    marks = [str(tokenizer.decode([id])) for id in stops]
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant" and place >= first_turn]
    if not turns:
        raise UserError("a conversation has no message of the assistant, so assistant_only_loss leaves nothing to train on; remove the row")
    starts = [_start_of_reply(tokenizer, messages[:turn], whole, kwargs) for turn in turns]
    spans = []
    for turn, start, limit in zip(turns, starts, [*starts[1:], len(whole)], strict=True):
        until = len(whole) if turn == len(messages) - 1 else _length_if_beginning(whole, render(tokenizer, messages[: turn + 1], **kwargs))
        if start < until <= limit and (ends := [place + len(mark) for mark in marks if (place := whole.rfind(mark, start, until)) >= 0]):
            end = max(ends)
        elif ends := [place + len(mark) for mark in marks if (place := whole.find(mark, start, limit)) >= 0]:
            end = min(ends)
        elif needs_end:
            raise UserError(no_end(tokenizer, whole[start:limit]))
        else:
            end = until if start < until <= limit else limit
        spans.append((start, end))
    return spans


def _start_of_reply(tokenizer: PreTrainedTokenizerBase, before: list[Message], whole: str, kwargs: dict[str, Any]) -> int:
    if not before:
        raise UserError("a conversation begins with the assistant, so nothing opens its first reply; begin with a user's message")
    closed = render(tokenizer, before, **kwargs)
    shared = shared_beginning(whole, render(tokenizer, before, **(kwargs | {"add_generation_prompt": True})))
    if not shared.startswith(closed.removesuffix(str(tokenizer.eos_token or ""))):  # some templates write it behind the whole of what they get
        raise UserError(
            "the model's chat template writes the beginning of a conversation differently when it goes on, so the assistant's part cannot be told "
            "apart: use rows with prompt and completion instead of assistant_only_loss"
        )
    return len(shared)


def _length_if_beginning(whole: str, beginning: str) -> int:
    return len(beginning) if whole.startswith(beginning) else 0
