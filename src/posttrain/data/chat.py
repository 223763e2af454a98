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
