"""YAML values against annotations, written both ways that dataclasses have them."""

import dataclasses
import typing
from typing import Any, ClassVar

import pytest

from posttrain.cli.values import read_settings, typed
from posttrain.errors import UserError


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-6", float, 1e-6),
        ("1e-6", "float | None", 1e-6),
        ("5", "typing.Optional[float]", 5.0),
        (3, float, 3),
        (None, "int | None", None),
        (None, typing.Any, None),
        ("anything", "Any", "anything"),
        ("steps", "transformers.trainer_utils.IntervalStrategy | str", "steps"),
        (["a"], "None | str | list[str]", ["a"]),
        ({"a": 1}, "dict[str, typing.Any] | str | None", {"a": 1}),
        (True, "bool | None", True),
        (False, "typing.Union[str, NoneType, typing.Literal[False]]", False),
    ],
)
def test_a_value_that_fits_passes_and_text_becomes_a_number_where_one_is_wanted(value, annotation, expected):
    assert typed(value, annotation, "train.x") == expected


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("much", float, "train.x must be a number, not 'much'"),
        ("5", "int", "train.x must be a whole number"),
        (1.5, int, "train.x must be a whole number"),
        (True, int, "train.x must be a whole number"),
        ("yes", bool, "train.x must be true or false"),
        (1, "bool | None", "train.x must be true or false"),
        (None, int, "train.x is empty"),
        (3, "str | None", "train.x must be text"),
        ([1], "dict | None", "train.x must be a mapping"),
    ],
)
def test_a_value_that_does_not_fit_is_named(value, annotation, message):
    with pytest.raises(UserError, match=message):
        typed(value, annotation, "train.x")


@dataclasses.dataclass
class Config:
    refused: ClassVar[dict[str, Any]] = {"repetition_penalty": (1.0, "not built")}
    unused: ClassVar[dict[str, Any]] = {"use_vllm": (False, "one model")}
    beta: float = 0.0


def test_names_that_the_config_refuses_are_left_to_it():
    assert read_settings("train", {"use_vllm": True, "repetition_penalty": 2, "beta": "1e-2"}, Config, "GRPO") == {
        "use_vllm": True,
        "repetition_penalty": 2,
        "beta": 0.01,
    }
    with pytest.raises(UserError, match=r"train\.beta_kl is not a setting of GRPO\. Did you mean train\.beta\?"):
        read_settings("train", {"beta_kl": 1}, Config, "GRPO")
