"""What a reward does to its caller is undone or named; a real Ctrl-C stays one."""

import copy
import locale
import os
import random
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from posttrain.errors import RewardError
from posttrain.rewards import Rubric, reward
from posttrain.rewards.surroundings import Surroundings
from posttrain.types import Completion, Group, StopReason, Task


def group(texts=("a", "b"), prompt="p", **columns):
    completions = [Completion([1], [2, 3], [True, True], [0.0, 0.0], [0.0, 0.0], StopReason.STOP, text) for text in texts]
    return Group(Task(7, prompt, columns), completions)


def named(function, **policy):
    """What the report names after this reward, which must score all the same."""

    def f(completion):
        function()
        return 1.0

    rubric = Rubric(reward(name="f", **policy)(f))
    report = rubric.score([one := group()])
    rubric.close()
    assert one.rewards == [1.0, 1.0]
    return report.changed.get("f", [])


# Inputs


def appends(completions, prompts, tags, **_):
    for each in (completions, prompts, tags, tags[0], tags[0]["deep"], prompts[0]):
        each.append("!") if isinstance(each, list) else each.update(new=1)
    return [1.0, 1.0]


def empties(group, tags):
    scores = [1.0] * len(group.completions)
    group.completions[0].token_ids.clear()
    group.completions[0].info["x"] = 1.0
    group.completions.clear()
    group.task.columns.clear()
    tags["deep"].clear()
    return scores


@pytest.mark.parametrize("function", [appends, empties])
@pytest.mark.parametrize("timeout", [float("inf"), 20])
def test_what_a_reward_does_to_its_inputs_nobody_else_sees(function, timeout):
    one = group(prompt=[{"role": "user", "content": "p"}], tags={"deep": [1]})
    before = copy.deepcopy(one)
    seen = []
    rubric = Rubric(
        reward(name="first", timeout=timeout)(function), lambda completion, tags, prompt: float(len(seen.append((tags, prompt)) or tags["deep"]))
    )
    rubric.score([one])
    rubric.close()
    assert one.rewards == [2.0, 2.0]
    assert seen == [({"deep": [1]}, before.task.prompt)] * 2
    for now, then in zip(one.completions, before.completions, strict=True):
        then.scores, then.reward = now.scores, now.reward
    assert one == before


def test_tensors_and_objects_are_not_copied():
    tensor, seen = torch.zeros(3), []
    Rubric(lambda completion, image: float(bool(seen.append(image)))).score([group(image=tensor)])
    assert all(each is tensor for each in seen)


# Global state


def set_grad():
    torch.set_grad_enabled(False)


def set_filters():
    warnings.simplefilter("ignore")


CHANGES = {
    "torch's gradient mode": (set_grad, torch.is_grad_enabled),
    "torch's default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch's number of threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "torch's deterministic algorithms": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "torch's default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "torch's precision of float32 products": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "how numpy treats errors": (lambda: np.seterr(all="raise"), np.geterr),
    "the working directory": (lambda: os.chdir("/"), os.getcwd),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if locale.setlocale(locale.LC_ALL) == "C" else "C"), lambda: locale.setlocale(locale.LC_ALL)),
    "the recursion limit": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "the filters of warnings": (set_filters, lambda: list(warnings.filters)),
    "an alarm that was still set": (lambda: signal.setitimer(signal.ITIMER_REAL, 60), lambda: signal.getitimer(signal.ITIMER_REAL)[0]),
    "the handler of SIGINT": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGINT)),
    "the handler of SIGTERM": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_left_changed_is_set_back_and_named(name):
    change, read = CHANGES[name]
    before = read()
    assert named(change) == [name]
    assert read() == before


def test_an_exception_sets_it_back_too():
    def f(completion):
        torch.set_grad_enabled(False)
        raise ValueError

    with pytest.raises(RewardError):
        Rubric(f).score([group()])
    assert torch.is_grad_enabled()


def test_environment_variables_are_named_and_kept(monkeypatch):
    monkeypatch.delenv("POSTTRAIN_A_TEST", raising=False)
    assert named(lambda: os.environ.update(POSTTRAIN_A_TEST="1")) == ["environment variables (kept)"]
    assert os.environ.pop("POSTTRAIN_A_TEST") == "1"


def test_beside_training_it_is_named():
    before = torch.get_default_dtype()
    assert named(lambda: torch.set_default_dtype(torch.float64), timeout=20) == ["torch's default dtype"]
    torch.set_default_dtype(before)


def test_a_reward_that_changes_nothing_is_not_named():
    assert named(lambda: None) == named(lambda: None, timeout=20) == []


# Random numbers


DRAW = {
    "Python": (random.random, random.seed),
    "numpy": (np.random.random, np.random.seed),
    "torch": (lambda: float(torch.rand(())), torch.manual_seed),
}


@pytest.mark.parametrize("kind", DRAW)
def test_a_reward_that_seeds_does_not_repeat_the_numbers_of_training(kind):
    draw, seed = DRAW[kind]
    seed(1)
    drawn = []
    for _ in range(4):
        assert named(lambda: seed(0)) == [f"the random numbers of {kind}"]
        drawn.append(draw())
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("kind", DRAW)
def test_a_reward_that_draws_sees_other_numbers_in_every_batch_and_a_run_repeats(kind):
    draw, seed = DRAW[kind]

    def run():
        seed(5)
        seen = []
        for _ in range(3):
            named(lambda: seen.append(draw()))
        return [*seen, draw()]

    first = run()
    assert len(set(first)) == len(first)
    assert run() == first


@pytest.mark.parametrize("kind", DRAW)
def test_without_a_draw_random_numbers_go_on_untouched(kind):
    draw, seed = DRAW[kind]
    seed(3)
    expected = [draw(), draw()]
    seed(3)
    first = draw()
    named(lambda: None)
    assert [first, draw()] == expected


# Exceptions


class Leaves(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), Leaves("for good"), SystemExit(3)])
@pytest.mark.parametrize("timeout", [float("inf"), 20])
def test_what_is_no_ordinary_exception_is_named(error, timeout):
    def f(completion):
        raise error

    with pytest.raises(RewardError, match=f"'f' raised {type(error).__name__}.* while scoring prompt 7"):
        Rubric(reward(name="f", timeout=timeout)(f)).score([group()])


@pytest.mark.parametrize("handler", [None, "own"])
def test_a_real_interrupt_reaches_the_caller(handler):
    def raises(*_):
        raise Leaves("by a signal")

    before = signal.getsignal(signal.SIGTERM)
    if handler is not None:
        signal.signal(signal.SIGTERM, raises)
    try:
        number, error = (signal.SIGTERM, Leaves) if handler else (signal.SIGINT, KeyboardInterrupt)

        def f(completion):
            os.kill(os.getpid(), number)
            time.sleep(5)

        with pytest.raises(error):
            Rubric(reward(name="f", on_error="drop")(f)).score([group()])
        assert Rubric(lambda completion: 1.0).score([one := group()]).changed == {}
        assert one.rewards == [1.0, 1.0]
        assert signal.getsignal(signal.SIGTERM) is (raises if handler else before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_costs_little():
    costs = []
    for _ in range(20):
        begun = time.process_time()
        for _ in range(20):
            Surroundings(whole=True).differences(restore=True)
        costs.append((time.process_time() - begun) / 20)
    assert min(costs) < 2e-3  # seconds; about 1e-4 on an idle machine
