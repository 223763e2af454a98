"""The alarms on made-up runs: each kind rings on its curve, and nothing rings on noise."""

import random

import pytest

from posttrain.tracking.alarms import Alarms


def heard(logs):
    alarms = Alarms()
    return [sentence for log in logs for sentence in alarms.read(log)]


def curve(start, end, steps=60, noise=0.05, seed=0):
    """Flat, then a rise in the middle third, then flat, with noise."""
    rng = random.Random(seed)
    ramp = [min(max((3 * step - steps) / steps, 0.0), 1.0) for step in range(steps)]
    return [start + (end - start) * part + rng.gauss(0, noise) for part in ramp]


def logs(**curves):
    names = {"length": "completions/mean_length", "repeated": "completions/repeated"}
    columns = {names.get(name, name if name in ("reward", "solved") else f"rewards/{name}/mean"): values for name, values in curves.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def with_evaluations(steps, values):
    """An evaluation every so many logs."""
    every = len(steps) // len(values)
    out = []
    for index, log in enumerate(steps):
        if index % every == 0 and index // every < len(values):
            out.append({"eval_reward": 1.0, "eval_solved": values[index // every]})
        out.append(log)
    return out


def test_a_reward_that_rises_alone_is_told_with_the_component_that_earns_it():
    steps = with_evaluations(logs(reward=curve(1, 2), format=curve(0, 1, seed=1), right=curve(1, 1, seed=2)), [0.30, 0.31, 0.29, 0.30])
    [sentence] = heard(steps)
    assert "the reward rose from" in sentence
    assert "held-out prompts solved went from 30 % to 30 %" in sentence
    assert "most of all format" in sentence


def test_a_reward_that_rises_with_the_held_out_verifier_is_welcome():
    assert heard(with_evaluations(logs(reward=curve(1, 2)), [0.30, 0.35, 0.50, 0.60])) == []


def test_without_evaluations_the_verdicts_of_training_count():
    [sentence] = heard(logs(reward=curve(1, 2), solved=curve(0.3, 0.2, noise=0.01)))
    assert "training prompts solved" in sentence
    assert heard(logs(reward=curve(1, 2), solved=curve(0.3, 0.5, noise=0.01))) == []


def test_held_out_verdicts_go_before_those_of_training():
    steps = with_evaluations(logs(reward=curve(1, 2), solved=curve(0.3, 0.6, noise=0.01)), [0.30, 0.30, 0.28, 0.27])
    assert "held-out" in heard(steps)[0]


def test_two_evaluations_are_too_few_and_a_solved_task_cannot_improve():
    assert heard(with_evaluations(logs(reward=curve(1, 2)), [0.3, 0.3])) == []
    assert heard(with_evaluations(logs(reward=curve(1, 2)), [0.97, 0.97, 0.96, 0.96])) == []


def test_length_that_runs_away_is_told_unless_the_reward_rises_with_it():
    length = curve(100, 300, noise=10)
    [sentence] = heard(logs(reward=curve(1, 1), length=length))
    assert "the reward did not rise with them" in sentence
    assert heard(logs(reward=curve(1, 2), length=length)) == []
    assert heard(logs(reward=curve(1, 1), length=curve(100, 150, noise=5))) == []


def test_repetition_that_runs_away_is_told():
    [sentence] = heard(logs(reward=curve(1, 1), repeated=curve(0.1, 0.7, noise=0.02)))
    assert "% of what completions say they have said before (9 % at the beginning)" in sentence
    assert heard(logs(reward=curve(1, 1), repeated=curve(0.1, 0.2, noise=0.002))) == []


def test_a_component_at_the_cost_of_another_is_told():
    [sentence] = heard(logs(reward=curve(1, 1), brevity=curve(0, 1), right=curve(1, 0.3, seed=3)))
    assert "brevity rises" in sentence
    assert "right falls" in sentence
    assert heard(logs(reward=curve(1, 1), brevity=curve(0, 1), right=curve(1, 1, seed=3))) == []


def test_each_kind_is_told_once():
    steps = logs(reward=curve(1, 1, steps=300), repeated=curve(0.1, 0.7, steps=300, noise=0.02))
    assert len(heard(steps)) == 1


def test_a_short_run_has_no_alarms():
    assert heard(logs(reward=curve(1, 9, steps=18), length=curve(10, 900, steps=18), repeated=curve(0, 1, steps=18))) == []


def noise_of(kind, seed, steps=300):
    rng = random.Random(seed)
    if kind == "steps":
        return [float(rng.random() < 0.1) for _ in range(steps)]
    if kind == "heavy":
        return [rng.gauss(0, 1) / max(abs(rng.gauss(0, 1)), 0.05) for _ in range(steps)]
    value, values = 0.0, []
    for _ in range(steps):
        value = (0.5 * value if kind == "remembering" else 0.0) + rng.gauss(0, 1)
        values.append(value)
    return values


@pytest.mark.parametrize("kind", ["white", "remembering", "heavy", "steps"])
def test_flat_noise_rings_nothing(kind):
    """40 runs of 300 logs, six metrics each, and evaluations that never improve."""
    rung = 0
    for seed in range(40):
        made = [noise_of(kind, 10 * seed + index) for index in range(6)]
        flat = logs(
            reward=made[0],
            a=made[1],
            b=made[2],
            solved=[0.4 + 0.01 * value for value in made[3]],
            length=[100 + 10 * value for value in made[4]],
            repeated=[0.3 + 0.02 * value for value in made[5]],
        )
        rung += len(heard(with_evaluations(flat, [0.4, 0.39, 0.4, 0.38])))
    assert rung == 0


def test_values_that_are_no_numbers_are_passed_over():
    steps = logs(reward=[float("nan")] * 60, a=[float("inf")] * 60)
    assert heard(steps) == []


def test_constants_ring_nothing():
    assert heard(logs(reward=[1.0] * 60, a=[0.1] * 60, b=[0.7] * 60, length=[5.0] * 60)) == []
