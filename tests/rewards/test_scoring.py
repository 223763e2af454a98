"""Rewards are called as promised, and a broken one raises: it never becomes a zero."""

import asyncio
import warnings

import numpy as np
import pytest
import torch

from posttrain.errors import RewardError
from posttrain.rewards import Rubric, reward, verifier
from posttrain.types import Completion, Group, StopReason, Task


def group(texts, *, id=0, prompt="p", **columns):
    completions = [Completion([1], [2, 3], [True, True], [0.0, 0.0], [0.0, 0.0], StopReason.STOP, text) for text in texts]
    return Group(Task(id, prompt, columns), completions)


def scores(function, *groups):
    rubric = Rubric(function)
    rubric.score(list(groups))
    return [completion.scores[rubric.names[0]] for each in groups for completion in each.completions]


def test_a_per_completion_reward_gets_text_and_its_rows_columns():
    def right(completion, prompt, answer, completion_ids):
        assert prompt == "p"
        assert completion_ids == [2, 3]
        return completion == answer

    assert scores(right, group(["4", "5"], answer="4"), group(["4", "5"], id=1, answer="5")) == [1.0, 0.0, 0.0, 1.0]


def test_a_batch_reward_is_called_once_with_lists_over_all_groups():
    calls = []

    def lengths(prompts, completions, completion_ids, answer, **columns):
        calls.append((prompts, completions, completion_ids, answer, sorted(columns)))
        return [len(text) for text in completions]

    assert scores(lengths, group(["a", "bb"], answer="x", level=1), group(["ccc"], id=1, prompt="q", answer="y")) == [1.0, 2.0, 3.0]
    names = ["level", "log_extra", "log_metric", "trainer_state"]
    assert calls == [(["p", "p", "q"], ["a", "bb", "ccc"], [[2, 3]] * 3, ["x", "x", "y"], names)]


def test_one_completion_has_the_tokens_that_were_sampled_and_a_batch_all_of_them():
    episode = group(["a"])
    episode.completions[0].sampled = [False, True]
    seen = []
    scores(lambda completion, completion_ids: seen.append(completion_ids) or 0.0, episode)
    scores(lambda completions, completion_ids: seen.append(completion_ids) or [0.0], episode)
    assert seen == [[3], [[2, 3]]]


def test_a_batch_reward_without_kwargs_gets_only_what_it_names():
    assert scores(lambda completions: [1] * len(completions), group(["a"], answer="x")) == [1.0]


def test_conversational_completions_are_messages_for_batches_and_text_for_single_ones():
    chat = [{"role": "user", "content": "hi"}]
    seen = []
    scores(lambda completions: seen.append(completions) or [0.0], group(["hello"], prompt=chat))
    scores(lambda completion: seen.append(completion) or 0.0, group(["hello"], prompt=chat))
    assert seen == [[[{"role": "assistant", "content": "hello"}]], "hello"]


def test_rewards_that_take_groups_see_the_whole_group():
    assert scores(lambda group: [i for i, _ in enumerate(group.completions)], group(["a", "b"]), group(["c"], id=1)) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.bool_(True), np.int64(1), torch.tensor(1.0), torch.tensor(True)])
def test_every_kind_of_number_is_a_score(value):
    assert scores(lambda completion: value, group(["a"])) == [1.0]
    assert scores(lambda completions: [value], group(["a"])) == [1.0]


@pytest.mark.parametrize("values", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1.0, 2.0), iter([1.0, 2.0])])
def test_a_batch_may_answer_with_any_sequence(values):
    assert scores(lambda completions: values, group(["a", "b"])) == [1.0, 2.0]


def test_none_means_not_scored_and_is_not_zero():
    rubric = Rubric(lambda completion: None if completion == "?" else 2.0, lambda completion: None if completion in "?!" else 1.0)
    groups = [group(["?", "!", "a"])]
    rubric.score(groups)
    assert groups[0].rewards == [None, 2.0, 3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1.0", [1.0], 1j, 10**400, torch.tensor([1.0, 2.0])])
def test_what_is_not_a_finite_number_raises_with_the_rewards_name_and_the_row(bad):
    def judge(completion):
        return bad if completion == "b" else 0.0

    with pytest.raises(RewardError, match=r"reward 'judge' returned .* for prompt 7"):
        scores(judge, group(["a"], id=6), group(["a", "b"], id=7))


@pytest.mark.parametrize("bad", [[1.0], [1.0] * 3, 1.0, None, "ab", {"a": 1.0, "b": 2.0}, torch.tensor(1.0)])
def test_a_batch_answer_of_another_length_raises(bad):
    with pytest.raises(RewardError, match=r"reward 'lambda' returned .*prompt 3"):
        scores(lambda completions: bad, group(["a", "b"], id=3))


def test_an_exception_names_reward_row_cause_and_line():
    def divides(completion):
        return 1 / len(completion)

    with pytest.raises(
        RewardError, match=r"'divides' raised ZeroDivisionError: division by zero at .*test_scoring\.py:\d+, while scoring prompt 5"
    ) as caught:
        scores(divides, group([""], id=5))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_verifier_may_not_return_other_numbers():
    with pytest.raises(RewardError, match="a verifier says True, False or None"):
        scores(verifier(lambda completion: 0.5), group(["a"]))


def test_async_rewards_run_at_the_same_time():
    running = most = 0

    async def slow(completion):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return float(completion)

    assert scores(slow, group(["1", "2", "3", "4"])) == [1.0, 2.0, 3.0, 4.0]
    assert most == 4


def test_async_rewards_of_a_batch_and_lambdas_that_return_coroutines_are_awaited():
    async def batch(completions, **columns):
        await asyncio.sleep(0)
        return [1.0 for _ in completions]

    async def single(text):
        return 2.0

    assert scores(batch, group(["a", "b"])) == [1.0, 1.0]
    assert scores(lambda completion: single(completion), group(["a"])) == [2.0]


def test_async_rewards_work_inside_a_running_loop():
    async def one(completion):
        await asyncio.sleep(0)
        return 1.0

    async def notebook_cell():
        return scores(one, group(["a"]))

    assert asyncio.run(notebook_cell()) == [1.0]


def test_an_exception_in_an_async_reward_names_its_row():
    async def judge(completion):
        await asyncio.sleep(0)
        raise KeyError(completion)

    with pytest.raises(RewardError, match=r"'judge' raised KeyError: 'b' .*prompt 9"):
        scores(judge, group(["b"], id=9))


def test_coroutines_are_closed_when_a_later_reward_raises():
    async def fine(completion):
        return 1.0

    def broken(completion):
        raise ValueError("no")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError):
            Rubric(fine, broken).score([group(["a"])])


def test_what_rewards_log_is_returned():
    def judge(completions, log_metric, log_extra, **columns):
        log_metric("judge/seconds", 2)
        log_extra("said", ["x", "y"])
        return [0.0, 0.0]

    notes = Rubric(judge).score([group(["a", "b"])])
    assert (notes.metrics, notes.extras) == ({"judge/seconds": [2.0]}, {"said": ["x", "y"]})


def test_trainer_state_reaches_rewards_that_ask():
    def early(completion, trainer_state):
        return trainer_state["step"]

    groups = [group(["a"])]
    Rubric(reward(early)).score(groups, trainer_state={"step": 3})
    assert groups[0].rewards == [3.0]


def test_columns_that_are_not_columns_never_reach_a_reward():
    seen = {}
    scores(lambda completions, **columns: seen.update(columns) or [0.0], group(["a"], completion="gold", completion_ids=[1], answer="x"))
    assert "completion" not in seen
    assert seen["completion_ids"] == [[2, 3]]
    assert seen["answer"] == ["x"]


def test_nothing_to_score_is_fine():
    assert Rubric(lambda completions: []).score([]).metrics == {}
