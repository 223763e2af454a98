"""What a function becomes when it is used as a reward: its name, its shape, its columns."""

import functools

import pytest

from posttrain.errors import UserError
from posttrain.rewards.reward import RewardFunction, as_reward, reward, verifier


def is_right(completion, answer):
    return completion == answer


class Judge:
    def __call__(self, completions, **columns):
        return [0.0] * len(completions)


def test_a_decorated_function_is_still_called_like_the_plain_one():
    assert reward(is_right)("4", "4") is True
    assert reward(name="x", weight=2)(is_right)(completion="4", answer="5") is False


def test_the_decorator_works_bare_and_with_settings():
    bare, set_ = reward(is_right), reward(name="right", weight=2.5, range=(0, 1))(is_right)
    assert (bare.name, bare.weight, bare.range) == ("is_right", 1.0, None)
    assert (set_.name, set_.weight, set_.range) == ("right", 2.5, (0, 1))


def test_a_verifier_scores_between_zero_and_one_and_decides():
    made = verifier(is_right)
    assert (made.range, made.decides, made.is_verifier) == ((0.0, 1.0), True, True)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (is_right, "is_right"),
        (functools.partial(is_right, answer="4"), "is_right"),
        (functools.partial(functools.partial(is_right), answer="4"), "is_right"),
        (Judge(), "Judge"),
        (lambda completion: 0, "lambda"),
    ],
)
def test_undecorated_callables_are_named_after_themselves(function, name):
    assert as_reward(function).name == name


def test_a_partial_of_a_decorated_reward_keeps_its_settings():
    made = as_reward(functools.partial(reward(name="right", weight=3)(is_right), answer="4"))
    assert (made.name, made.weight, made.required) == ("right", 3.0, ())


def test_columns_are_the_parameters_that_the_shape_does_not_offer():
    def score(completion, prompt, answer, trainer_state, tolerance=0.1):
        return 0

    made = as_reward(score)
    assert (made.shape, made.required, made.optional) == ("completion", ("answer",), ("tolerance",))


def test_a_bound_keyword_is_not_replaced_by_a_column_of_that_name():
    made = as_reward(functools.partial(is_right, answer="4"))
    assert made.required == made.optional == ()
    assert made.arguments({"completion": "x"}, {"answer": "from the data"}) == {"completion": "x"}


def test_kwargs_take_every_column():
    made = as_reward(Judge())
    assert made.arguments({"completions": ["x"]}, {"answer": ["4"], "level": [1]}) == {"completions": ["x"], "answer": ["4"], "level": [1]}


@pytest.mark.parametrize("function", [lambda text: 0, lambda completion, completions: 0, lambda: 0, len])
def test_a_function_whose_shape_cannot_be_told_is_refused_with_what_it_needs(function):
    with pytest.raises(UserError, match="`completion`"):
        as_reward(function)


@pytest.mark.parametrize("thing", [3, "text", None, Judge])
def test_what_cannot_be_called_as_a_reward_is_refused(thing):
    with pytest.raises(UserError, match="must be a function"):
        as_reward(thing)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "2", None, True])
def test_a_weight_must_be_a_finite_number(weight):
    with pytest.raises(UserError, match="weight of reward 'is_right'"):
        RewardFunction(is_right, "is_right", weight)


def test_a_missing_column_is_named_with_what_there_is_and_the_nearest():
    with pytest.raises(UserError) as caught:
        as_reward(lambda completion, anwser: 0).check_columns(["question", "answer"])
    assert str(caught.value) == "reward 'lambda' asks for the column 'anwser'; the data has: question, answer. Did you mean 'answer'?"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"decides": True}, "must say what full marks are"),
        ({"decides": True, "range": (0.0, float("inf"))}, "a finite end"),
        ({"range": (1.0, 0.0)}, r"must be \(lowest, highest\)"),
        ({"range": (1.0,)}, r"must be \(lowest, highest\)"),
    ],
)
def test_full_marks_and_ranges_that_mean_nothing_are_refused(settings, says):
    """What decides without known full marks would call every answer wrong."""
    with pytest.raises(UserError, match=says):
        reward(**settings)(lambda completion: 0.0)
