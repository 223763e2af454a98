"""A byte-level BPE tokenizer trained on the data's own text, with a chat template: for models that are built from
scratch, offline.

Not for pretrained models: they bring their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from posttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SMALLEST_VOCABULARY = 256 + 3  # every byte, and the three tokens above
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '" + TURN + "' + message['role'] + '\\n' + message['content'] + '" + TURN_END + "\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN + "assistant\\n' }}{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens. Any text can be encoded (bytes are the alphabet); <|im_end|> ends a
    completion."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone are {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in (END, TURN, TURN_END)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END, chat_template=CHAT_TEMPLATE)
