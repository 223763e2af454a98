"""Chat templates for models that have none: two of ours, a file's, or another tokenizer's. And the token that ends a
reply.

`plain` marks roles with words and ends replies with the tokenizer's own end-of-sequence token: nothing new has to be
learned, so it suits LoRA. `chatml` needs two tokens of its own, which are added with mean embeddings where they are
missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from posttrain.errors import UserError
from posttrain.models.head import base_model
from posttrain.models.seeding import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' + opening }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + opening }}{% endif %}"
)
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, source: str, reply_opening: str | None = None) -> bool:
    """Give `tokenizer` the template that `source` names: plain, chatml, a .jinja file, or a tokenizer's directory or
    hub name.

    Returns whether tokens were added, so that the model's embeddings must grow (`grow_embeddings`). Raises UserError
    for an unknown source.
    """
    if source in BUILT_IN:
        opening = (reply_opening or "").replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        tokenizer.chat_template = "{% set opening = '" + opening + "' %}" + BUILT_IN[source]
        return source == "chatml" and _add_chatml_tokens(tokenizer)
    if reply_opening is not None:
        raise UserError(f"reply_opening is written into the templates {' and '.join(BUILT_IN)} only; put it into {source} itself")
    if source.endswith((".jinja", ".j2", ".txt")):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"there is no chat template at {source}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return False
    from posttrain.models.load import load_tokenizer

    other = load_tokenizer(source)
    if not other.chat_template:
        raise UserError(f"the tokenizer of {source} has no chat template; use one of {', '.join(BUILT_IN)}, or a .jinja file")
    tokenizer.chat_template = other.chat_template
    return False


def set_eos_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make `token` the end-of-sequence token. Raises UserError where it is not one token of the vocabulary."""
    if token not in tokenizer.get_vocab():
        raise UserError(f"eos_token={token!r} is not a token of this tokenizer; name one that is, as the chat template writes it")
    tokenizer.eos_token = token


def grow_embeddings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
    """Rows for added tokens, where the embedding has none to spare; they begin around the mean of the others, drawn
    from `seed`."""
    base = base_model(model)
    if len(tokenizer) > base.config.get_text_config().vocab_size:
        with seeded(seed):
            base.resize_token_embeddings(len(tokenizer))


def _add_chatml_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    added = tokenizer.add_special_tokens({"additional_special_tokens": [t for t in CHATML_TOKENS if t not in tokenizer.get_vocab()]})
    tokenizer.eos_token = CHATML_TOKENS[1]
    return added > 0
