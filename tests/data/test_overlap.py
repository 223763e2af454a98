"""Exam questions found in training data: exactly, and but for what writers vary."""

import pytest

from posttrain.data.overlap import normalise, overlap


def said(text, system="Work it out."):
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def test_equal_and_nearly_equal_questions_are_told_apart():
    train = ["What is 2 + 2?", "What is 3 + 3?", "What is 5 + 5?"]
    found = overlap(train, ["What is 2 + 2?", "what is 3+3", "What is 4 + 4?", "What is 2 + 2?"])
    assert (found.exact, found.normalised) == ([0, 3], [1])


def test_the_system_message_does_not_make_a_question_new():
    found = overlap([said("What is 2 + 2?")], [said("What is 2 + 2?"), said("What is 2 + 2?", "Answer in one word.")])
    assert (found.exact, found.normalised) == ([0], [1])


@pytest.mark.parametrize(
    ("one", "other"),
    [("What's 2+2 ?", "what s 2 + 2"), ("A  b\nc.", "a b c"), ("**Bold** (really)", "bold really"), ("ﬁve", "five"), ("x = 3, y = 4", "x=3 y=4")],
)
def test_what_writers_vary_does_not_count(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), [("1.5", "15"), ("2-2", "2+2"), ("3 < 4", "3 > 4"), ("a*b", "a b"), ("1,000", "1 000"), ("12", "1 2")])
def test_numbers_and_formulas_stay_different(one, other):
    assert normalise(one) != normalise(other)
