"""Pairs as token ids: one prompt, two completions that end; and pairs stay whole when a budget splits groups."""

import pytest
from small import build_tokenizer

from posttrain.data.chat import encode_preference
from posttrain.data.stream import PackItem, split
from posttrain.data.tokenizer import TURN_END, train_bpe
from posttrain.errors import UserError

QUESTION = [{"role": "user", "content": "what is 1+1?"}]


@pytest.fixture(scope="module")
def chat_tokenizer():
    return train_bpe(["what is 1+1? it is 2, or 3. think about it"] * 3, 300)


def reply(text):
    return [{"role": "assistant", "content": text}]


def test_text_pairs_share_their_prompt_and_end():
    tokenizer = build_tokenizer()
    prompt, chosen, rejected = encode_preference(tokenizer, "1+1=", "2", "11")
    assert tokenizer.decode(prompt) == "1+1="
    assert chosen == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
    assert rejected == [*tokenizer("11")["input_ids"], tokenizer.eos_token_id]


def test_conversations_are_what_the_template_writes(chat_tokenizer):
    prompt, *pair = encode_preference(chat_tokenizer, QUESTION, reply("it is 2"), reply("3"))
    for ids, text in zip(pair, ("it is 2", "3"), strict=True):
        whole = chat_tokenizer.apply_chat_template([*QUESTION, *reply(text)], tokenize=False)
        assert whole.startswith(chat_tokenizer.decode(prompt + ids))
        assert chat_tokenizer.decode(ids) == text + TURN_END


def test_a_thought_that_only_one_reply_opens_belongs_to_the_replies(chat_tokenizer):
    """Some templates open a thought behind the prompt; a reply without one follows the shorter prompt."""
    template = chat_tokenizer.chat_template
    opened = template.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
    assert opened != template
    chat_tokenizer.chat_template = opened
    try:
        prompt, *pair = encode_preference(chat_tokenizer, QUESTION, reply("<think>\nit is</think>2"), reply("3"))
    finally:
        chat_tokenizer.chat_template = template
    assert chat_tokenizer.decode(prompt).endswith("assistant\n")
    assert [chat_tokenizer.decode(ids) for ids in pair] == ["<think>\nit is</think>2" + TURN_END, "3" + TURN_END]


def test_text_and_messages_do_not_mix(chat_tokenizer):
    with pytest.raises(UserError, match="use the same kind for both"):
        encode_preference(chat_tokenizer, "what is 1+1?", "2", reply("3"))


def test_a_group_that_must_stay_whole_is_never_split():
    items = [PackItem([1] * 4, [[2] * 3, [3] * 5]), PackItem([1] * 2, [[2], [3]]), PackItem([1] * 3, [[2] * 2, [3] * 2])]
    assert [[len(item.completions) for item in part] for part in split(items, 6)] == [[1], [1], [2], [1], [1]]
    parts = split(items, 6, whole=True)
    assert [[item.completions for item in part] for part in parts] == [[item.completions] for item in items]
    assert [list(item.row_ids) for part in parts for item in part] == [[0, 1], [2, 3], [4, 5]]
    assert len(split(items, 11, whole=True)) == 3 - 1
