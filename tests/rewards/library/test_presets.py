"""The presets, their ranges, and every reward of the library on text that was made to hurt."""

import functools
import math
import re
import time
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric
from posttrain.rewards.library import PRESETS
from posttrain.rewards.library.email import recipient_named, signature_block
from posttrain.rewards.loading import load_reward
from posttrain.types import Completion, Group, StopReason, Task

ROW = {"answer": "4", "keywords": ["refund"], "recipient": "Ada Lovelace", "schema": '{"type": "integer"}'}
# Those that judge text by themselves, without a model, a service or another process.
TEXT_REWARDS = [
    *("arithmetic", "gsm8k", "deepseek-r1", "email", "qwen3-proximity"),
    *("answer_format", "brevity", "cosine_length", "exact_answer", "json_schema", "json_valid", "keywords", "keywords_present", "language"),
    *("numeric_answer", "proximity", "reasoning_first", "reasoning_present", "regex", "repetition", "soft_overlong", "steps", "tags_once"),
    *("think_format", "too_long", "number_detected", "right_number", "correctness", "integer", "soft_format", "strict_format", "tag_count"),
    *("desired_reply", "recipient_named", "signature_block"),
]
NEEDED = {"regex": {"pattern": "a+$", "seconds": 0.2}}


@functools.cache
def token_ids(text):
    return [ord(c) % 97 for c in text]


def score(rubric, text, **columns):
    completion = Completion([1], token_ids(text), [True] * len(text), [0.0], [0.0], StopReason.STOP, text)
    rubric.score([Group(Task(0, "p", {**ROW, **columns}), [completion])])
    return completion


@pytest.mark.parametrize(
    ("name", "ends"),
    [("arithmetic", (-4, 4)), ("gsm8k", (0, 4)), ("deepseek-r1", (-1, 3)), ("email", (-1, 4)), ("qwen3-proximity", (-10, 13))],
)
def test_a_preset_tells_its_range(name, ends):
    rubric = Rubric(name)
    assert rubric.range == ends
    assert rubric.can_decide() == (name != "email")


def test_a_preset_takes_settings_from_a_recipe():
    rubric = Rubric.from_config(
        [{"reward": "deepseek-r1", "max_tokens": 100, "tags": ["<a>", "</a>"]}, {"reward": "brevity", "weight": 2, "limit": 500}]
    )
    assert rubric.names == ["accuracy", "format", "length", "language", "brevity"]
    assert rubric.range == (-1, 5)
    with pytest.raises(UserError, match=r"'limits' is not a setting of the reward 'brevity'.*Did you mean 'limit'"):
        Rubric.from_config([{"reward": "brevity", "limits": 1}])
    with pytest.raises(UserError, match="'regex' needs the setting 'pattern'"):
        Rubric("regex")


R1 = "<think>\ntwo and\ntwo\n</think>\nThe answer is # 4"


@pytest.mark.parametrize(
    ("text", "accuracy", "form", "language"),
    [
        (R1, 1, 1, 1),
        ("<think>4</think><answer>4</answer>", 1, 1, 1),
        ("<think>4</think>4.0", 1, 1, 1),
        ("<think>4</think>5", 0, 1, 1),
        ("<think>4</think>", 0, 1, 1),
        ("<think># 4", 0, 0, 1),
        ("4", 0, 0, 1),
        ("<think>два</think>4", 1, 1, 2 / 3),
    ],
)
def test_deepseek_r1(text, accuracy, form, language):
    scores = score(Rubric("deepseek-r1"), text).scores
    assert (scores["accuracy"], scores["format"], scores["length"]) == (accuracy, form, 0)
    assert scores["language"] == pytest.approx(language)


def test_gold_answers_that_are_no_numbers_are_compared_as_text():
    accurate = [score(Rubric("deepseek-r1"), f"<think>x</think>{said}", answer="1/2").scores["accuracy"] for said in ("1/2", "2", "0.5")]
    assert accurate == [1, 0, 0]
    assert score(Rubric("deepseek-r1"), "<think>x</think>42", answer="6 * 7\n#### 42").scores["accuracy"] == 1
    completions = [score(Rubric("qwen3-proximity"), CLOSED.format(said), answer="1/2") for said in ("1/2", "2")]
    assert [completion.scores["answer_near"] for completion in completions] == [5, -4.5]
    assert [completion.scores["number_right"] for completion in completions] == [None, None]


def test_deepseek_r1_shortens_what_nears_the_limit():
    rubric = Rubric(*PRESETS["deepseek-r1"](max_tokens=100))
    assert score(rubric, "x" * 90).scores["length"] == pytest.approx(-0.5)


MAIL = "Dear Ada,\nyour refund is on its way.\n\nSam Hill\n+44 20 7946 0958\nsam@example.org\n12 Main Street"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (MAIL, (1, 1, 0, 1, 1)),
        (MAIL.replace("\n", " \n "), (1, 1, 0, 1, 1)),
        (MAIL + " x" * 200, (1, 0, -1, 1, 1)),
        ("Dear Ada, your refund", (1, 0, 0, 1, 0)),
        ("Dear Adam, your refunds", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_email(text, scores):
    assert tuple(score(Rubric("email"), text, answer=MAIL).scores.values()) == scores


def test_email_can_count_each_keyword():
    rubric = Rubric(*PRESETS["email"](each=True))
    assert score(rubric, "refund and invoice", keywords="refund,invoice,receipt").scores["keywords_present"] == 2
    assert rubric.range == (-1, math.inf)


def test_email_rows_without_a_column_are_not_scored_by_its_reward():
    completion = score(Rubric("email"), MAIL, answer=None, keywords=None, recipient="")
    assert [name for name, value in completion.scores.items() if value is None] == ["keywords_present", "desired_reply", "recipient_named"]
    assert completion.reward == 1


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        (MAIL, 1.0),
        ("Hauptstraße 5\n(030) 123 456\na.b+c@x-y.co.uk", 1.0),
        ("sam@example.org\n12 Main Street", 0.0),
        ("+44 20 7946 0958\n12 Main Street", 0.0),
        ("+44 20 7946 0958\nsam@example.org", 0.0),
        (MAIL + "\nmore" * 9, 0.0),
        ("@" * 100_000, 0.0),
        ("a@" * 50_000, 0.0),
        ("1 (" * 40_000, 0.0),
    ],
)
def test_a_signature_block_has_phone_mail_and_street(text, is_there):
    started = time.process_time()
    assert signature_block(text) == is_there
    assert time.process_time() - started < 0.5


def test_a_recipient_is_named_in_full_or_in_part():
    assert [recipient_named(text, "Ada King Lovelace") for text in ("Hi Ada", "Ms Lovelace", "ADA KING LOVELACE", "King", "Adam")] == [1, 1, 1, 0, 0]


CLOSED = "2 and 2<end_working_out>\n<SOLUTION>{}</SOLUTION>"


@pytest.mark.parametrize(
    ("text", "form", "tags", "near", "right"),
    [
        (CLOSED.format("4"), 3, 1.5, 5, 3.5),
        (CLOSED.format(" 4 \n"), 3, 1.5, 5, 3.5),
        (CLOSED.format("4.0"), 3, 1.5, 3.5, 3.5),
        (CLOSED.format("The answer, is 4"), 3, 1.5, 3.5, 3.5),
        (CLOSED.format("3"), 3, 1.5, 2 - 6.5 / 4, -1.5),
        (CLOSED.format("5"), 3, 1.5, 2 - 6.5 / 4, -1.5),
        (CLOSED.format("4000"), 3, 1.5, -4.5, -1.5),
        (CLOSED.format("none"), 3, 1.5, -4.5, -2.5),
        (CLOSED.format(""), 0, 1.5, -4.5, -2.5),
        (CLOSED.format("4") + "!", 0, 1.5, 5, 3.5),
        ("<SOLUTION>4</SOLUTION>", 0, 0, 5, 3.5),
        ("4", 0, -3, -4.5, -2.5),
        ("", 0, -3, -4.5, -2.5),
    ],
)
def test_qwen3_proximity(text, form, tags, near, right):
    assert tuple(score(Rubric("qwen3-proximity"), text).scores.values()) == pytest.approx((form, tags, near, right))


def test_qwen3_proximity_is_safe_at_gold_zero():
    rewards = [score(Rubric("qwen3-proximity"), CLOSED.format(said), answer="0").reward for said in ("0", "0.0", "0.1", "-0.1", "0.5", "7", "x")]
    assert rewards[0] == 13
    assert rewards[2] == rewards[3]
    assert rewards[1:] == sorted(rewards[1:], reverse=True)


HOSTILE = {
    "empty": "",
    "nul": "\x00" * 100_000,
    "letters": "a" * 100_000,
    "words": "a b " * 25_000,
    "lines": "\n" * 100_000,
    "spaces": " " * 100_000,
    "sentences": "He is. " * 14_000,
    "tags": "<think>" * 14_000,
    "nested tags": "<think><answer>" * 3000 + "4" + "</answer></think>" * 3000,
    "closing tags": "</think><SOLUTION></SOLUTION>" * 3000,
    "fences": "```\n" * 25_000,
    "brackets": "[" * 50_000 + "{" * 50_000,
    "inf": "inf",
    "1e999": "1e999",
    "huge exponent": "1e" + "9" * 99_000,
    "digits": "9" * 100_000,
    "exponents": "1e1" * 33_000,
    "signs": "-+" * 50_000,
    "at": "@." * 50_000,
    "unicode": "\u202e\u0664\u00b2ﬁ的é\U0001f600" * 14_000,
    "combining": "a" + "\u0301" * 99_000,
    "surrogate": "\ud800" * 10_000,
    "regex": "a" * 50_000 + "!",
}


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_every_reward_scores_any_text_within_its_range_and_soon(name):
    rubric = Rubric.from_config([{"reward": name, **NEEDED.get(name, {})}])
    low, high = rubric.range
    for kind, text in HOSTILE.items():
        started = time.process_time()
        reward = score(rubric, text).reward
        assert time.process_time() - started < 1.5, kind
        assert reward is None or low - 1e-9 <= reward <= high + 1e-9, kind


@pytest.mark.parametrize("name", [name for name in TEXT_REWARDS if name not in PRESETS])
def test_a_reward_has_the_name_that_it_is_loaded_by(name):
    assert load_reward(name, NEEDED.get(name)).name == name


def test_the_page_tells_every_reward_and_its_range():
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", page, re.MULTILINE))
    spans = {name: Rubric.from_config([{"reward": name, **NEEDED.get(name, {})}]).span() for name in TEXT_REWARDS}
    assert told == spans
