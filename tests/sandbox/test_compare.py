"""Equality outside of the program: that of Python for plain data, but for tuples in lists and for tolerance."""

import math
import time
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction

import pytest

from posttrain.sandbox.compare import read_answer, same_output, same_value
from posttrain.sandbox.inside.plain import encode

VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.0,
    0.5,
    "1",
    "",
    "a",
    [],
    [1],
    [1, 2],
    [2, 1],
    {},
    {"a": 1},
    {"a": 2},
    {1: 1},
    {1, 2},
    {2, 1, 3},
    b"a",
    2**70,
    2**70 + 1,
    1j,
    1 + 0j,
    Fraction(1),
    Fraction(1, 2),
    Fraction(1, 3),
    Decimal("1.0"),
    Decimal("0.5"),
    Decimal(2**70),
    Decimal("1e400"),
    math.inf,
    Decimal("Infinity"),
    {"a": 1}.keys(),
    {"a": 1}.items(),
    {"a"},
    {("a", 1)},
    {Fraction(1), Decimal("0.5"), 3},
    {1, 0.5, 3 + 0j},
    Counter("a"),
    bytearray(b"a"),
    range(1, 3),
    range(1, 4, 2),
    range(1, 5, 2),
    range(0),
    range(5, 5),
    deque([1]),
]


@pytest.mark.parametrize("expected", VALUES, ids=repr)
def test_it_agrees_with_python(expected):
    assert [got for got in VALUES if same_value(encode(expected), encode(got), 0.0) != (expected == got)] == []


@pytest.mark.parametrize(
    ("expected", "got", "is_same"),
    [
        ([1, [2]], (1, (2,)), True),
        ({"a": [1]}, {"a": (1,)}, True),
        ({(1, 2)}, {(1, 2)}, True),
        (math.nan, math.nan, True),
        (0.3, 0.1 + 0.2, True),
        (1e300, math.inf, False),
        (math.inf, 1e308, False),
        (0.0, math.nan, False),
        (10**400, 1e300, False),
        (1.0, 1.0 + 1e-6, False),
        ({1.0: "a"}, {True: "a"}, True),
        (1 / 3, Fraction(1, 3), True),
        (0.3, Decimal("0.3"), True),
        (0.3 + 0j, 0.1 + 0.2, True),
        (math.inf, Decimal("1e400"), False),
        (1.0, Decimal("nan"), False),
        (1.0, Decimal("snan"), False),
        (Fraction(1, 3), Decimal("0.33333333333333333"), False),
    ],
)
def test_tuples_stand_for_lists_and_floats_have_a_tolerance(expected, got, is_same):
    assert same_value(encode(expected), encode(got), 1e-9) == is_same


@pytest.mark.parametrize(
    "said",
    [
        {"tuple": 5},
        {"set": None},
        {"dict": [[1]]},
        {"int": "zz"},
        {"object": 1},
        {"a": 1, "b": 2},
        {},
        {"float": "x"},
        {"fraction": [1, 0]},
        {"fraction": [1]},
        {"fraction": 1},
        {"fraction": ["1", 2]},
        {"decimal": "x"},
        {"decimal": 1},
        {"complex": [1, "x"]},
        {"complex": ["1", 0]},
        {"complex": [1]},
        {"range": [1, 2, 0]},
        {"range": [1.5]},
        {"range": ["x"]},
        {"keys": 1},
        {"items": 1},
        {"deque": {}},
    ],
)
def test_what_is_no_value_equals_nothing(said):
    assert not any(same_value(encode(value), said, 1e-9) for value in VALUES)


def test_a_flood_of_colliding_numbers_is_compared_quickly():
    """As keys of a set or dict these would take a quadratic number of comparisons."""
    numbers = [{"int": hex(i * (2**61 - 1))} for i in range(20_000)]
    start = time.process_time()
    assert not same_value({"set": numbers[1:]}, {"set": numbers[:-1]}, 1e-9)
    assert not same_value({"dict": [[n, 0] for n in numbers[1:]]}, {"dict": [[n, 0] for n in numbers[:-1]]}, 1e-9)
    assert time.process_time() - start < 5


def test_a_deeply_nested_member_of_a_set_is_compared_in_little_memory():
    deep = "x"
    for _ in range(200):
        deep = {"tuple": [deep]}
    assert same_value({"set": [deep]}, {"set": [deep]}, 0.0)
    assert not same_value({"set": [deep]}, {"set": [{"tuple": [deep]}]}, 0.0)


@pytest.mark.parametrize("line", [b"9" * 10**6, b"[" * 10**5, b"", b"{", b'{"a": -' + b"1" * 50 + b"}"], ids=len)
def test_an_answer_that_is_none_is_refused_at_once(line):
    start = time.process_time()
    with pytest.raises((ValueError, RecursionError)):
        read_answer(line)
    assert time.process_time() - start < 1


def test_a_long_text_is_read_as_a_float_in_time():
    start = time.process_time()
    same_value(1.0, {"float": "9" * 10**6}, 1e-9)
    same_value(1.0, {"float": "0." + "9" * 10**6 + "e-5"}, 1e-9)
    assert time.process_time() - start < 2


BIG = hex(7**1_000_000)


@pytest.mark.parametrize(
    "said",
    [
        {"fraction": [{"int": BIG}, {"int": BIG[:-1]}]},
        {"decimal": "9" * 10**6},
        {"decimal": "1e999999999999"},
        {"decimal": "-1e-999999999999"},
        {"int": BIG},
        {"complex": [{"int": BIG}, 0]},
        {"set": [{"decimal": "1e999999"}]},
        {"range": [0, {"int": BIG}, 3]},
    ],
    ids=lambda said: str(said)[:40],
)
def test_a_large_number_is_compared_in_time(said):
    start = time.process_time()
    for value in (1, 0.5, 1j, Fraction(1, 3), Decimal(3) / 7, {1}, range(5), 10**400):
        assert not same_value(encode(value), said, 1e-9)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("expected", "got", "is_same"),
    [
        ("1\n2\n", b"1\n2", True),
        ("1 \n2", b"1\r\n2\n\n", True),
        ("1\n2", b"1 2", False),
        ("0.30", b"0.3", True),
        ("0.3", b"0.30000000000000004", True),
        ("3", b"3.0", False),
        ("a.b", b"a.c", False),
        ("1.0", b"nan", False),
        ("10.0", b"1_0.0", False),
        ("1.0 2", b"1.00  2", False),
        ("", b"", True),
        ("x", b"", False),
        ("x", b"\xff", False),
        ("  x", b"x", False),
    ],
)
def test_outputs_are_compared_by_lines(expected, got, is_same):
    assert same_output(expected, got, 1e-9) == is_same
