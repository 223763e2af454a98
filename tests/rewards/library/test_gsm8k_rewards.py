"""GSM8K's five rewards, on the cases where the popular ones surprise; and on text that was made to hurt."""

import time

import pytest

from posttrain.rewards import Rubric
from posttrain.rewards.library.gsm8k import correctness, gsm8k, integer, soft_format, strict_format, tag_count
from posttrain.types import Completion, Group, StopReason, Task

CANONICAL = "<reasoning>\n2+2 is 4\n</reasoning>\n<answer>\n4\n</answer>\n"
TWO_LINES = "<reasoning>\n2+2\nis 4\n</reasoning>\n<answer>\n4\n</answer>\n"
INLINE = "<reasoning>2+2 is 4</reasoning><answer>4</answer>"
NO_LAST_BREAK = CANONICAL[:-1]
TRAILING = CANONICAL + "x" * 100


def scored(text, answer="4", legacy=False):
    rubric = Rubric(*gsm8k(legacy=legacy))
    completion = Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text)
    rubric.score([Group(Task(0, "p", {"answer": answer}), [completion])])
    return completion.scores


@pytest.mark.parametrize(
    ("text", "strict", "soft", "tags"),
    [
        (CANONICAL, 0.5, 0.0, 0.5),
        (TWO_LINES, 0.0, 0.0, 0.5),
        (INLINE, 0.0, 0.5, 0.0),
        (NO_LAST_BREAK, 0.0, 0.0, 0.447),
        (TRAILING, 0.0, 0.0, 0.3),
    ],
)
def test_legacy_scores_are_those_of_the_popular_functions(text, strict, soft, tags):
    scores = scored(text, legacy=True)
    assert (scores["strict_format"], scores["soft_format"]) == (strict, soft)
    assert scores["tag_count"] == pytest.approx(tags)


@pytest.mark.parametrize(
    ("text", "strict", "soft", "tags"),
    [
        (CANONICAL, 0.5, 0.5, 0.5),
        (TWO_LINES, 0.5, 0.5, 0.5),
        (INLINE, 0.0, 0.5, 0.5),
        (NO_LAST_BREAK, 0.5, 0.5, 0.5),
        (TRAILING, 0.0, 0.5, 0.4),
        ("4", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
        ("<answer>4</answer><reasoning>x</reasoning>", 0.0, 0.0, 0.476),
        ("<reasoning>" * 2 + INLINE, 0.0, 0.0, 0.375),
        ("so: " + CANONICAL, 0.0, 0.0, 0.5),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0.0, 0.5, 0.5),
    ],
)
def test_repaired_scores_let_reasoning_have_lines(text, strict, soft, tags):
    scores = scored(text)
    assert (scores["strict_format"], scores["soft_format"]) == (strict, soft)
    assert scores["tag_count"] == pytest.approx(tags)


def test_the_best_completion_earns_four_repaired_and_three_and_a_half_in_legacy():
    assert sum(scored(CANONICAL).values()) == pytest.approx(4.0)
    assert sum(scored(CANONICAL, legacy=True).values()) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("said", "gold", "repaired", "legacy"),
    [
        ("4", "4", 2.0, 2.0),
        ("4", 4, 2.0, 2.0),
        (" 4 ", "4", 2.0, 2.0),
        ("1,080", "1080", 2.0, 0.0),
        ("1080", "1,080", 2.0, 0.0),
        ("$18.", "18", 2.0, 0.0),
        ("4.0", "4", 2.0, 0.0),
        ("4 or 5", "4", 0.0, 0.0),
        ("5", "4", 0.0, 0.0),
        ("1,0,8,0", "1080", 0.0, 0.0),
        ("", "4", 0.0, 0.0),
        ("²", "2", 0.0, 0.0),
        ("4", None, None, 0.0),
        ("", "", None, 2.0),
        ("2", "1/2", 0.0, 0.0),
        ("1/2", "1/2", 2.0, 2.0),
        ("1/2", "#### 1/2", 2.0, 0.0),
        ("1080", "#### 1,080", 2.0, 0.0),
        ("42", "6 * 7 = <<6*7=42>>42\n#### 42", 2.0, 0.0),
    ],
)
def test_correctness(said, gold, repaired, legacy):
    text = f"<reasoning>x</reasoning><answer>{said}</answer>"
    assert correctness(text, gold) == repaired
    assert correctness(text, gold, legacy=True) == legacy


def test_correctness_reads_a_bare_answer_and_the_last_of_several():
    assert correctness("4", "4") == 2.0
    assert correctness("<answer>5</answer><answer>4</answer>", "4") == 2.0


@pytest.mark.parametrize(
    ("said", "repaired", "legacy"), [("4", 0.5, 0.5), ("-4", 0.5, 0.0), ("1,000", 0.5, 0.0), ("²", 0.0, 0.5), ("4.0", 0.0, 0.0), ("", 0.0, 0.0)]
)
def test_whole_numbers(said, repaired, legacy):
    assert integer(said) == repaired
    assert integer(said, legacy=True) == legacy


HOSTILE = {
    "empty": "",
    "nul": "\x00" * 1000,
    "open tags": "<reasoning>" * 9000,
    "middles": "<reasoning>" + "</reasoning><answer>" * 5000,
    "middles in lines": "<reasoning>\n" + "\n</reasoning>\n<answer>\n" * 4500,
    "spaces": "<reasoning>" + ("</reasoning>" + " " * 500) * 200,
    "digits": "<answer>" + "9" * 100_000,
    "commas": "<answer>" + "1,234" * 20_000,
    "points": "." * 100_000,
    "signs": "-" * 100_000,
    "unicode digits": "\u0664\u00b2\u2460" * 30_000,
    "surrogate": "\ud800" * 100,
    "nested": "<answer>" * 5000 + "4" + "</answer>" * 5000,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_is_scored_quickly(name, legacy):
    started = time.process_time()
    scores = scored(HOSTILE[name], legacy=legacy)
    assert time.process_time() - started < 1.0
    assert all(score is not None and abs(score) < 200 for score in scores.values())


@pytest.mark.parametrize("reward", [tag_count, soft_format, strict_format, integer])
@pytest.mark.parametrize("name", HOSTILE)
def test_repaired_scores_stay_in_their_range(reward, name):
    low, high = reward.range
    assert low <= reward(HOSTILE[name]) <= high
