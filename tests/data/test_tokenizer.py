"""The BPE tokenizer of models from scratch."""

import pytest

from posttrain.data.tokenizer import SMALLEST_VOCABULARY, train_bpe
from posttrain.errors import UserError

TEXTS = ["the cat sat on the mat"] * 5


@pytest.mark.parametrize("text", ["the cat", " two  spaces\n\n", "ünïcode 漢字 🎉", "\x00\x01", "<|im_end|>"])
def test_any_text_survives_encoding(text):
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_vocabulary_is_at_most_what_was_asked_and_learns_words():
    tokenizer = train_bpe(TEXTS, 280)
    assert len(tokenizer) <= 280
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(TEXTS, 290).get_vocab() == train_bpe(TEXTS, 290).get_vocab()


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="too small"):
        train_bpe(TEXTS, SMALLEST_VOCABULARY - 1)


def test_it_is_saved_and_loaded_with_its_template(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(TEXTS, 290)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
