"""Rows become tasks, or a sentence."""

import pytest

from posttrain.data.prompts import Template, to_tasks, validate_prompts
from posttrain.errors import UserError

CHAT = [{"role": "user", "content": "hi"}]


def test_a_template_keeps_the_rows_columns_and_adds_its_own():
    rows = [{"question": "q", "answer": "so #### 4", "level": 1}]
    made = Template("Q: {question}", {"answer": "{answer|after:####}", "raw": "{answer}"}).apply(rows, chat=True)
    assert made == [{"question": "q", "answer": "4", "level": 1, "raw": "so #### 4", "prompt": "Q: q"}]
    assert rows == [{"question": "q", "answer": "so #### 4", "level": 1}]


def test_a_system_text_makes_a_conversation_where_there_is_a_chat_template():
    rows = [{"prompt": "q"}]
    assert Template(system="be brief").apply(rows, chat=True)[0]["prompt"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
    ]
    assert Template(system="be brief").apply(rows, chat=False)[0]["prompt"] == "be brief\n\nq"
    assert Template(system="be brief").apply([{"prompt": CHAT}], chat=False)[0]["prompt"] == [{"role": "system", "content": "be brief"}, *CHAT]


def test_two_system_texts_are_refused():
    with pytest.raises(UserError, match="have their own"):
        Template(system="a").apply([{"prompt": [{"role": "system", "content": "b"}, *CHAT]}], chat=True)


def test_templates_work_on_a_datasets_dataset():
    import datasets

    rows = Template("{q}").apply(datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}]), chat=False)
    assert [task.prompt for task in to_tasks(rows)] == ["a", "b"]


def test_a_template_that_asks_for_a_missing_column_is_explained():
    with pytest.raises(UserError, match="template of 'prompt' asks for the column 'qestion'; the data has: question"):
        Template("{qestion}").apply([{"question": "x"}], chat=False)


def test_tasks_are_numbered_and_keep_every_column_but_the_prompt():
    tasks = to_tasks([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}])
    assert [(task.id, task.prompt, task.columns) for task in tasks] == [(0, "a", {"answer": 1}), (1, "b", {"answer": 2})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"promt": "x"}], "row 0 has no column 'prompt'; it has: promt. Did you mean 'promt'"),
        ([{"prompt": "x"}, {"answer": "x"}], "row 1 has no column 'prompt'"),
        ([{"prompt": "x"}, {"prompt": CHAT}], "row 0's prompt is text, row 1's is a conversation"),
        ([{"prompt": "x"}, {"prompt": ""}], "row 1: its prompt is empty"),
        ([{"prompt": []}], "row 0: its conversation has no messages"),
        ([{"prompt": None}], "row 0: its prompt is NoneType"),
        ([{"prompt": 3}], "row 0: its prompt is int"),
        ([{"prompt": ["hi"]}], "row 0: a message is"),
        ([{"prompt": [{"role": "user"}]}], "row 0: the user's message in 'prompt' has no text"),
        ([{"prompt": [{"role": "user", "content": None}]}], "row 0: the user's message in 'prompt' has no text"),
        ([{"prompt": [{"role": "user", "content": {"text": "hi"}}]}], "row 0, column 'prompt': a message's content is a dict"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}], "row 0, column 'prompt': a message holds .*only text"),
    ],
)
def test_what_is_not_a_prompt_is_explained_with_its_row(rows, message):
    with pytest.raises(UserError, match=message):
        validate_prompts(rows)
    with pytest.raises(UserError, match=message):
        to_tasks(rows)
