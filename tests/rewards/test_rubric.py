"""Rubrics: weights, names, nesting, columns."""

import functools
import re

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric, reward, verifier
from posttrain.types import Completion, Group, StopReason, Task


def has_digit(completion):
    return 1.0 if any(c.isdigit() for c in completion) else -1.0


@reward(weight=2, range=(-3.0, 3.0))
def is_right(completion, answer):
    return 3.0 if completion == answer else -3.0


def score(rubric, text, **columns):
    completion = Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text)
    rubric.score([Group(Task(0, "p", columns), [completion])])
    return completion


def test_the_reward_is_the_weighted_sum_of_unweighted_scores():
    completion = score(Rubric(has_digit, is_right), "5", answer="4")
    assert completion.scores == {"has_digit": 1.0, "is_right": -3.0}
    assert completion.reward == 1.0 - 2 * 3.0


def test_weights_can_stand_in_pairs_or_apart_but_once():
    assert Rubric((has_digit, 0.5), is_right).weights == [0.5, 2.0]
    assert Rubric(has_digit, is_right, weights=[0.5, 7]).weights == [0.5, 7.0]
    with pytest.raises(UserError, match="once"):
        Rubric((has_digit, 0.5), weights=[1.0])
    with pytest.raises(UserError, match="2 rewards but 1 weights"):
        Rubric(has_digit, is_right, weights=[1.0])
    with pytest.raises(UserError, match="finite"):
        Rubric((has_digit, float("nan")))


def test_a_monitor_has_no_part_in_the_total():
    unsure = reward(name="unsure")(lambda completion: None if completion == "?" else -2.0)
    rubric = Rubric(unsure, (has_digit, 0.0))
    completion = score(rubric, "?")
    assert completion.scores == {"unsure": None, "has_digit": -1.0}
    assert completion.reward is None
    assert score(rubric, "5").reward == -2.0


def test_a_monitor_that_breaks_drops_no_completion():
    broken = reward(name="broken", weight=0, on_error="drop")(lambda completion: 1 / 0)
    completion = score(Rubric(is_right, broken), "4", answer="4")
    assert completion.reward == 6.0
    assert completion.scores["broken"] is None


def test_monitors_alone_give_no_total_and_still_decide():
    rubric = Rubric((verifier(lambda completion, answer: completion == answer), 0.0))
    completion = score(rubric, "4", answer="4")
    assert completion.reward is None
    assert rubric.is_right(completion) is True


def test_what_a_reward_misses_is_said_when_a_rubric_takes_it():
    def missing():
        raise UserError("it needs a library")

    made = reward(check=missing)(lambda completion, scale=1.0: scale)
    for each in (made, functools.partial(made, scale=2.0)):
        with pytest.raises(UserError, match="needs a library"):
            Rubric(each)


def test_equal_names_get_numbers():
    assert Rubric(has_digit, has_digit, lambda completion: 0, lambda completion: 0).names == ["has_digit", "has_digit_2", "lambda", "lambda_2"]
    taken = reward(name="has_digit_2")(lambda completion: 0)
    assert Rubric(has_digit, taken, has_digit).names == ["has_digit", "has_digit_2", "has_digit_3"]


def test_a_nested_rubric_is_flattened_with_its_weights_multiplied():
    inner = Rubric((has_digit, 0.5), is_right, name="sums")
    rubric = Rubric(has_digit, (inner, 10))
    assert rubric.names == ["has_digit", "sums/has_digit", "sums/is_right"]
    assert rubric.weights == [1.0, 5.0, 20.0]


def test_the_range_counts_weights_and_their_signs():
    a, b = reward(range=(0, 1))(has_digit), is_right
    assert Rubric(a, b).range == (-6.0, 7.0)
    assert Rubric((a, -1.0)).range == (-1.0, 0.0)
    assert Rubric(a, lambda completion: 0).range is None


def test_columns_are_checked_before_anything_runs():
    rubric = Rubric(has_digit, is_right)
    assert rubric.columns_needed() == ["answer"]
    rubric.check_columns(["answer"])
    with pytest.raises(UserError, match=r"reward 'is_right' asks for the column 'answer'; the data has: anwser\. Did you mean 'anwser'\?"):
        rubric.check_columns(["anwser"])


def test_an_empty_rubric_is_refused():
    with pytest.raises(UserError, match="at least one"):
        Rubric()


def test_right_means_full_marks_from_all_that_decide():
    exact, formatted = verifier(lambda completion, answer: completion == answer), reward(range=(0, 1))(lambda completion: 0.0)
    rubric = Rubric(exact, formatted)
    assert rubric.is_right(score(rubric, "4", answer="4")) is True
    assert rubric.is_right(score(rubric, "5", answer="4")) is False
    unsure = Rubric(verifier(lambda completion: None))
    assert unsure.is_right(score(unsure, "4")) is None
    broken = score(rubric, "4", answer="4")
    broken.broken = "the environment raised"
    assert rubric.is_right(broken) is None
    assert not Rubric(formatted).can_decide()
    assert Rubric(formatted).is_right(score(Rubric(formatted), "4")) is None


def test_a_rubric_can_be_written_as_data():
    rubric = Rubric.from_config(["arithmetic", {"reward": "integer", "weight": 0.5}, {"reward": "gsm8k", "legacy": True, "weight": 2}])
    assert rubric.names[:3] == ["number_detected", "right_number", "integer"]
    assert rubric.weights == [1.0, 1.0, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["gsm8"], "Did you mean 'gsm8k'?"),
        ([{"rewrd": "gsm8k"}], "a name or {reward: ..."),
        ([{"reward": "gsm8k", "legcy": True}], "Did you mean 'legacy'?"),
        ([{"reward": 3}], "named by text"),
        ([3], "an entry of the rubric"),
        ([], "must be a list"),
        (None, "must be a list"),
        ([{"reward": "gsm8k", "weight": "x"}], "finite number"),
    ],
)
def test_a_mistake_in_a_rubric_of_data_is_explained(entries, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Rubric.from_config(entries)
