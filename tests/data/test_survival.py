"""What a chat template drops is found by its shape, said in a sentence, and costs little."""

import copy
import logging
import time

import pytest

from posttrain.data import survival
from posttrain.data.chat import encode_prompt
from posttrain.data.spelling import remembered
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError

USER = {"role": "user", "content": "what is 2+2?"}


@pytest.fixture
def tokenizer():
    return copy.deepcopy(train_bpe(["what is 2+2?"] * 3, 300))


def test_a_keyword_that_the_template_does_not_read_is_refused(tokenizer):
    tokenizer.chat_template += "{% if enable_thinking is defined %}{% endif %}"
    encode_prompt(tokenizer, [USER], enable_thinking=False)
    with pytest.raises(UserError, match=r"does not read the keyword 'enable_thinkin'.*Did you mean 'enable_thinking'"):
        encode_prompt(tokenizer, [USER], enable_thinkin=False)


def test_an_unknown_key_of_messages_is_said_once(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "posttrain"):
        for _ in range(3):
            encode_prompt(tokenizer, [{**USER, "timestamp": "now"}])
    assert [record.getMessage() for record in caplog.records] == [
        "messages have the key 'timestamp', which the chat template does not write: it is not read"
    ]


def test_a_key_that_the_template_writes_is_taken(tokenizer, caplog):
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "(message['mood'] or '') + message['content']")
    with caplog.at_level(logging.WARNING, "posttrain"):
        assert "happy" in tokenizer.decode(encode_prompt(tokenizer, [{**USER, "mood": "happy"}]))
    assert not caplog.records


def test_a_message_that_is_left_out_is_refused_by_its_number(tokenizer):
    tokenizer.chat_template = "{% if messages[0].role == 'user' %}" + tokenizer.chat_template + "{% else %}nothing{% endif %}"
    encode_prompt(tokenizer, [USER])
    with pytest.raises(UserError, match=r"drops the content of message 0 \(system\)"):
        encode_prompt(tokenizer, [{"role": "system", "content": "be brief"}, USER])


def test_a_part_that_makes_a_template_refuse_its_mark_was_read(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{% if m.content != 'ok' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    assert tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "ok"}])) == "ok"


def test_rows_of_one_shape_are_asked_about_once(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(survival, "_problem", lambda *given: asked.append(given))
    for number in range(20):
        encode_prompt(tokenizer, [{"role": "user", "content": f"what is {number}?"}])
    assert len(asked) == 1


def test_another_template_is_asked_anew(tokenizer):
    assert [remembered(tokenizer, "x", lambda: 1), remembered(tokenizer, "x", lambda: 2)] == [1, 1]
    tokenizer.chat_template += " "
    assert remembered(tokenizer, "x", lambda: 2) == 2


def test_a_thousand_rows_cost_a_fraction_of_their_encoding(tokenizer):
    rows = [[USER, {"role": "assistant", "content": f"it is {number}, " * 20}, USER] for number in range(1000)]
    started = time.process_time()
    for row in rows:
        survival.check_survives(tokenizer, row, {"add_generation_prompt": True})
    checking = time.process_time() - started
    started = time.process_time()
    for row in rows:
        encode_prompt(tokenizer, row)
    assert checking < 0.5 * (time.process_time() - started)
