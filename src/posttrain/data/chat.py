"""From a prompt to its token ids: text by the tokenizer as it is, conversations through its chat template.

Prompts are encoded on their own, never together with a completion: a merge across the boundary would change the prompt's last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from posttrain.errors import UserError
from posttrain.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """[P] ids. Text gets the tokenizer's own special tokens; a conversation those of its template (no second BOS) and the opening of the reply.

    A conversation that ends with the assistant is continued instead. Raises UserError when there is no chat template, or it refuses.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        ids = _encode_conversation(tokenizer, prompt, chat_template_kwargs)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens; a completion needs at least one to follow"[:300])
    return ids


def _encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: dict[str, Any]) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            "the prompts are conversations, but this model's tokenizer has no chat template; use an instruct model, give text prompts, or set tokenizer.chat_template"
        )
    continues = messages[-1]["role"] == "assistant"
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=not continues, continue_final_message=continues, **kwargs
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the model's chat template refuses the conversation that begins {messages[0]!r}: {error}"[:500]) from error
    return list(encoded["input_ids"])


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str | list[Message], **chat_template_kwargs: Any
) -> tuple[list[int], list[int]]:
    """([P], [R]) ids of a prompt and the completion to imitate, which ends with the end-of-sequence token.

    In a conversation the completion is what the chat template writes after the prompt. Raises UserError when it has no tokens to learn from.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, **chat_template_kwargs)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise UserError(f"the prompt is text but its completion is {type(completion).__name__}; use the same kind for both")
        text = completion
    else:
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        text = _rendered_reply(tokenizer, prompt, reply, chat_template_kwargs)
    return prompt_ids, _ended(list(tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id)


def _rendered_reply(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], reply: list[Message], kwargs: dict[str, Any]) -> str:
    try:
        before: Any = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs)
        whole: Any = tokenizer.apply_chat_template([*prompt, *reply], tokenize=False, **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the model's chat template refuses the conversation that begins {prompt[0]!r}: {error}"[:500]) from error
    if not whole.startswith(before):
        raise UserError(
            "the model's chat template writes a prompt differently once it is answered, so the completion cannot be told apart; give text prompts"
        )
    return whole[len(before) :]


def _ended(ids: list[int], end: int | None) -> list[int]:
    """Up to the last end-of-sequence token (templates write a line break after it); one is added where there is none."""
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token, so a completion could never end; set tokenizer.eos_token")
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else [*ids, end]
