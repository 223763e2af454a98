"""Keywords, regular expressions, JSON and JSON schemas."""

import json
import time

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric
from posttrain.rewards.library.patterns import keywords, regex
from posttrain.rewards.library.structured import json_schema, json_valid
from posttrain.types import Completion, Group, StopReason, Task

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_keywords_are_whole_words_without_case():
    score = keywords(["art", "New York", "c++"])
    assert score("Art in New York with C++") == 1.0
    assert score("start in new york") == pytest.approx(1 / 3)
    assert score("") == 0.0


@pytest.mark.parametrize("of_row", [["refund", "invoice"], "refund, invoice", "refund,invoice,, refund"])
def test_a_row_brings_its_own_keywords(of_row):
    assert keywords()("Your refund is on its way", of_row) == 0.5


@pytest.mark.parametrize("of_row", [None, "", [], " , "])
def test_a_row_without_keywords_is_not_scored(of_row):
    assert keywords()("text", of_row) is None


def test_regex_searches_or_matches_the_whole():
    assert regex(r"\d+ apples")("I have 3 apples.") == 1.0
    assert regex(r"\d+ apples", full=True)("I have 3 apples.") == 0.0
    assert regex(r"a.b", full=True)("a\nb") == 1.0
    assert regex("yes", ignore_case=True)("YES") == 1.0
    assert regex("yes")("no") == 0.0


def test_an_expression_that_never_ends_is_stopped_and_not_scored():
    started = time.perf_counter()
    assert regex(r"(a|aa)+$", seconds=0.2)("a" * 45 + "b") is None
    assert time.perf_counter() - started < 3.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": [1, 2.5, null, true]}', 1.0),
        (" 4 ", 1.0),
        ('Here it is:\n```json\n{"a": 1}\n```\nDone.', 1.0),
        ('```\nnot json\n```\n```json\n{"a": 1}\n```', 1.0),
        ('```json\n{"a": 1\n```', 0.0),
        ('Here: {"a": 1}', 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": Infinity}', 0.0),
        ("1e999", 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("[" * 49_000, 0.0),
        ("[" * 20_000 + "]" * 20_000, 0.0),
        ("9" * 40_000, 0.0),
        ("\x00", 0.0),
        ("", 0.0),
    ],
)
def test_json_is_valid_or_not(text, score):
    assert json_valid()(text) == score


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ({"name": "Ada", "age": 36}, 1.0),
        ({"name": "Ada", "age": -1}, 0.0),
        ({"name": "Ada"}, 0.0),
        ({"name": "Ada", "age": 36, "x": 1}, 0.0),
        ([], 0.0),
        (None, 0.0),
    ],
)
def test_json_under_a_schema(value, score):
    text = json.dumps(value)
    assert json_schema(PERSON)(text) == score
    assert json_schema()(text, PERSON) == score
    assert json_schema()(text, json.dumps(PERSON)) == score


def test_a_row_without_a_schema_is_not_scored_and_text_without_json_is_wrong():
    assert json_schema()("{}", None) is None
    assert json_schema(PERSON)("no") == 0.0


@pytest.mark.parametrize("schema", [{"type": "nothing"}, "{", "[1]", {"minimum": "x"}])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(UserError, match="not a JSON schema"):
        json_schema(schema)


def test_a_schema_fetches_nothing():
    from referencing.exceptions import Unresolvable

    judge = json_schema({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(Exception) as caught:
        judge("{}")
    assert isinstance(caught.value, Unresolvable) or "Unresolvable" in type(caught.value).__name__


def test_numbers_that_validators_cannot_compute_with_are_wrong_not_errors():
    assert json_schema({"multipleOf": 0.1})("9" * 4000) == 0.0
    assert json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}})("[" * 900 + "]" * 900) in (0.0, 1.0)


@pytest.mark.parametrize("maker", [lambda: keywords([]), lambda: keywords(" , "), lambda: regex("(")])
def test_settings_that_cannot_work_are_refused(maker):
    with pytest.raises(UserError):
        maker()


def test_a_schema_whose_expression_runs_away_on_a_text_drops_that_text():
    pytest.importorskip("jsonschema")
    rubric = Rubric.from_config([{"reward": "json_schema", "schema": {"type": "string", "pattern": "^(a+)+$"}, "timeout": 2}])
    texts = ['"aaa"', f'"{"a" * 60}b"', '"b"']
    group = Group(Task(0, "p"), [Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text) for text in texts])
    report = rubric.score([group])
    rubric.close()
    assert group.rewards == [1.0, None, 0.0]
    assert report.failures["json_schema"] == {"timed_out": 1}
