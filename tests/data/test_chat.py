"""Prompts to token ids, against the chat template rendered by hand."""

import pytest

from posttrain.data.chat import encode_example, encode_prompt
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 2+2?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["what is 2+2? it is 4, be brief"] * 3, 320)


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that puts a BOS before text, and whose chat template writes one too: the common way to get two."""
    import copy

    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.bos_token = "<|endoftext|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.bos_token_id)])
    made.chat_template = "{{ bos_token }}" + made.chat_template
    return made


def test_text_is_tokenized_as_the_tokenizer_does_it(tokenizer, with_bos):
    assert encode_prompt(tokenizer, "what is") == tokenizer("what is")["input_ids"]
    assert encode_prompt(with_bos, "what is") == [with_bos.bos_token_id, *encode_prompt(tokenizer, "what is")]


def test_a_conversation_ends_where_the_reply_begins(tokenizer):
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompt(tokenizer, CHAT) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_conversation_has_one_bos(with_bos):
    assert encode_prompt(with_bos, CHAT).count(with_bos.bos_token_id) == 1


def test_text_that_brings_its_bos_has_one(with_bos):
    text = with_bos.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(with_bos, text) == encode_prompt(with_bos, CHAT)


def test_a_tokenizer_that_appends_eos_ends_no_prompt_with_it(with_bos):
    from tokenizers.processors import TemplateProcessing

    plain = encode_prompt(with_bos, "what is")
    ends = [("<|endoftext|>", with_bos.bos_token_id), ("<|im_end|>", with_bos.eos_token_id)]
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A <|im_end|>", special_tokens=ends)
    assert with_bos("what is")["input_ids"] == [*plain, with_bos.eos_token_id]
    assert encode_prompt(with_bos, "what is") == plain
    assert encode_example(with_bos, "what is", " 2") == (plain, [*with_bos(" 2", add_special_tokens=False)["input_ids"], with_bos.eos_token_id])


def test_half_a_character_is_explained(tokenizer):
    for prompt in ("a \ud83d b", [{"role": "user", "content": "a \ud83d b"}]):
        with pytest.raises(UserError, match=r"half a character .'.ud83d' at place 2."):
            encode_prompt(tokenizer, prompt)


def test_a_reply_that_was_begun_is_continued(tokenizer):
    ids = encode_prompt(tokenizer, [*CHAT, {"role": "assistant", "content": "it is"}])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nit is")


def test_keywords_reach_the_chat_template(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_prompt(made, CHAT, mood="4") == tokenizer("4be briefwhat is 2+2?")["input_ids"]


def test_no_chat_template_is_explained(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    with pytest.raises(UserError, match="no chat template; use an instruct model"):
        encode_prompt(made, CHAT)


def test_a_template_that_refuses_is_quoted(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(UserError, match="no system role here"):
        encode_prompt(made, CHAT)


def test_a_prompt_without_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="has no tokens"):
        encode_prompt(tokenizer, "")


def test_an_example_is_a_prompt_and_a_completion_that_ends(tokenizer):
    prompt, completion = encode_example(tokenizer, "what is 2+2? ", "it is 4")
    assert prompt == encode_prompt(tokenizer, "what is 2+2? ")
    assert completion == [*tokenizer("it is 4")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("reply", ["it is 4", [{"role": "assistant", "content": "it is 4"}]])
def test_a_conversations_completion_ends_with_its_end_token_and_not_after(tokenizer, reply):
    prompt, completion = encode_example(tokenizer, CHAT, reply)
    assert prompt == encode_prompt(tokenizer, CHAT)
    assert tokenizer.decode(completion) == "it is 4<|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be told apart"):
        encode_example(made, CHAT, "it is 4")


def test_text_with_a_completion_of_messages_is_refused(tokenizer):
    with pytest.raises(UserError, match="same kind"):
        encode_example(tokenizer, "what", [{"role": "assistant", "content": "x"}])
