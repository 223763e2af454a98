"""Conversions between formats: on a row, a list and a `datasets` dataset alike, against results written by hand."""

import datasets
import pytest

from posttrain.data import convert
from posttrain.data.tokenizer import train_bpe
from posttrain.errors import UserError

USER = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
ASKED, OPENED = "<|im_start|>user\n2+2?<|im_end|>\n", "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["2+2? 4"], 300)


CASES = [
    (convert.extract_prompt, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
    (convert.extract_prompt, {"chosen": "what is it? four", "rejected": "what is it? five"}, {"prompt": "what is it?", "chosen": " four", "rejected": " five"}),
    (convert.maybe_extract_prompt, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, None),
    (convert.maybe_extract_prompt, {"text": "a"}, None),
    (convert.maybe_extract_prompt, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
    (convert.maybe_convert_to_chatml, {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, {"messages": [USER, FOUR]}),
    (convert.maybe_convert_to_chatml, {"messages": [USER, FOUR]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("function", "row", "expected"), CASES)
def test_a_row_a_list_and_a_dataset_are_converted_alike(function, row, expected):
    expected = row if expected is None else expected
    assert function(row) == expected
    assert function([row, row]) == [expected, expected]
    converted = function(datasets.Dataset.from_list([row, row]))
    assert converted.to_list() == [expected, expected]
    assert set(converted.column_names) == set(expected)
    assert list(function(datasets.IterableDataset.from_generator(lambda: iter([row])))) == [expected]


TEMPLATED = [
    ({"messages": [USER, FOUR]}, {"text": f"{ASKED}{OPENED}4<|im_end|>\n"}),
    ({"prompt": [USER]}, {"prompt": ASKED + OPENED}),
    ({"prompt": [USER, {"role": "assistant", "content": "it is"}]}, {"prompt": f"{ASKED}{OPENED}it is"}),
    ({"prompt": [USER], "completion": [FOUR]}, {"prompt": ASKED + OPENED, "completion": "4<|im_end|>\n"}),
    ({"prompt": [USER], "completion": [FOUR], "label": True}, {"prompt": ASKED + OPENED, "completion": "4<|im_end|>\n", "label": True}),
    ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, {"prompt": ASKED + OPENED, "chosen": "4<|im_end|>\n", "rejected": "5<|im_end|>\n"}),
    ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {"chosen": f"{ASKED}{OPENED}4<|im_end|>\n", "rejected": f"{ASKED}{OPENED}5<|im_end|>\n"}),
]


@pytest.mark.parametrize(("row", "expected"), TEMPLATED)
def test_the_chat_template_makes_text_of_every_format(tokenizer, row, expected):
    assert convert.apply_chat_template(row, tokenizer) == expected
    assert convert.maybe_apply_chat_template(datasets.Dataset.from_list([row]), tokenizer).to_list() == [expected]


def test_text_is_left_alone_only_where_that_was_asked(tokenizer):
    assert convert.maybe_apply_chat_template({"prompt": "2+2?"}, tokenizer) == {"prompt": "2+2?"}
    with pytest.raises(UserError, match="takes conversations"):
        convert.apply_chat_template({"prompt": "2+2?"}, tokenizer)


def test_it_works_as_a_function_for_map(tokenizer):
    dataset = datasets.Dataset.from_list([{"prompt": [USER], "completion": [FOUR]}])
    mapped = dataset.map(convert.apply_chat_template, fn_kwargs={"tokenizer": tokenizer})
    assert mapped.to_list() == [{"prompt": ASKED + OPENED, "completion": "4<|im_end|>\n"}]


def test_tools_and_keywords_of_the_row_reach_the_template(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ mood }} {{ tools[0].name }} {{ messages[0].content }}"
    row = {"messages": [USER], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "glad"}}
    assert convert.apply_chat_template(row, made, mood="sad") == {"text": "glad add 2+2?"}
    assert convert.apply_chat_template({"messages": [USER]}, made, tools=[{"name": "sub"}], mood="sad") == {"text": "sad sub 2+2?"}


PAIRS = [{"prompt": "2+2?", "chosen": "4", "rejected": "5", "source": "a"}, {"prompt": "1+1?", "chosen": "2", "rejected": "3", "source": "b"}]
UNPAIRED = [
    {"prompt": "2+2?", "source": "a", "completion": "4", "label": True},
    {"prompt": "1+1?", "source": "b", "completion": "2", "label": True},
    {"prompt": "2+2?", "source": "a", "completion": "5", "label": False},
    {"prompt": "1+1?", "source": "b", "completion": "3", "label": False},
]


@pytest.mark.parametrize("function", [convert.unpair_preference_dataset, convert.maybe_unpair_preference_dataset])
def test_pairs_become_two_rows_each(function):
    assert function(PAIRS) == UNPAIRED
    dataset = datasets.Dataset.from_list(PAIRS)
    assert function(dataset).to_list() == UNPAIRED
    assert function(datasets.DatasetDict(train=dataset))["train"].to_list() == UNPAIRED
    assert list(function(dataset.to_iterable_dataset())) == UNPAIRED


def test_unpaired_data_stay_as_they_are():
    assert convert.maybe_unpair_preference_dataset(UNPAIRED) is UNPAIRED


def test_mixed_kinds_have_no_common_prompt():
    with pytest.raises(UserError, match="column `chosen` holds messages, `rejected` holds text"):
        convert.extract_prompt({"chosen": [USER, FOUR], "rejected": "5"})


def test_what_the_template_drops_is_refused_in_text_too():
    from posttrain.data.tokenizer import train_bpe

    tokenizer = train_bpe(["what"] * 3, 300)
    ask, tools = {"role": "user", "content": "what"}, [{"type": "function", "function": {"name": "f"}}]
    for row in ({"messages": [ask, {"role": "assistant", "content": "what"}]}, {"prompt": [ask]}):
        with pytest.raises(UserError, match="drops the tools"):
            convert.apply_chat_template({**row, "tools": tools}, tokenizer)
    with pytest.raises(UserError, match="weight 0, which text cannot say"):
        convert.apply_chat_template({"messages": [ask, {"role": "assistant", "content": "what", "weight": 0}]}, tokenizer)
