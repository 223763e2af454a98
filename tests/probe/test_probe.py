"""The probe on a model whose chances are known: a table of probabilities for each prompt instead of a transformer's opinion."""

import dataclasses

import pytest
from small import build_model, build_tokenizer

from posttrain import Rubric, UserError, reward, verifier
from posttrain.models.load import stop_token_ids
from posttrain.probe import probe
from posttrain.probe.advice import Setting, checks
from posttrain.probe.probe import HOPELESS, SOLVED, WORKS, judged
from posttrain.types import Completion, Group, Sampling, StopReason, Task

SAMPLING = Sampling(8, stop_token_ids=(0,))


@verifier
def right(completion):
    return completion == "right"


@reward(range=(0.0, 1.0))
def tagged(completion):
    return float(completion in ("right", "tagged"))


def groups_of(*texts_of_groups):
    """Groups with these texts, scored. A text "cut" was truncated."""
    groups = []
    for number, texts in enumerate(texts_of_groups):
        stops = [StopReason.LENGTH if text == "cut" else StopReason.STOP for text in texts]
        completions = [
            Completion([1, 2], [5, 5 if stop is StopReason.LENGTH else 0], [True] * 2, [0.0] * 2, [0.0] * 2, stop, text)
            for text, stop in zip(texts, stops, strict=True)
        ]
        groups.append(Group(Task(number, "1+1="), completions))
    rubric = Rubric(right, tagged)
    rubric.score(groups)
    return groups, rubric


def judge(*texts_of_groups, size=2, groups_per_rollout=4):
    tokenizer = build_tokenizer()
    groups, rubric = groups_of(*texts_of_groups)
    setting = Setting(600, 400, build_model(tokenizer), tokenizer, ["1+1="], 8, rubric.names)
    return judged(groups, rubric, SAMPLING, size, groups_per_rollout, 2.0, setting)


def test_few_completions_can_still_suggest_their_own_size():
    assert judge(["right", "wrong"], ["wrong", "right"]).suggested == 2
    assert judge(["right", "right"], ["wrong", "wrong"]).suggested is None


@pytest.mark.parametrize(("tasks", "size"), [(0, 2), (1, 1)])
def test_nothing_to_compare_is_said_before_anything_is_sampled(tasks, size):
    with pytest.raises(UserError, match="two or more completions"):
        probe(None, None, [Task(0, "1+1=")] * tasks, Rubric(right), SAMPLING, num_generations=size)


def test_a_mixed_task_can_work_and_its_figures_are_those_of_its_groups():
    found = judge(["right", "wrong"], ["right", "right"], ["wrong", "tagged"], ["wrong", "cut"])
    assert (found.exit_code, found.can_work) == (WORKS, True)
    assert found.verdict == "RL can work: 50% of groups of 2 will carry signal"
    assert (found.right, found.pass_at[1].value, found.pass_at[2].value) == (3, 3 / 8, 2 / 4)
    assert found.signal[2].value == 0.5  # the third group differs in its tags, the fourth in nothing
    assert (found.all_right.value, found.all_wrong.value) == (0.25, 0.5)
    assert (found.truncated.value, found.ended.value) == (1 / 8, 7 / 8)
    assert found.form.value == 4 / 8
    assert found.reward.high == 2.0
    assert found.components[0].full == 3 / 8
    assert found.tokens_per_rollout == 4 * (2 + 2 * 2)
    assert found.rollout_seconds == pytest.approx(2.0 * 8 / 8)


def test_never_right_is_hopeless_even_where_the_form_differs():
    found = judge(["tagged", "wrong"], ["wrong", "wrong"])
    assert found.exit_code == HOPELESS
    assert found.verdict.startswith("RL will not work here: no completion of 4 was right (the rewards still differ in 50% of groups")
    assert "SFT first" in found.verdict
    assert found.pass_at[1].high > 0.5  # two prompts prove little


def test_always_right_is_nothing_to_learn():
    found = judge(["right", "right"], ["right", "right"])
    assert found.exit_code == SOLVED
    assert "nothing to learn" in found.verdict


def test_prompts_that_are_right_or_wrong_throughout_carry_no_signal():
    found = judge(["right", "right"], ["wrong", "wrong"])
    assert found.exit_code == HOPELESS
    assert "nothing to compare" in found.verdict


def test_rewards_that_decide_nothing_are_judged_by_their_signal():
    groups, _ = groups_of(["tagged", "wrong"], ["wrong", "wrong"])
    rubric = Rubric(tagged)
    rubric.score(groups)
    tokenizer = build_tokenizer()
    setting = Setting(600, None, build_model(tokenizer), tokenizer, ["1+1="], 8, rubric.names)
    found = judged(groups, rubric, SAMPLING, 2, 4, 1.0, setting)
    assert (found.right, found.pass_at, found.exit_code) == (None, {}, WORKS)


def test_the_suggested_size_is_the_smallest_with_half_of_the_groups_in_motion():
    rare = ["right"] + ["wrong"] * 15  # of 16: groups of 8 hold the right one half of the time
    assert judge(rare, rare, size=4).suggested == 8
    assert judge(["wrong"] * 16, ["wrong"] * 16, size=4).suggested is None


def test_advice_says_what_is_unusual_and_nothing_where_all_is_well():
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    fine = Setting(500, 300, model, tokenizer, ["1+1="], 8, ["right"])
    assert [check.name for check in checks(fine, 0.0, 1.0, 0.0) if not check.ok] == []
    tokenizer = build_tokenizer()
    poor = dataclasses.replace(fine, rows=499, max_steps=299, tokenizer=tokenizer, prompts=["Think in <think> tags."])
    assert [check.name for check in checks(poor, 0.95, 0.01, 0.1) if not check.ok] == ["rows", "steps", "size", "template", "length", "end", "scored"]


@pytest.fixture
def world():
    tokenizer = build_tokenizer()
    tasks = [Task(number, f"{number % 10}+{number // 10}=") for number in range(40)]
    return build_model(tokenizer), tokenizer, tasks


def ones(completion):
    return float(completion.count("1"))


def test_sampling_is_drawn_by_the_seed_and_leaves_the_model_as_it_was(world):
    model, tokenizer, tasks = world
    model.train()
    sampling = Sampling(6, stop_token_ids=stop_token_ids(model, tokenizer))
    seen = []

    def ask(seed):
        found = probe(model, tokenizer, tasks, Rubric(ones), sampling, num_generations=4, prompts=10, completions=6, seed=seed, on_groups=seen.append)
        return dataclasses.replace(found, seconds=0.0, rollout_seconds=0.0)

    assert ask(0) == ask(0) != ask(1)
    assert model.training
    assert [len(groups) for groups in seen] == [10, 10, 10]
    assert {len(group.completions) for group in seen[0]} == {6}
    assert seen[0][0].completions[0].token_ids == seen[1][0].completions[0].token_ids


def test_a_group_is_never_larger_than_what_is_drawn(world):
    model, tokenizer, tasks = world
    sampling = Sampling(4, stop_token_ids=(0,))
    found = probe(model, tokenizer, tasks[:3], Rubric(ones), sampling, num_generations=8, completions=2)
    assert (found.n, found.k) == (3, 8)


def test_a_prompt_without_room_is_refused(world):
    model, tokenizer, tasks = world
    with pytest.raises(UserError, match="context"):
        probe(model, tokenizer, tasks, Rubric(ones), Sampling(64, stop_token_ids=(0,)), num_generations=2)
