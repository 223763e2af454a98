"""Rows that hold token ids already, and replies that a template leaves without an end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import build_tokenizer

from posttrain.data.examples import ExampleMaker, ExampleOptions
from posttrain.errors import NothingToLearn, UserError

OPEN_ENDED = "{% for m in messages %}{{ m['content'] }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"


def make(row: dict[str, Any], **options: Any) -> tuple[list[int], list[int]]:
    example = ExampleMaker(build_tokenizer(), ExampleOptions(**options))(row)
    return list(example.ids), list(example.trained)


@pytest.mark.parametrize(
    ("columns", "trained"),
    [
        ({}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 3, 4]}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 0, 1, 1]}, [0, 0, 1, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, [0, 1, 0, 1]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [0, 0, 0, 1]),
    ],
)
def test_labels_and_masks_say_what_is_trained(columns, trained):
    assert make({"input_ids": [1, 2, 3, 4], **columns}) == ([1, 2, 3, 4], trained)


def test_padding_is_left_out_and_long_rows_are_cut():
    row = {"input_ids": torch.tensor([0, 0, 1, 2, 3]), "attention_mask": [0, 0, 1, 1, 1]}
    assert make(row) == ([1, 2, 3], [0, 1, 1])
    assert make(row, max_length=2) == ([1, 2], [0, 1])


def test_the_mask_of_completions_counts_unless_the_prompt_is_trained_too():
    row = {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}
    assert make(row, completion_only=False) == ([1, 2, 3], [0, 1, 1])


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, {}, "row 0: its labels has 1 entries for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, {}, "a label is the token itself"),
        ({"input_ids": [1, 2]}, {"assistant_only": True}, "assistant_masks"),
        ({"input_ids": [1, 2]}, {"completion_only": True}, "completion_mask"),
        ({"input_ids": "12"}, {}, "a list of whole numbers"),
        ({"input_ids": [[1, 2]]}, {}, "a list of whole numbers"),
    ],
)
def test_columns_that_do_not_belong_together_are_refused(row, options, said):
    with pytest.raises(UserError, match=said):
        make(row, **options)


def test_a_row_without_a_trained_token_teaches_nothing():
    with pytest.raises(NothingToLearn, match="none of its tokens is trained"):
        make({"input_ids": [1, 2], "labels": [-100, -100]})


@pytest.mark.parametrize(
    ("row", "options", "ids", "trained"),
    [
        ({"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "+2"}]}, {}, "1=+2=", 3),
        ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "+2"}]}, {}, "1=+2=", 5),
        ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "+2"}]}, {"assistant_only": True}, "1=+2=", 3),
    ],
)
def test_a_reply_without_an_end_is_refused_or_ended(row, options, ids, trained):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = OPEN_ENDED
    with pytest.raises(UserError, match="append_eos=True"):
        ExampleMaker(tokenizer, ExampleOptions(**options))(row)
    example = ExampleMaker(tokenizer, ExampleOptions(append_eos=True, **options))(row)
    assert tokenizer.decode(list(example.ids)) == ids + "<end>"
    assert example.trained[-1] == 1
    assert example.targets == trained
