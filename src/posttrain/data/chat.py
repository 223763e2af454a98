"""From rows to token ids: text by the tokenizer as it is, conversations through their chat template.

Prompts are encoded on their own, never together with a completion: a merge across the boundary would change the
prompt's last token. What the model would write itself is found by rendering the beginning of a conversation and
comparing, never by knowing a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.data.formats import template_keywords
from posttrain.data.messages import check_encodable, plain_messages, plain_schema, text_of, texts_of, thought_of
from posttrain.data.spelling import REFUSALS, spelled
from posttrain.data.survival import check_survives
from posttrain.errors import UserError, at_row
from posttrain.types import Message, Prompt, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **kwargs: Any) -> str:
    """The text that the chat template writes. Raises UserError when there is none, or it refuses the conversation."""
    return str(_apply(tokenizer, messages, tokenize=False, **kwargs))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """[P] ids. Text gets the tokenizer's opening special tokens (`encode_text`); a conversation those of its template
    and the opening of the reply.

    A conversation that ends with the assistant is continued instead. Raises UserError when there is no chat template,
    it refuses, or it drops a part.
    """
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    else:
        keywords = opening(prompt) | chat_template_kwargs
        ids = list(_apply(tokenizer, prompt, tokenize=True, return_dict=True, **keywords)["input_ids"])
        check_whole(tokenizer, prompt, keywords)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens; a completion needs at least one to follow"[:300])
    return ids


def encode_task(tokenizer: PreTrainedTokenizerBase, task: Task, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """[P] ids of a task's prompt, with the row's `tools` and `chat_template_kwargs`; those given (a trainer's) count
    where the row has none.

    Raises UserError as `encode_prompt`, with the row.
    """
    with at_row(task.id):
        keywords = {} if isinstance(task.prompt, str) else template_keywords(task.columns, chat_template_kwargs)
        return encode_prompt(tokenizer, task.prompt, **keywords)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that begins a sequence: behind the tokenizer's opening special tokens (BOS), once, also where the
    text brings them, as text does that a chat template wrote. Closing ones (EOS, of tokenizers that append it) never:
    what follows says where the end is.
    """
    ids, opening_ids = token_ids(tokenizer, text), _opening_ids(tokenizer)
    return ids if opening_ids and ids[: len(opening_ids)] == opening_ids else [*opening_ids, *ids]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text as it is, without special tokens around it. Raises UserError for text that no tokenizer takes."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:
        check_encodable(text)
        raise UserError(f"the tokenizer refuses the text {text!r:.80}: {error}"[:300]) from error


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before any text."""
    whole, text = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    start = next((place for place in range(len(whole) - len(text) + 1) if whole[place : place + len(text)] == text), 0)
    return whole[:start]


def check_whole(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises UserError where the template drops a part of what it is given (`survival.py`)."""
    check_survives(tokenizer, plain_messages(messages), kwargs)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **kwargs: Any) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            "the data are conversations, but this model's tokenizer has no chat template; use an instruct model, give text, "
            "or choose a template (chat_template_path in SFT, or tokenizer.chat_template)"
        )
    tools = kwargs.pop("tools", None)
    plain, tools = spelled(tokenizer, plain_messages(messages), plain_schema(list(tools)) if tools else None)
    if tools:
        kwargs["tools"] = tools
    try:
        return tokenizer.apply_chat_template(plain, **kwargs)
    except REFUSALS as error:
        for text in texts_of(messages):
            check_encodable(text)
        raise UserError(f"the model's chat template refuses the conversation that begins {messages[0]!r}: {error}"[:500]) from error


def split_reply(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], reply: list[Message], **kwargs: Any) -> tuple[str, str]:
    """(prompt, reply) as text. Together they are what the template writes for the whole conversation.

    A prompt normally ends with the opening of the reply ("<|im_start|>assistant\\n"). Some templates open a thought
    there ("<think>") that the reply of the data does not have; then the prompt ends before it. Others drop a finished
    thought from a reply; it is put back. Raises UserError where the two cannot be told apart, or a part of the reply is
    lost.
    """
    opened = render(tokenizer, prompt, **(opening(prompt) | kwargs))
    check_whole(tokenizer, [*prompt, *reply], kwargs)
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
    content, thought = text_of(last.get("content")) or "", thought_of(last) or ""
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


def _squeezed(text: str) -> str:
    """Templates strip and add white space; what else they leave out is lost."""
    return "".join(text.split())


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: str | list[Message],
    *,
    stop_ids: Sequence[int] | None = None,
    append_eos: bool = False,
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[int]]:
    """([P], [R]) ids of a prompt and the completion to imitate, which ends with a stop token. Text after a conversation
    is the assistant's reply.

    In a conversation the completion is what the chat template writes after the prompt, up to its last stop token; text
    gets the tokenizer's end-of-sequence token. `stop_ids`: the model's (`models.load.stop_token_ids`); None: the
    tokenizer's. append_eos: where the template writes no stop token, the tokenizer's is appended. Raises UserError when
    a completion has no tokens or no end.
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
    if last is None and append_eos:
        return token_ids(tokenizer, before), ended(ids, tokenizer)
    if last is None:
        raise UserError(no_end(tokenizer, after))
    return token_ids(tokenizer, before), ids[: last + 1]


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

    Where a template opens a thought for one of the two only, the prompt ends before it and the rest belongs to the
    completion.
    """
    one, better = encode_example(tokenizer, prompt, chosen, stop_ids=stop_ids, **chat_template_kwargs)
    other, worse = encode_example(tokenizer, prompt, rejected, stop_ids=stop_ids, **chat_template_kwargs)
    shared = next((place for place, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs), min(len(one), len(other)))
    return one[:shared], one[shared:] + better, other[shared:] + worse


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that follows other text: without special tokens, and without the mark of a word's beginning that some
    tokenizers put first."""
    ids = token_ids(tokenizer, text)
    anchor = tokenizer.eos_token
    if anchor is not None and ids:
        behind = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if behind[0] == tokenizer.eos_token_id and tokenizer.decode(behind[1:]) == text:
            return behind[1:]
    return ids


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with the end-of-sequence token behind them, unless they have it. Raises UserError for a tokenizer without
    one."""
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
        "or use a template that writes it. SFT also takes append_eos=True, which puts that token behind the reply"
    )
