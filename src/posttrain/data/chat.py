"""From rows to token ids: text by the tokenizer as it is, conversations through their chat template.

Prompts are encoded on their own, never together with a completion: a merge across the boundary would change the prompt's last token.
What the model would write itself is found by rendering the beginning of a conversation and comparing, never by knowing a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from posttrain.errors import UserError
from posttrain.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **kwargs: Any) -> str:
    """The text that the chat template writes. Raises UserError when there is none, or it refuses the conversation."""
    return _apply(tokenizer, messages, tokenize=False, **kwargs)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """[P] ids. Text gets the tokenizer's own special tokens; a conversation those of its template (no second BOS) and the opening of the reply.

    A conversation that ends with the assistant is continued instead. Raises UserError when there is no chat template, or it refuses.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        ids = list(_apply(tokenizer, prompt, tokenize=True, return_dict=True, **(opening(prompt) | chat_template_kwargs))["input_ids"])
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens; a completion needs at least one to follow"[:300])
    return ids


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **kwargs: Any) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            "the data are conversations, but this model's tokenizer has no chat template; use an instruct model, give text, "
            "or choose a template (chat_template_path in SFT, or tokenizer.chat_template)"
        )
    try:
        return tokenizer.apply_chat_template([_without_nones(message) for message in messages], **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the model's chat template refuses the conversation that begins {messages[0]!r}: {error}"[:500]) from error


def _without_nones(message: Mapping[str, Any]) -> dict[str, Any]:
    """Tables give every message the keys of all others, with None in them; templates would take them for given."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in message.items() if value is not None or key == "content"}


def split_reply(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], reply: list[Message], **kwargs: Any) -> tuple[str, str]:
    """(prompt, reply) as text. Together they are what the template writes for the whole conversation.

    A prompt normally ends with the opening of the reply ("<|im_start|>assistant\\n"). Some templates open a thought there ("<think>") that the
    reply of the data does not have; then the prompt ends before it. Others drop a finished thought from a reply; it is put back.
    Raises UserError where the two cannot be told apart, or a part of the reply is lost.
    """
    opened = render(tokenizer, prompt, **(opening(prompt) | kwargs))
    whole = _with_thought(tokenizer, prompt, reply, opened, kwargs)
    if whole.startswith(opened):
        return opened, whole[len(opened) :]
    shared = shared_beginning(opened, whole)
    if prompt[-1]["role"] == "assistant" or not shared.startswith(render(tokenizer, prompt, **kwargs)):
        raise UserError(
            "the model's chat template writes a prompt differently once it is answered, so the completion cannot be told apart; give text prompts"
        )
    return shared, whole[len(shared) :]


def shared_beginning(one: str, other: str) -> str:
    """The longest text that both begin with."""
    length = next((place for place, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs), min(len(one), len(other)))
    return one[:length]


def opening(prompt: list[Message]) -> dict[str, bool]:
    """A prompt that ends with the assistant is continued; any other gets the opening of a reply."""
    continues = prompt[-1]["role"] == "assistant"
    return {"add_generation_prompt": not continues, "continue_final_message": continues}


def _with_thought(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], reply: list[Message], opened: str, kwargs: dict[str, Any]) -> str:
    """The whole conversation as text. A thought that the template drops is put back where the reply's text stands."""
    whole = render(tokenizer, [*prompt, *reply], **kwargs)
    last = reply[-1]
    content, thought = _text(last), last.get("reasoning_content") or ""
    if _squeezed(content) in _squeezed(whole) and _squeezed(thought) in _squeezed(whole):
        return whole
    if len(reply) == 1 and not thought:
        head, found, tail = render(tokenizer, [*prompt, {**last, "content": _PLACE}], **kwargs).partition(_PLACE)
        if found:
            begun = opened[len(head) :] if opened.startswith(head) else ""
            if begun.strip() and content.lstrip().startswith(begun.strip()):
                content = begun + content.lstrip()[len(begun.strip()) :].lstrip()
            return head + content + tail
    raise UserError(
        f"the model's chat template drops a part of the reply {(thought or content)[:80]!r}...; "
        "write a thought into the content, as the model does (<think>...</think>), or set another template"
    )


_PLACE = "[the reply stands here]"


def _text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def _squeezed(text: str) -> str:
    """Templates strip and add white space; what else they leave out is lost."""
    return "".join(text.split())


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: str | list[Message],
    *,
    stop_ids: Sequence[int] | None = None,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """([P], [R]) ids of a prompt and the completion to imitate, which ends with a stop token. Text after a conversation is the assistant's reply.

    In a conversation the completion is what the chat template writes after the prompt, up to its last stop token; text gets the tokenizer's
    end-of-sequence token. `stop_ids`: the model's (`models.load.stop_token_ids`); None: the tokenizer's. Raises UserError when a completion
    has no tokens or no end.
    """
    stops = all_stops(tokenizer, stop_ids)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise UserError(f"the prompt is text but its completion is {type(completion).__name__}; use the same kind for both")
        return encode_prompt(tokenizer, prompt), ended(encode_continuation(tokenizer, completion), tokenizer)
    reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    before, after = split_reply(tokenizer, prompt, reply, **chat_template_kwargs)
    ids = encode_continuation(tokenizer, after)
    last = max((place for place, id in enumerate(ids) if id in stops), default=None)
    if last is None:
        raise UserError(no_end(tokenizer, after))
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]), ids[: last + 1]


def encode_preference(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chosen: str | list[Message],
    rejected: str | list[Message],
    *,
    stop_ids: Sequence[int] | None = None,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) ids, each completion as `encode_example` makes it. Raises UserError as it does.

    Where a template opens a thought for one of the two only, the prompt ends before it and the rest belongs to the completion.
    """
    one, better = encode_example(tokenizer, prompt, chosen, stop_ids=stop_ids, **chat_template_kwargs)
    other, worse = encode_example(tokenizer, prompt, rejected, stop_ids=stop_ids, **chat_template_kwargs)
    shared = next((place for place, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs), min(len(one), len(other)))
    return one[:shared], one[shared:] + better, other[shared:] + worse


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that follows other text: without special tokens, and without the mark of a word's beginning that some tokenizers put first."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    anchor = tokenizer.eos_token
    if anchor is not None and ids:
        behind = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if behind[0] == tokenizer.eos_token_id and tokenizer.decode(behind[1:]) == text:
            return behind[1:]
    return ids


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with the end-of-sequence token behind them, unless they have it. Raises UserError for a tokenizer without one."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a completion could never end; set tokenizer.eos_token")
    return ids if ids and ids[-1] == end else [*ids, end]


def all_stops(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None) -> frozenset[int]:
    return frozenset(id for id in (tokenizer.eos_token_id, *(stop_ids or ())) if id is not None)


def no_end(tokenizer: PreTrainedTokenizerBase, reply: str) -> str:
    return (
        f"the chat template does not end a reply with a stop token, so the model would never learn to stop: the reply ends {reply[-40:]!r}, "
        f"the tokenizer's end-of-sequence token is {tokenizer.eos_token!r}. Set eos_token to the token that ends a reply in the template, "
        "or use a template that writes it"
    )
