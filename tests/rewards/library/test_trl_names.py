"""Rewards under TRL's names: its signatures and its scores. The figures were compared with TRL 1.16's on the same texts."""

from __future__ import annotations

import functools
import pickle
import threading
from typing import Any

import pytest

import posttrain.rewards as rewards
from posttrain import Rubric
from posttrain.errors import UserError
from posttrain.rewards.loading import load_reward, names_model
from posttrain.types import Completion, Group, StopReason, Task

THIRD = r"\frac{1}{3}"


def says(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def group(texts: list[str], **columns: Any) -> Group:
    task = Task(0, [{"role": "user", "content": "?"}], columns)
    return Group(task, [Completion([1], [2, 3], [True] * 2, [0.0] * 2, [0.0] * 2, StopReason.STOP, text, says(text)[0]) for text in texts])


def test_answers_are_compared_as_mathematics():
    completions = says(r"\boxed{\frac{63}{400}}", r"so it is \boxed{63/400}", r"\boxed{\frac{64}{400}}", "63/400 without LaTeX")
    assert rewards.accuracy_reward(completions, [r"\frac{63}{400}"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_a_solution_that_is_no_mathematics_is_not_scored():
    logged: dict[str, list[Any]] = {}
    scores = rewards.accuracy_reward(says(r"\boxed{1}", r"\boxed{1}"), ["no answer here", "1"], log_extra=logged.__setitem__)
    assert scores == [None, 1.0]
    assert logged["gold_parsed"][0] == "[unparseable]"
    assert logged["answer_parsed"][0] == "[skipped]"


def test_plain_text_and_other_threads_are_scored_too():
    scores: list[Any] = []
    thread = threading.Thread(target=lambda: scores.extend(rewards.accuracy_reward([r"\boxed{2}"], ["2"])))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_only_what_follows_the_reasoning_is_an_answer():
    completions = says(
        rf"<think>hm</think> \boxed{{{THIRD}}}",
        rf"<think>\boxed{{{THIRD}}}</think> I am not sure",
        rf"<think>\boxed{{{THIRD}}}",
        rf"a/end \boxed{{{THIRD}}}",
    )
    assert rewards.reasoning_accuracy_reward(completions, [THIRD] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert rewards.reasoning_accuracy_reward(completions, [THIRD] * 4, reasoning_delimiters=["/end", "</think>"]) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think>b", 1.0),
        ("<think></think>", 1.0),
        ("<think>a\nb</think>\n", 1.0),
        (" <think>a</think>", 0.0),
        ("<think>a<think>b</think>", 0.0),
        ("<think>a", 0.0),
        ("a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_comes_first_and_once(text: str, score: float):
    assert rewards.think_format_reward(says(text)) == [score]


def test_length_scales_what_an_answer_earns():
    scaled = rewards.get_cosine_scaled_reward(max_len=100)
    completions = says(*[rf"\boxed{{{THIRD}}}"] * 3, *[r"\boxed{\frac{1}{2}}"] * 3, r"\boxed{1}")
    lengths = [[1] * n for n in (0, 50, 900, 0, 50, 900, 50)]
    scores = scaled(completions, [THIRD] * 6 + ["words"], lengths)
    assert scores[:6] == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5])
    assert scores[6] is None


def test_repeated_tokens_are_penalised():
    penalty = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert penalty([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], []], completions=None) == [0.0, -0.75, 0.0, 0.0]
    with pytest.raises(UserError, match="must not be positive"):
        rewards.get_repetition_penalty_reward(max_penalty=0.5)


def test_what_is_too_long_is_punished():
    punished = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert punished([[1] * n for n in (0, 80, 90, 100, 101)]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert rewards.get_soft_overlong_punishment(10, 0)([[1] * 10, [1] * 11]) == [0.0, -1.0]


def test_what_is_made_can_be_pickled_and_has_a_name():
    made = [rewards.get_cosine_scaled_reward(9), rewards.get_repetition_penalty_reward(), rewards.get_soft_overlong_punishment(9, 3)]
    assert [pickle.loads(pickle.dumps(one)) for one in made] == made
    assert [one.__name__ for one in made] == ["cosine_scaled_reward", "repetition_penalty_reward", "soft_overlong_punishment_reward"]


def test_the_names_work_in_a_rubric_and_answers_are_graded_in_a_process_of_their_own():
    settings = {"reward": "get_soft_overlong_punishment", "max_completion_len": 4, "soft_punish_cache": 2}
    by_name = Rubric.from_config(["accuracy_reward", "think_format_reward", settings])
    after_end = functools.partial(rewards.reasoning_accuracy_reward, reasoning_delimiters=["END"])
    for rubric in (by_name, Rubric(after_end)):
        scored = group([r"END \boxed{2}", r"\boxed{3}"], solution="2")
        try:
            rubric.score([scored])
        finally:
            rubric.close()
        accuracy = rubric.names[0]
        assert [completion.scores[accuracy] for completion in scored.completions] == [1.0, 0.0]
    assert by_name.names == ["accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward"]


def test_names_of_models_are_told_from_those_of_rewards(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert names_model(str(tmp_path))
    assert names_model("owner/some-model")
    assert not any(map(names_model, ["gsm8k", "folder/file.py:right", "package.module:right", "other/file.py", None, len]))
    with pytest.raises(UserError, match=r"there is no reward 'acuracy_reward'.*accuracy_reward"):
        load_reward("acuracy_reward")
