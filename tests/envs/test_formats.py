import json
import random
import time

import pytest
from talk import ENDLESS, HERMES, LLAMA, MISTRAL, THINKING, XML, build_talker

from posttrain.envs.formats import FORMATS, find_parser
from posttrain.errors import UserError


def calls_of(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]


@pytest.mark.parametrize(("template", "name"), [(HERMES, "hermes"), (THINKING, "hermes"), (LLAMA, "plain"), (MISTRAL, "mistral"), (XML, "xml")])
def test_a_models_format_is_found_in_its_template_and_reads_what_the_template_writes(template, name):
    tokenizer = build_talker(template)
    parse = find_parser(tokenizer)
    assert parse == FORMATS[name].parse
    call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": {"where": "in the <box>"}}}
    prompt = [{"role": "user", "content": "Where?"}]
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False)
    said = whole[len(before) :].partition("<|im_end|>")[0].replace("<think>\n\n</think>\n\n", "")
    message = parse(said)
    assert calls_of(message) == [("look", {"where": "in the <box>"})]
    assert "malformed_calls" not in message


def test_a_model_without_tools_is_refused_unless_its_format_is_named():
    tokenizer = build_talker(ENDLESS)
    with pytest.raises(UserError, match="call_format"):
        find_parser(tokenizer)
    assert find_parser(tokenizer, "plain") == FORMATS["plain"].parse
    with pytest.raises(UserError, match="Did you mean 'hermes'"):
        find_parser(tokenizer, "hermse")


GOOD = {
    "hermes": 'I look.<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "g", "arguments": "{}"}</tool_call> Wait.',
    "xml": "I look.<tool_call><function=f>\n<parameter=a>\n1\n</parameter>\n</function></tool_call><tool_call><function=g></function></tool_call> Wait.",
    "glm": "I look.<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><tool_call>g</tool_call> Wait.",
    "mistral": 'I look. Wait.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
    "plain": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
}


@pytest.mark.parametrize("name", GOOD)
def test_calls_and_the_words_around_them(name):
    message = FORMATS[name].parse(GOOD[name])
    value = "1" if name in ("xml", "glm") else 1
    assert calls_of(message) == [("f", {"a": value}), ("g", {})]
    assert message["content"] == ("" if name == "plain" else "I look. Wait.")
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_mistrals_newer_calls_are_read():
    assert calls_of(FORMATS["mistral"].parse('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}')) == [("f", {"a": 1}), ("g", {})]


@pytest.mark.parametrize("text", ["The answer is 4.", "", '{"answer": 4}', "[1, 2]", '```json\n{"x": 1}\n```'])
@pytest.mark.parametrize("name", FORMATS)
def test_words_are_no_call(name, text):
    assert FORMATS[name].parse(text) == {"content": text.strip()}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', "not closed"),
        ("hermes", "<tool_call>f(1)</tool_call>", "not valid JSON"),
        ("hermes", "<tool_call>[1]</tool_call>", "JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '"name"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '"arguments"'),
        ("hermes", "<tool_call></tool_call>", "empty"),
        ("xml", "<tool_call>f</tool_call>", "function"),
        ("xml", "<tool_call><function=f>a=1</function></tool_call>", "cannot be read"),
        ("glm", "<tool_call>f<arg_key>a</arg_key></tool_call>", "cannot be read"),
        ("mistral", "[TOOL_CALLS]f{}", "not valid JSON"),
        ("mistral", "[TOOL_CALLS]f[ARGS]{", "not valid JSON"),
        ("plain", '{"name": "f", "parameters": {"a": }}', "not valid JSON"),
        ("plain", '<|python_tag|>print("hello")', "not valid JSON"),
    ],
)
def test_a_malformed_call_is_a_sentence(name, text, says):
    message = FORMATS[name].parse(text)
    assert "tool_calls" not in message
    assert len(message["malformed_calls"]) == 1
    assert says in message["malformed_calls"][0]


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_text_never_raises(name):
    rng = random.Random(0)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<function=",
        ">",
        "</function>",
        "<arg_key>",
        "</arg_key>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "{",
        "}",
        '"name"',
        ":",
        "[" * 30000,
    ]
    pieces += ["\0", "\ud800", "é", "9" * 6000, '{"name": "f", "arguments": {}}', "NaN", "Infinity", "<|python_tag|>", ";", "```json"]
    for _ in range(300):
        message = FORMATS[name].parse("".join(rng.choices(pieces, k=rng.randrange(1, 9))))
        json.dumps(message)


@pytest.mark.parametrize(
    "text",
    [
        "```" + " " * 20_000 + "x",
        "```json" + "\n" * 20_000 + "x",
        "[" + " " * 60_000 + "x",
        "<tool_call>f" + "<arg_key>a</arg_key><arg_value>" * 4_000 + "</tool_call>",
        "<tool_call><function=f>" + "<parameter=a>\n" * 8_000 + "</function></tool_call>",
        "[TOOL_CALLS]" + "[ARGS]" * 20_000,
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_long_text_is_read_in_no_time(name, text):
    started = time.process_time()
    FORMATS[name].parse(text)
    assert time.process_time() - started < 2


CALL = '{"name": "\\ud83d", "arguments": {"\\ud83d": ["\\ud83d", {"a": "\\ud83d\\ude00"}]}}'


@pytest.mark.parametrize(("name", "text"), [("hermes", f"<tool_call>{CALL}</tool_call>"), ("mistral", f"[TOOL_CALLS] [{CALL}]"), ("plain", CALL)])
def test_half_a_surrogate_pair_in_a_call_becomes_a_question_mark(name, text):
    """No tokenizer can hold one, and JSON writes it in plain ASCII."""
    assert text.isascii()
    assert calls_of(FORMATS[name].parse(text)) == [("?", {"?": ["?", {"a": "😀"}]})]
