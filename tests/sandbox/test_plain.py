"""Values that cross the border of the sandbox keep their content and lose everything that could act."""

import collections
import enum
import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest

from posttrain.sandbox.inside.plain import NotPlain, decode, encode

VALUES = [
    None, True, False, 0, -1, 2**63, -(2**200), 1.5, -0.0, math.inf, -math.inf, "", "text", "\ud800", b"\x00\xff", 1 + 2j,
    [], [1, [2, [3]]], (1,), (), {1, 2}, frozenset({(1, 2)}), {}, {"a": 1}, {1: "a", (1, 2): [None]}, {"tuple": 1}, [{"object": 5}],
    bytearray(b"x"), Fraction(-1, 3), Fraction(2**100, 3), Decimal("1.50"), Decimal("-Infinity"), range(3, 9, 2), collections.deque([1, [2]]),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_survives_the_journey(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("view", [{1: 2, (3,): 4}.keys(), {1: 2, (3,): 4}.items(), {1: 2, (3,): 4}.values()], ids=lambda view: type(view).__name__)
def test_a_view_of_a_dict_survives_in_its_order(view):
    back = decode(json.loads(json.dumps(encode(view))))
    assert type(back) is type(view)
    assert list(back) == list(view)


def test_nan_survives():
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan)))))


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, 1),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.namedtuple("Point", "x y")(1, 2), (1, 2)),
    ],
)
def test_a_subclass_becomes_what_it_is_made_of(value, plain):
    back = decode(encode(value))
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize("value", [object(), lambda: 1, iter([]), int, [object()]], ids=lambda value: type(value).__name__)
def test_what_acts_does_not_cross(value):
    with pytest.raises(NotPlain):
        encode(value)


@pytest.mark.parametrize(
    "said",
    [
        {"a": 1, "b": 2},
        {},
        {"object": 1},
        {"tuple": 3},
        {"int": "x"},
        {"dict": [1]},
        {"bytes": 5},
        {"complex": [1]},
        {"eval": "1"},
        {"fraction": [1, 0]},
        {"fraction": [1, "2"]},
        {"decimal": "x"},
        {"decimal": [1]},
        {"range": [1, 2, 0]},
    ],
)
def test_what_nobody_wrote_is_refused(said):
    with pytest.raises((ValueError, IndexError)):
        decode(said)
