"""Chat templates for base models: ours, a file's, another tokenizer's; and models that grow where tokens were added."""

import pytest
from small import build_model

from posttrain.data.chat import encode_example, render
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError
from posttrain.models.templates import BUILT_IN, grow_embeddings, set_chat_template, set_eos_token

TALK = [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2?"}]


@pytest.fixture
def tokenizer():
    made = train_bpe(["2+2? 4"], 290)
    made.chat_template = None
    made.eos_token = "<|endoftext|>"
    return made


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_ends_replies_and_opens_them(tokenizer, name):
    set_chat_template(tokenizer, name, "<think it's\n>")
    prompt, completion = encode_example(tokenizer, TALK, "<think it's\n>2 and 2 is 4")
    assert tokenizer.decode(prompt).endswith("<think it's\n>")
    assert tokenizer.decode(completion) == "2 and 2 is 4" + tokenizer.eos_token


def test_plain_needs_no_new_tokens(tokenizer):
    before = len(tokenizer)
    assert not set_chat_template(tokenizer, "plain")
    assert len(tokenizer) == before
    assert (
        render(tokenizer, [*TALK, {"role": "assistant", "content": "4"}])
        == "### System:\nadd\n\n### User:\n2+2?\n\n### Assistant:\n4<|endoftext|>\n\n"
    )


def test_chatml_adds_the_tokens_that_are_missing_and_the_model_grows():
    from small import build_tokenizer

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    assert set_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    grow_embeddings(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == len(tokenizer) == before.shape[0] + 2
    assert (after[: len(before)] == before).all()
    grow_embeddings(model, tokenizer)  # nothing left to do
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_a_file_and_another_tokenizer_give_their_template(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    set_chat_template(tokenizer, str(tmp_path / "own.jinja"))
    assert render(tokenizer, TALK) == "add"
    train_bpe(["a"], 270).save_pretrained(tmp_path / "other")
    set_chat_template(tokenizer, str(tmp_path / "other"))
    assert render(tokenizer, TALK).startswith("<|im_start|>system")


@pytest.mark.parametrize(
    ("source", "opening", "sentence"),
    [
        ("./none.jinja", None, "no chat template at"),
        ("./nowhere", None, "no model directory"),
        ("own.jinja", "<think>", "reply_opening is written into"),
    ],
)
def test_what_cannot_be_found_is_named(tokenizer, source, opening, sentence):
    with pytest.raises(UserError, match=sentence):
        set_chat_template(tokenizer, source, opening)


def test_an_end_token_must_be_a_token(tokenizer):
    set_eos_token(tokenizer, "<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(UserError, match="is not a token of this tokenizer"):
        set_eos_token(tokenizer, "<|stop|>")
