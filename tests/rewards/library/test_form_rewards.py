"""Tags and chain of thought."""

import re

import pytest

from posttrain.errors import UserError
from posttrain.rewards.library.reasoning import count_steps, reasoning_first, reasoning_present, steps
from posttrain.rewards.library.tags import after_reasoning, answer_format, tags_once, think_format

GOOD = "<think>\nfirst\nsecond\n</think>\nThe answer is 4."


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1.0),
        ("<think></think>", 1.0),
        ("<think>a</think>b</think>c", 1.0),
        ("so <think>a</think>b", 0.0),
        (" <think>a</think>b", 0.0),
        ("<think>a<think>b</think></think>c", 0.0),
        ("<think>a", 0.0),
        ("a</think>b", 0.0),
        ("</think><think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text, score):
    assert think_format()(text) == score


def test_think_format_agrees_with_the_regular_expression_that_defines_it():
    """On every arrangement of up to five pieces: opening at the very start, none inside, a closing one somewhere."""
    import itertools

    pattern = re.compile(r"^<think>(?!.*<think>).*?</think>.*$", re.DOTALL)
    judge = think_format()
    for length in range(6):
        for pieces in itertools.product(("<think>", "</think>", "x", "\n"), repeat=length):
            text = "".join(pieces)
            assert judge(text) == float(bool(pattern.match(text))), text


def test_any_tags_and_a_prefilled_opening():
    judge = think_format(tags=["<start_working_out>", "<end_working_out>"], prefilled=True)
    assert judge("2+2 <end_working_out> 4") == 1.0
    assert judge("<start_working_out>2+2 <end_working_out> 4") == 0.0
    assert judge("2+2") == 0.0


TWO = "<think>a\nb</think>\n<answer>\n4\n</answer>\n"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (TWO, 1.0),
        ("<think>a</think><answer>4</answer>", 1.0),
        ("<think> </think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>\n</answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        (TWO + "!", 0.0),
        ("x" + TWO, 0.0),
        (TWO + TWO, 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think><answer>4</answer></think>", 0.0),
        ("<think><answer>a</think>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_then_an_answer_in_tags(text, score):
    assert answer_format()(text) == score


def test_a_prefilled_two_part_form():
    judge = answer_format(tags=["<w>", "</w>"], answer=["<S>", "</S>"], prefilled=True)
    assert judge("a</w><S>4</S>") == 1.0
    assert judge("<w>a</w><S>4</S>") == 0.0


def test_tags_once_is_the_mean_over_tags():
    judge = tags_once(tags=["<a>", "</a>"], missing=-1.0)
    assert [judge(text) for text in ("<a></a>", "<a>", "", "<a><a></a>")] == [1.0, 0.0, -1.0, 0.0]
    assert tags_once().range == (-1.0, 1.0)


@pytest.mark.parametrize("tags", ["<a>", [], ["<a>", ""], [1]])
def test_tags_must_be_a_list_of_texts(tags):
    with pytest.raises(UserError):
        tags_once(tags=tags)


@pytest.mark.parametrize(("text", "rest"), [("<think>a</think>b", "b"), ("a</think>b</think>c", "c"), ("<think>a", ""), ("a", "a"), ("", "")])
def test_what_follows_the_reasoning(text, rest):
    assert after_reasoning(text, ("<think>", "</think>")) == rest


def test_reasoning_needs_different_words():
    judge = reasoning_present(min_words=3)
    assert judge("<think>one two three</think>") == 1.0
    assert judge("<think>one one One one</think>") == 0.0
    assert judge("one two three") == 0.0
    assert judge("<think>one two three") == 0.0
    assert reasoning_present(tags=None, min_words=3)("one two three\n4") == 1.0
    assert reasoning_present(tags=None, min_words=3)("one two three 4") == 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("He has two apples. She gives him one! Now he has three", 3),
        ("He has two apples\nHe has  two apples\nhe HAS two apples.", 1),
        ("So. Hmm. Yes", 0),
        ("It costs 1.5 dollars a piece", 1),
        ("a b c\n" * 1000, 1),
    ],
)
def test_steps_are_different_lines_or_sentences(text, count):
    assert count_steps(text) == count
    assert steps(wanted=3)(f"<think>{text}</think>4") == min(count, 3) / 3


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>because</think>4", 1.0),
        (" \n<think>because</think>4", 1.0),
        ("4 <think>because</think>4", 0.0),
        ("<think>because</think>", 0.0),
        ("<think> </think>4", 0.0),
        ("<think>because 4", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_must_not_come_before_the_reasoning(text, score):
    assert reasoning_first()(text) == score


def test_without_tags_the_answer_is_the_last_line():
    assert reasoning_first(tags=None)("because\n4") == 1.0
    assert reasoning_first(tags=None)("4\n\n") == 0.0


@pytest.mark.parametrize("maker", [lambda: steps(wanted=0), lambda: reasoning_present(min_words=0), lambda: reasoning_first(tags=["<a>"])])
def test_settings_that_cannot_work_are_refused(maker):
    with pytest.raises(UserError):
        maker()
