"""Exact and numeric answers, and proximity."""

import itertools
import math
from decimal import Decimal

import pytest

from posttrain.errors import UserError
from posttrain.rewards.library.answers import exact_answer, numeric_answer
from posttrain.rewards.library.numbers import is_near, last_number, relative_error, whole_number_text
from posttrain.rewards.library.proximity import proximity


@pytest.mark.parametrize(
    ("said", "gold", "is_right"),
    [
        ("Paris", "Paris", True),
        ("<answer> Paris\n</answer>", "Paris", True),
        ("# Paris", " Paris ", True),
        ("New\n York", "New York", True),
        ("paris", "Paris", False),
        ("Paris!", "Paris", False),
        ("", "Paris", False),
        ("4", 4, True),
        ("14", "4", False),
        ("Paris", None, None),
        ("<answer></answer>", "", None),
        ("Paris", " \n", None),
    ],
)
def test_an_exact_answer_is_the_gold_text_but_for_white_space(said, gold, is_right):
    assert exact_answer()(said, gold) is is_right


def test_case_can_be_ignored():
    assert exact_answer(ignore_case=True)("STRASSE", "straße") is True


def test_with_tags_there_is_no_answer_outside_of_them():
    judge = exact_answer(tags=["<SOLUTION>", "</SOLUTION>"])
    assert judge("4", "4") is False
    assert judge("<SOLUTION>5</SOLUTION> so <SOLUTION>4</SOLUTION>!", "4") is True
    assert judge("<SOLUTION>4", "4") is True


@pytest.mark.parametrize(
    ("said", "gold", "is_right"),
    [
        ("4", "4", True),
        ("4.0", "4", True),
        ("$1,080.", "1080", True),
        ("1.08e3", "1080", True),
        ("-4", "−4", True),
        ("14", "4", False),
        ("4 or 5", "4", False),
        ("inf", "4", False),
        ("nan", "4", False),
        ("1e999", "4", False),
        ("1e999999999999999999999", "4", False),
        ("9" * 5000, "4", False),
        ("٤", "4", False),
        ("", "4", False),
        ("4", "four", None),
        ("4", "3/4", None),
        ("6", "10^6", None),
        ("4", "", None),
        ("4", "1 + 3 is\n#### 4", True),
        ("4", None, None),
    ],
)
def test_a_numeric_answer_is_nothing_but_the_gold_number(said, gold, is_right):
    assert numeric_answer()(said, gold) is is_right


def test_anywhere_reads_the_last_number():
    assert numeric_answer(anywhere=True)("first 5, then 4 apples", "4") is True
    assert numeric_answer(anywhere=True)("4, no, 5", "4") is False


def test_tolerance_is_absolute_and_relative_is_a_fraction_of_the_gold_number():
    assert numeric_answer(tolerance=0.5)("4.5", "4") is True
    assert numeric_answer(tolerance=0.5)("4.51", "4") is False
    assert numeric_answer(relative=0.1)("110", "100") is True
    assert numeric_answer(relative=0.1)("89.9", "100") is False
    assert numeric_answer(relative=0.1)("0.001", "0") is False
    assert numeric_answer(tolerance=1e-2)("1e999", "4") is False


@pytest.mark.parametrize(
    "settings", [{"tolerance": -1}, {"relative": float("inf")}, {"tolerance": float("nan")}, {"tags": "<a>"}, {"tags": ["<a>", "<a>"]}]
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(UserError):
        numeric_answer(**settings)


def test_proximity_at_the_gold_number_halfway_and_far_off():
    score = proximity()
    assert score("10", "10") == 1.0
    assert score("5", "10") == 0.0
    assert score("20", "10") == score("0", "10") == score("1e999", "10") == -1.0
    assert score("no number", "10") == -1.0
    assert score("inf", "10") == -1.0
    assert score("9", "10") > score("3", "10")
    assert score("9", None) is None
    assert score("9", "1/9") is None


@pytest.mark.parametrize("gold", [-12, 0, 0.25, 7, 1e6])
def test_proximity_is_monotone_symmetric_and_bounded(gold):
    score = proximity(low=-2, high=3, outlier=0.5)
    errors = [0, 1e-6, 0.01, 0.1, 0.3, 0.49, 0.5, 0.6, 2, 1e9]
    scale = Decimal(str(gold)) if gold else Decimal(1)
    above = [score(f"{Decimal(str(gold)) + abs(scale) * Decimal(str(error)):f}", gold) for error in errors]
    below = [score(f"{Decimal(str(gold)) - abs(scale) * Decimal(str(error)):f}", gold) for error in errors]
    assert above == pytest.approx(below, abs=1e-12)
    assert all(near > far for near, far in itertools.pairwise(above[:7]))
    assert above[0] == 3
    assert above[6:] == [-2] * 4


def test_proximity_reads_its_tags():
    score = proximity(tags=["<SOLUTION>", "</SOLUTION>"])
    assert score("10", "10") == -1.0
    assert score("99 <SOLUTION>10</SOLUTION> 99", "10") == 1.0


@pytest.mark.parametrize("settings", [{"low": 1.0}, {"outlier": 0}, {"outlier": float("inf")}])
def test_proximity_refuses_an_empty_range(settings):
    with pytest.raises(UserError):
        proximity(**settings)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", "1000"), ("2.5E-1", "0.25"), ("1e3f", "3"), ("e5", "5"), ("1,234e2", "123400"), ("4,e2", "2"), ("1e", "1")],
)
def test_exponents_are_read_where_they_are_exponents(text, number):
    assert last_number(text) == Decimal(number)


def test_an_exponent_beyond_decimals_is_no_number():
    assert last_number("1e9999999999999999999999") is None
    assert whole_number_text("1e9999999999999999999999") is None


def test_errors_are_those_of_plain_floats():
    for said, gold in [(3, 10), (17, 10), (-5, 5), (0.1, 0.3), (2, 0), (-2, 0)]:
        plain = abs(said - gold) / abs(gold) if gold else abs(said)
        assert relative_error(Decimal(str(said)), Decimal(str(gold))) == pytest.approx(plain)
    assert relative_error(Decimal("1e999999"), Decimal("1e-999999")) == math.inf
    assert not is_near(Decimal("1e999999"), Decimal("-1e999999"), relative=1.9)
