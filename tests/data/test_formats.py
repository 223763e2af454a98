"""Formats of training data: every one of the table is recognised, and every way to get one wrong is a sentence with the row."""

import numpy as np
import pytest

from posttrain.data import formats
from posttrain.data.formats import FormatCheck, detect_format, is_conversational, validate_rows
from posttrain.errors import UserError

USER = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}

TABLE = [
    (formats.TEXT, {"text": "2+2=4"}),
    (formats.MESSAGES, {"messages": [USER, FOUR]}),
    (formats.PROMPT_ONLY, {"prompt": "2+2?"}),
    (formats.PROMPT_ONLY, {"prompt": [USER]}),
    (formats.PROMPT_COMPLETION, {"prompt": "2+2?", "completion": "4"}),
    (formats.PROMPT_COMPLETION, {"prompt": [USER], "completion": [FOUR]}),
    (formats.PREFERENCE, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
    (formats.PREFERENCE, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
    (formats.IMPLICIT_PREFERENCE, {"chosen": "2+2? 4", "rejected": "2+2? 5"}),
    (formats.IMPLICIT_PREFERENCE, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
    (formats.UNPAIRED_PREFERENCE, {"prompt": "2+2?", "completion": "4", "label": True}),
    (formats.UNPAIRED_PREFERENCE, {"prompt": [USER], "completion": [FOUR], "label": np.bool_(False)}),
    (formats.STEPWISE, {"prompt": "2+2?", "completions": ["2+2", "=4"], "labels": [True, True]}),
]


@pytest.mark.parametrize(("format", "row"), TABLE)
def test_every_format_of_the_table_is_detected_and_valid(format, row):
    assert detect_format(row) is format
    assert validate_rows([row, dict(row)]) is format
    assert validate_rows([{**row, "answer": "4"}]) is format  # further columns change nothing


@pytest.mark.parametrize(("format", "row"), TABLE)
def test_conversational_rows_are_those_with_messages(format, row):
    assert is_conversational(row) == any(isinstance(value, list) and isinstance(value[0], dict) for value in row.values())


def test_a_trainer_takes_the_format_it_needs_of_a_richer_row():
    row = {"prompt": "2+2?", "completion": "4", "label": True}
    assert detect_format(row, (formats.PROMPT_COMPLETION, formats.TEXT)) is formats.PROMPT_COMPLETION
    assert detect_format(row, (formats.PROMPT_ONLY,)) is formats.PROMPT_ONLY


def test_text_after_a_conversation_is_a_reply():
    assert validate_rows([{"prompt": [USER], "completion": "4"}]) is formats.PROMPT_COMPLETION


PAIR = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
WRONG = [
    ({**PAIR, "rejected": "5"}, "row 1: column `chosen` holds messages, `rejected` holds text"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "column `prompt` is mixed: row 0 holds messages, row 1 holds text"),
    ({**PAIR, "prompt": "2+2?"}, "column `prompt` holds text, `chosen` holds messages"),
    ({**PAIR, "chosen": None}, "row 1 has no 'chosen', which row 0 has"),
    ({**PAIR, "chosen": [{"role": "assistant", "content": ""}]}, "row 1: its chosen is empty"),
    ({**PAIR, "chosen": []}, "row 1: its chosen is empty"),
    ({**PAIR, "prompt": []}, "row 1: its prompt is empty"),
    ({**PAIR, "chosen": [FOUR, USER]}, "ends with the role 'user'; the last message must be the assistant's"),
    ({**PAIR, "chosen": 4}, "column `chosen` holds a int"),
    ({**PAIR, "prompt": [{"from": "human", "value": "2+2?"}]}, "convert them with posttrain.data.convert.maybe_convert_to_chatml"),
    ({**PAIR, "prompt": [{"content": "2+2?"}]}, 'a message is {"role": "user", "content": "..."}'),
    ({**PAIR, "prompt": [{"role": "user", "content": None}]}, "the user's message in 'prompt' has no text"),
    ({**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "only text can be trained on"),
    ({**PAIR, "images": ["a.png"]}, "has the column 'images': only text"),
    ({**PAIR, "margin": "big"}, "its margin is 'big'; a margin is a number"),
    ({**PAIR, "tools": "[{"}, "its tools are not valid JSON"),
    ({**PAIR, "tools": ["add"]}, "must be a list of JSON schemas"),
]


@pytest.mark.parametrize(("row", "sentence"), WRONG)
def test_what_is_wrong_with_a_pair_is_said_with_its_row(row, sentence):
    with pytest.raises(UserError) as raised:
        validate_rows([PAIR, row])
    assert sentence in str(raised.value)


@pytest.mark.parametrize("label", [1, 0, "true", "yes", 0.5])
def test_a_label_that_is_no_boolean_is_refused(label):
    with pytest.raises(UserError, match=r"a label is true .* or false"):
        validate_rows([{"prompt": "2+2?", "completion": "4", "label": label}])


def test_a_missing_label_is_refused():
    rows = [{"prompt": "2+2?", "completion": "4", "label": True}, {"prompt": "2+2?", "completion": "4", "label": None}]
    with pytest.raises(UserError, match="row 1 has no 'label'"):
        validate_rows(rows)


@pytest.mark.parametrize("completion", ["", "  \n"])
def test_an_empty_completion_is_refused(completion):
    with pytest.raises(UserError, match=r"row 1: its completion is (empty|only white space); there is nothing to learn"):
        validate_rows([{"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": completion}])


def test_duplicate_ids_are_refused_with_both_rows():
    rows = [{"id": "a", "prompt": "1"}, {"id": "b", "prompt": "2"}, {"id": "a", "prompt": "3"}]
    with pytest.raises(UserError, match="row 2 has the id 'a', which row 0 has too"):
        validate_rows(rows)


def test_a_misspelt_column_is_pointed_at():
    with pytest.raises(UserError) as raised:
        validate_rows([{"prompt": "2+2?", "chosen": "4", "rejcted": "5"}], (formats.PREFERENCE,), "DPO")
    assert str(raised.value) == (
        "DPO needs rows with the columns (prompt, chosen, rejected); the data has: prompt, chosen, rejcted. For 'rejected', did you mean 'rejcted'?"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "sentence"),
    [
        ([USER, FOUR], [USER, FOUR, USER, FIVE], "begins with the whole other"),
        ([USER, FOUR], [{"role": "user", "content": "?"}, FIVE], "no prompt in common"),
    ],
)
def test_an_implicit_prompt_must_exist_and_leave_something(chosen, rejected, sentence):
    with pytest.raises(UserError, match=sentence):
        validate_rows([{"chosen": chosen, "rejected": rejected}])


def test_steps_and_labels_must_match():
    with pytest.raises(UserError, match="one boolean for each of the 2 steps"):
        validate_rows([{"prompt": "2+2?", "completions": ["2+2", "=4"], "labels": [True]}])


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="the dataset has no rows"):
        validate_rows([])


def test_a_tool_call_needs_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
    assert (
        validate_rows([{"prompt": [USER], "completion": [call], "tools": '[{"type": "function", "function": {"name": "add"}}]'}])
        is formats.PROMPT_COMPLETION
    )


def test_a_stream_is_checked_row_by_row():
    check = FormatCheck((formats.TEXT,), "SFT")
    assert check({"text": "a"}) is formats.TEXT
    with pytest.raises(UserError, match="row 1: column `text` holds a int"):
        check({"text": 5})
