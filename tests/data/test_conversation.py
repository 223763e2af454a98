"""What the assistant writes, found in conversations under the chat templates of seven families, without knowing any of them."""

import importlib.util
from pathlib import Path

import pytest

from posttrain.data.chat import encode_continuation, encode_example, encode_prompt, render
from posttrain.data.conversation import encode_conversation
from posttrain.errors import UserError

_spec = importlib.util.spec_from_file_location("model_templates", Path(__file__).with_name("model_templates.py"))
templates = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(templates)
FAMILIES = templates.FAMILIES


def talk(*texts, system=None):
    messages = [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


TALK = talk("two and two?", "it is four", "and you?", "helpful, I am", "what?", "four")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def tokenizer(family):
    return templates.tokenizer_of(family)


def spans(tokenizer, ids, trained):
    """The runs of trained tokens as text."""
    found, run = [], []
    for id, is_trained in [*zip(ids, trained, strict=True), (None, False)]:
        if is_trained:
            run.append(id)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


@pytest.mark.parametrize("system", [None, "be helpful"])
def test_every_reply_is_trained_up_to_its_stop_token_and_nothing_else(family, tokenizer, system):
    messages = [*([{"role": "system", "content": system}] if system else []), *TALK]
    stops = templates.stop_ids_of(family, tokenizer)
    ids, trained = encode_conversation(tokenizer, messages, assistant_only=True, stop_ids=stops)
    end = tokenizer.decode([stops[-1]])
    replies = spans(tokenizer, ids, trained)
    assert [reply.replace("<think>\n\n</think>\n\n", "").strip() for reply in replies] == [
        m["content"] + end for m in TALK if m["role"] == "assistant"
    ]
    assert tokenizer.decode(ids) == render(tokenizer, messages)
    if family.bos:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_each_reply_follows_what_the_model_will_be_asked_with(family, tokenizer):
    """The tokens before a trained run are those of the prompt at that point of the conversation."""
    stops = templates.stop_ids_of(family, tokenizer)
    ids, trained = encode_conversation(tokenizer, TALK, assistant_only=True, stop_ids=stops)
    starts = [place for place in range(1, len(ids)) if trained[place] and not trained[place - 1]]
    for turn, start in zip((1, 3, 5), starts, strict=True):
        prompt = encode_prompt(tokenizer, TALK[:turn])
        opened = [] if family is not templates.DEEPSEEK_R1 else encode_continuation(tokenizer, "<think>\n")  # these data have no thoughts
        assert [*ids[:start], *opened] == prompt


def test_a_prompt_and_its_completion_are_the_conversation(family, tokenizer):
    stops = templates.stop_ids_of(family, tokenizer)
    prompt, completion = encode_example(tokenizer, TALK[:3], TALK[3:4], stop_ids=stops)
    whole = render(tokenizer, TALK[:4])
    assert tokenizer.decode([*prompt, *completion]) == whole[: whole.rfind(tokenizer.decode([stops[-1]])) + len(tokenizer.decode([stops[-1]]))]
    assert completion[-1] == stops[-1]
    if family is not templates.DEEPSEEK_R1:
        assert prompt == encode_prompt(tokenizer, TALK[:3])


THOUGHT = "<think>\nI add them\n</think>\n\nfour"


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_a_thought_is_trained_on_in_the_last_reply(name):
    tokenizer = templates.tokenizer_of(FAMILIES[name])
    prompt, completion = encode_example(tokenizer, TALK[:1], THOUGHT)
    assert prompt == encode_prompt(tokenizer, TALK[:1])
    assert tokenizer.decode(prompt + completion).endswith(THOUGHT + tokenizer.eos_token)
    assert tokenizer.decode(completion).startswith("<think>") == (name == "qwen3")  # R1's prompt opens it
    ids, trained = encode_conversation(tokenizer, talk("two and two?", THOUGHT), assistant_only=True)
    assert [*prompt, *completion] == ids[: len(prompt) + len(completion)]
    assert spans(tokenizer, ids, trained)[0] in (THOUGHT + tokenizer.eos_token, THOUGHT.removeprefix("<think>\n") + tokenizer.eos_token)


def test_thoughts_of_earlier_turns_stay_dropped_as_the_template_does_it():
    tokenizer = templates.tokenizer_of(FAMILIES["qwen3"])
    ids, trained = encode_conversation(tokenizer, talk("two and two?", THOUGHT, "and you?", THOUGHT), assistant_only=True)
    assert spans(tokenizer, ids, trained) == ["four<|im_end|>", THOUGHT + "<|im_end|>"]


def test_keywords_of_the_template_change_where_a_reply_begins():
    tokenizer = templates.tokenizer_of(FAMILIES["qwen3"])
    _, with_thought = encode_example(tokenizer, TALK[:1], "four")
    _, without = encode_example(tokenizer, TALK[:1], "four", enable_thinking=False)
    assert (tokenizer.decode(with_thought), tokenizer.decode(without)) == ("<think>\n\n</think>\n\nfour<|im_end|>", "four<|im_end|>")


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]}
USED = [*talk("two and two?"), CALL, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "it is four"}]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_calls_of_tools_are_trained_and_their_results_are_not(name):
    family = FAMILIES[name]
    tokenizer = templates.tokenizer_of(family)
    stops = templates.stop_ids_of(family, tokenizer)
    ids, trained = encode_conversation(tokenizer, USED, assistant_only=True, stop_ids=stops, tools=[{"name": "add"}])
    call, answer = spans(tokenizer, ids, trained)
    assert '"name": "add"' in call
    assert '"b": 2' in call
    assert answer == "it is four" + tokenizer.decode([stops[-1]])


def test_columns_of_none_do_not_reach_the_template():
    """A table gives every message the keys of all others."""
    tokenizer = templates.tokenizer_of(FAMILIES["llama3"])
    padded = [{**message, "tool_calls": message.get("tool_calls"), "name": None, "reasoning_content": None, "weight": None} for message in USED]
    padded[1]["tool_calls"] = [{"id": None, **CALL["tool_calls"][0], "function": {**CALL["tool_calls"][0]["function"], "strict": None}}]
    assert render(tokenizer, padded) == render(tokenizer, USED)


def test_a_null_argument_of_a_call_is_trained():
    tokenizer = templates.tokenizer_of(FAMILIES["qwen2.5"])
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}]}
    ids, trained = encode_conversation(tokenizer, [*talk("two?"), call], assistant_only=True)
    assert '"arguments": {"a": 2, "b": null}}' in spans(tokenizer, ids, trained)[0]


def test_a_template_that_writes_the_past_differently_is_refused():
    tokenizer = templates.tokenizer_of(FAMILIES["phi4"])
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    for messages in (TALK, TALK[:-1]):
        with pytest.raises(UserError, match="cannot be told apart"):
            encode_conversation(tokenizer, messages, assistant_only=True)


def test_a_wrong_end_token_is_named_and_can_be_given():
    """A base model whose tokenizer ends text with one token and whose template ends replies with another."""
    tokenizer = templates.tokenizer_of(FAMILIES["qwen2.5"])
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(
        UserError, match=r"the reply ends 'four<\|im_end\|>\\n', the tokenizer's end-of-sequence token is '<\|endoftext\|>'. Set eos_token"
    ):
        encode_example(tokenizer, TALK[:1], "four")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_example(tokenizer, TALK[:1], "four", stop_ids=[end])[1][-1] == end


def test_a_lost_part_of_a_reply_is_an_error():
    tokenizer = templates.tokenizer_of(FAMILIES["deepseek-r1"])
    reply = {"role": "assistant", "content": "four", "reasoning_content": "I add them"}
    with pytest.raises(UserError, match=r"drops the thought .reasoning_content. of message 1"):
        encode_example(tokenizer, TALK[:1], [reply])


def test_words_keep_their_beginning_where_a_tokenizer_marks_it():
    """A tokenizer of the Llama 2 kind puts a mark of a word's beginning before any text; a continuation has none unless it begins with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: id for id, token in enumerate(["</s>", "▁a", "a", "▁b", "b", "<unk>"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert tokenizer("a b")["input_ids"] == [1, 3]
    assert encode_continuation(tokenizer, "b") == [4]
    assert encode_continuation(tokenizer, " b") == [3]
