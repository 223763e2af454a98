"""Mathematical answers: what is equal, what is not, what is a mistake in the data, and what never ends."""

import sys

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric
from posttrain.rewards.library.math import last_box, math_answer
from posttrain.types import Completion, Group, StopReason, Task

pytest.importorskip("math_verify")


def group(texts, *, id=0, **columns):
    completions = [Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text) for text in texts]
    return Group(Task(id, "p", columns), completions)


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("4", "4"),
        ("4", r"so \boxed{4}"),
        ("4", r"first \boxed{5}, no: \boxed{4}. Sure."),
        ("1,080", "The answer is 1080"),
        ("1080", r"\boxed{1,080}"),
        (r"\frac{1}{2}", "0.5"),
        ("1/2", r"\boxed{\frac{2}{4}}"),
        ("0.333333", "$1/3$"),
        ("2^{10}", "1024"),
        ("1024", "2^{10}"),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
        ("(1,2)", r"\boxed{(1,2)}"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        (r"\boxed{7}", "7"),
        ("$7$", "It is $7$."),
        ("x = 3", r"\boxed{3}"),
        ("1.5e3", "1500"),
        ("1500", "1.5e3"),
        (4, "4"),
        ("-7", "-7"),
    ],
)
def test_equal_answers_are_right(gold, said):
    assert math_answer(said, gold) is True


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("4", "14"),
        ("4", "3"),
        ("4", ""),
        ("4", "no idea"),
        ("4", "inf"),
        ("4", r"\boxed{\infty}"),
        ("4", "1e999"),
        ("4", "9" * 5000),
        ("4", r"\boxed{1,2,3,4}"),
        ("4", r"\boxed{4} and \boxed{5}"),
        ("2", "2^{10}"),
        ("4", r"\boxed{4"),
        ("4", "\0" * 100),
        ("4", "{" * 100_000),
        ("4", "(" * 100_000),
        ("4", r"\boxed{" + "[" * 900 + "}"),
        ("4", "<answer>" * 12_000),
        ("4", r"\frac{" * 3000),
        ("4", "¾"),
    ],
)
def test_other_answers_are_wrong(gold, said):
    assert math_answer(said, gold) is False


def test_without_the_library_no_rubric_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'posttrain\[math\]'"):
        Rubric.from_config([{"reward": "math_answer", "timeout": 3}])


def test_a_row_without_gold_is_not_scored():
    assert math_answer("4", None) is None


def test_gold_that_is_no_mathematics_is_a_mistake_in_the_data_that_names_the_row():
    rubric = Rubric("math_answer")
    for gold in ("", "???", "\\"):
        with pytest.raises(UserError, match=r"gold answer .* cannot be parsed.*prompt 17"):
            rubric.score([group(["4"], id=17, answer=gold)])
    rubric.close()


@pytest.mark.parametrize(
    ("text", "inside"), [(r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed{1} \boxed{2", "1"), ("no", None), (r"\boxed{}", "")]
)
def test_the_last_closed_box_is_found_with_its_braces(text, inside):
    assert last_box(text) == inside


def test_in_a_rubric_an_answer_that_never_ends_is_killed_dropped_and_counted():
    """SymPy would compute this power exactly."""
    rubric = Rubric.from_config([{"reward": "math_answer", "timeout": 2}])
    one = group(["4", r"\boxed{(9^{9^{9^{9}}})!}", r"\boxed{4}", "5"], answer="4")
    report = rubric.score([one])
    rubric.close()
    rewards = one.rewards
    assert [rewards[0], rewards[2], rewards[3]] == [1.0, 1.0, 0.0]
    assert rewards[1] is None
    assert dict(report.failures["math_answer"]) == {"timed_out": 1}


def test_as_an_object_too_it_runs_in_a_worker():
    rubric = Rubric(math_answer)
    one = group(["4"], answer="4")
    rubric.score([one])
    rubric.close()
    assert one.rewards == [1.0]
    assert rubric.rewards[0].source.name == "posttrain.rewards.library.math:math_answer"
