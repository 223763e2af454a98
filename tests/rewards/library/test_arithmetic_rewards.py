"""The arithmetic rubric and the reading of numbers."""

import re
import time
from decimal import Decimal

import pytest

from posttrain.rewards.library.arithmetic import arithmetic, number_detected, right_number
from posttrain.rewards.library.numbers import last_number, whole_number_text
from posttrain.rewards.rubric import Rubric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number", None),
        ("4", "4"),
        ("2 + 2 = 4.", "4"),
        ("it is 1,080 dollars", "1080"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("3-4", "4"),
        ("3 - -4", "-4"),
        ("x=-4", "-4"),
        ("a-4", "4"),
        ("\u22124", "-4"),
        ("-.5", "-0.5"),
        ("1.5.2", "0.2"),
        ("007", "7"),
        ("1,", "1"),
        ("2²", "2"),
        ("\u0664", None),
        ("4\x00", "4"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"), [("$1,080.", "1080"), (" 4 ", "4"), ("4 5", None), ("", None), ("1,0", None), ("4%", None), ("-3", "-3")]
)
def test_a_text_that_is_a_number(text, number):
    assert whole_number_text(text) == (None if number is None else Decimal(number))


def test_a_plain_reader_of_integers_agrees_on_random_text():
    import random

    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("0123456789 ab#=") for _ in range(12))
        plain = re.findall("[0-9]+", text)
        assert last_number(text) == (Decimal(plain[-1]) if plain else None)


@pytest.mark.parametrize(
    ("completion", "detected", "right"),
    [
        ("15|08#85", 1.0, 3.0),
        ("015|08|#75", 1.0, -3.0),
        ("85#", -1.0, -3.0),
        ("The answer is 85.", 1.0, 3.0),
        ("85 84 83", 1.0, -3.0),
        ("<answer>85</answer> 12", 1.0, 3.0),
        ("#### 85", 1.0, 3.0),
        ("eighty-five", -1.0, -3.0),
        ("", -1.0, -3.0),
    ],
)
def test_the_final_answer_is_judged(completion, detected, right):
    assert number_detected(completion) == detected
    assert right_number(completion, "85") == right


@pytest.mark.parametrize("gold", [85, 85.0, "85", "85.0", " 85\n", "$85", "85.", "#### 85", "80 + 5 = <<80+5=85>>85\n#### 85", "####85\n", "8.5e1"])
def test_the_gold_answer_may_be_number_or_text(gold):
    assert right_number("85", gold) == 3.0


@pytest.mark.parametrize("gold", [None, "", " ", "#### ", "unknown", "1/85", "10^85", "85 %", "12 or 85", "x = 85", "#### 1/85", "3,85"])
def test_a_row_without_a_gold_number_is_not_scored(gold):
    assert right_number("85", gold) is None


def test_the_rubric_goes_from_minus_four_to_four():
    assert Rubric(*arithmetic()).range == (-4.0, 4.0)


@pytest.mark.parametrize("text", ["9" * 100_000, "1,234" * 20_000, "1," * 50_000, "1." * 50_000, "-" * 100_000, "#" * 100_000, "\x00" * 100_000])
def test_long_texts_are_read_quickly(text):
    started = time.process_time()
    number_detected(text)
    right_number(text, "85")
    assert time.process_time() - started < 1.0
