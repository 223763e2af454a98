"""A reward that breaks is counted and dropped, tried again, or stops the run: as its policy says, at both levels, and never as a zero."""

import asyncio
import functools
import math
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.errors import RewardError, UserError
from posttrain.rewards import FailurePolicy, Rubric, reward, verifier
from posttrain.types import Completion, Group, StopReason, Task

HERE = Path(__file__).parent
FLAKY = f"{HERE}/flaky.py"
pytestmark = pytest.mark.filterwarnings("error")


def group(texts, *, id=0, prompt="p", **columns):
    completions = [Completion([1], [2, 3], [True, True], [0.0, 0.0], [0.0, 0.0], StopReason.STOP, text) for text in texts]
    return Group(Task(id, prompt, columns), completions)


def scored(rubric, *groups, **kwargs):
    report = rubric.score(list(groups), **kwargs)
    rubric.close()
    return [completion.reward for each in groups for completion in each.completions], report


def counts(report):
    return {name: dict(kinds) for name, kinds in report.failures.items()}


# Policies


def test_the_default_stops():
    with pytest.raises(RewardError, match="'f' returned nan for prompt 4"):
        scored(Rubric(reward(name="f")(lambda completion: math.nan)), group(["a"], id=4))


BROKEN = {
    "raised": lambda completion: 1 / 0,
    "not_finite": lambda completion: math.inf,
    "wrong_type": lambda completion: "1.0",
    "timed_out": lambda completion: time.sleep(300),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_dropped_is_none_and_counted_by_its_kind(kind):
    def f(completion):
        return BROKEN[kind](completion) if completion == "bad" else 2.0

    rewards, report = scored(Rubric(f, on_error="drop", timeout=0.5), group(["a", "bad", "b"], id=3))
    assert rewards == [2.0, None, 2.0]
    assert counts(report) == {"f": {kind: 1}}
    assert "prompt 3" in report.traces["f"]


def test_a_batch_answer_of_the_wrong_length_drops_the_batch():
    rewards, report = scored(Rubric(reward(name="f", on_error="drop")(lambda completions: [1.0])), group(["a", "b"]))
    assert rewards == [None, None]
    assert counts(report) == {"f": {"wrong_length": 2}}


def test_of_a_batch_answer_only_the_entries_that_are_no_scores_are_dropped():
    rewards, report = scored(Rubric(reward(name="f", on_error="drop")(lambda completions: [1.0, math.nan, None])), group(["a", "b", "c"]))
    assert rewards == [1.0, None, None]
    assert counts(report) == {"f": {"not_finite": 1}}  # None is an answer, not a failure


def test_a_completion_over_which_one_reward_broke_has_no_total():
    """A total without a part would be compared with totals that have it: that is the silent zero again."""

    @reward(on_error="drop")
    def breaks(completion):
        return 1 / len(completion)

    groups = [group(["", "a"])]
    rewards, report = scored(Rubric(breaks, lambda completion: 1.0), *groups)
    assert rewards == [None, 2.0]
    assert [how.partition(":")[0] for how in report.broken] == ["reward 'breaks' raised ZeroDivisionError"]
    assert groups[0].completions[0].scores == {"breaks": None, "lambda": 1.0}


def test_none_of_the_reward_itself_keeps_the_rest_of_the_total():
    assert scored(Rubric(lambda completion: None, lambda completion: 1.0), group(["a"]))[0] == [1.0]


def test_the_narrower_policy_wins():
    own = reward(name="own", on_error="stop", timeout=3)(lambda completion: 0)
    rubric = Rubric(own, lambda completion: 0, on_error="drop", retries=1)
    assert [each.policy for each in rubric.rewards] == [FailurePolicy(3, "stop", 1), FailurePolicy(None, "drop", 1)]
    outer = Rubric(rubric, lambda completion: 0, retries=5, timeout=math.inf)
    assert [each.policy.retries for each in outer.rewards] == [1, 1, 5]
    assert [each.policy.timeout for each in outer.rewards] == [3, math.inf, math.inf]


def test_the_trainers_default_is_the_widest():
    rubric = Rubric(lambda completion: math.nan)
    groups = [group(["a"])]
    with rubric.scoring(default=FailurePolicy(on_error="drop")) as batch:
        assert rubric.fill(groups, batch).failures["lambda"] == {"not_finite": 1}


def test_a_recipe_entry_says_the_policy_of_a_reward_and_of_a_preset():
    policy = {"timeout": 5, "on_error": "drop", "retries": 2, "workers": 2}
    made = Rubric.from_config([{"reward": f"{FLAKY}:needs_a_setting", "scale": 2.0, "weight": 3, **policy}, {"reward": "arithmetic", "retries": 1}])
    assert made.rewards[0].policy == FailurePolicy(5, "drop", 2, 2)
    assert made.weights[0] == 3.0
    assert made.rewards[0]("2") == 4.0
    assert [each.policy for each in made.rewards[1:]] == [FailurePolicy(retries=1)] * 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"timeout": 0}, "seconds"),
        ({"timeout": "5"}, "seconds"),
        ({"timeout": math.nan}, "seconds"),
        ({"on_error": "dropp"}, "Did you mean 'drop'"),
        ({"retries": -1}, "0 or more"),
        ({"retries": True}, "whole number"),
        ({"workers": 0}, "1 or more"),
        ({"timeouts": 1}, "Did you mean 'timeout'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(policy, message):
    for make in (reward, verifier, functools.partial(Rubric, lambda completion: 0)):
        with pytest.raises(UserError, match=message):
            make(**policy)


def test_a_user_error_in_a_reward_stops_whatever_the_policy():
    def no_gold(completion, answer):
        raise UserError(f"the gold answer {answer!r} is no number")

    with pytest.raises(UserError, match=r"'no_gold' raised UserError: the gold answer 'x' is no number.*prompt 8"):
        scored(Rubric(no_gold, on_error="drop", retries=3), group(["a"], id=8, answer="x"))


@pytest.mark.parametrize("score", [1.7e308, -1e16, 10**400])
def test_a_score_too_large_to_be_squared_is_no_score(score):
    with pytest.raises(RewardError, match=r"'f' returned .* for prompt 4"):
        scored(Rubric(reward(name="f")(lambda completion: score)), group(["a"], id=4))


def test_a_total_too_large_to_be_squared_stops_with_its_parts():
    with pytest.raises(RewardError, match=r"add up to 1\.1e\+15.*'f': 100000000000000.0.*smaller weights"):
        scored(Rubric((reward(name="f")(lambda completion: 1e14), 10.0), (reward(name="g")(lambda completion: 1.0), 1e14)), group(["a"]))


# Retries


@pytest.mark.parametrize("level", ["here", "thread", "worker"])
def test_a_failed_call_is_tried_again_and_the_attempts_are_counted(tmp_path, monkeypatch, level):
    monkeypatch.setenv("FLAKY_STATE", str(tmp_path))
    from posttrain.rewards.loading import load_reward

    function = load_reward(f"{FLAKY}:fails_at_first")
    monkeypatch.setitem(function.function.__globals__, "STATE", str(tmp_path))
    policy = {"retries": 2, "on_error": "drop", "timeout": math.inf if level == "here" else 20}
    scorer = f"{FLAKY}:fails_at_first" if level == "worker" else function.function
    rewards, report = scored(Rubric(scorer, **policy), group(["0", "1 a", "2 b", "3 c"]))
    assert rewards == [1.0, 2.0, 3.0, None]
    assert counts(report) == {"fails_at_first": {"raised": 1, "retried": 1 + 2 + 2}}
    assert (tmp_path / "3 c").read_text() == "..."


def test_what_a_failed_attempt_logged_is_forgotten():
    seen = []

    def f(completion, log_metric):
        log_metric("tries", 1.0)
        seen.append(completion)
        return math.nan if len(seen) < 3 else 1.0

    _, report = scored(Rubric(f, retries=2), group(["a"]))
    assert report.metrics == {"tries": [1.0]}


# Threads


def test_a_hanging_closure_is_left_behind_and_the_next_call_goes_on():
    begun = time.perf_counter()
    release = threading.Event()
    rewards, report = scored(
        Rubric(lambda completion: release.wait(60) if completion == "hang" else 1.0, on_error="drop", timeout=0.3), group(["a", "hang", "b", "hang"])
    )
    release.set()
    assert rewards == [1.0, None, 1.0, None]
    assert counts(report) == {"lambda": {"timed_out": 2}}
    assert time.perf_counter() - begun < 10


def test_the_late_answer_of_a_call_left_behind_changes_nothing():
    release, late = threading.Event(), threading.Event()

    def f(completion, log_metric):
        if completion == "late":
            release.wait(60)
            log_metric("m", 100.0)
            late.set()
            return 100.0
        log_metric("m", 1.0)
        return 1.0

    rubric = Rubric(f, on_error="drop", timeout=0.3)
    groups = [group(["late", "a", "b"])]
    with rubric.scoring() as batch:
        batch.add(groups[0])
        time.sleep(0.6)
        release.set()
        late.wait(10)
        report = rubric.fill(groups, batch)
    assert groups[0].rewards == [None, 1.0, 1.0]
    assert report.metrics == {"m": [1.0, 1.0]}


def test_a_timeout_error_that_a_reward_raises_is_not_its_timeout():
    def f(completion):
        raise TimeoutError("the server said so")

    assert counts(scored(Rubric(f, on_error="drop", timeout=5), group(["a"]))[1]) == {"f": {"raised": 1}}


@pytest.mark.parametrize("timeout", [0.5, math.inf])
def test_a_generator_is_read_where_its_exceptions_are_caught(timeout):
    def f(completions):
        yield 1.0
        raise KeyError("second")

    assert counts(scored(Rubric(f, on_error="drop", timeout=timeout), group(["a", "b"]))[1]) == {"f": {"raised": 2}}


def test_a_reward_that_exits_in_its_thread_ends_nothing():
    assert counts(scored(Rubric(lambda completion: exit(3), on_error="drop", timeout=5), group(["a"]))[1]) == {"lambda": {"raised": 1}}


def test_a_reward_without_a_timeout_stays_on_the_callers_thread():
    seen = set()
    scored(Rubric(lambda completion: seen.add(threading.get_ident()) or 1.0), group(["a", "b"]))
    assert seen == {threading.get_ident()}


# Async


@pytest.mark.parametrize("blocks", [False, True])
def test_an_async_reward_that_hangs_is_dropped_also_when_it_blocks_its_loop(blocks):
    release = threading.Event()

    async def f(completion):
        if completion == "hang":
            release.wait(20) if blocks else await asyncio.sleep(60)
        return 1.0

    rubric = Rubric(f, on_error="drop", timeout=0.4)
    first, second = [group(["hang"])], [group(["a"])]
    report = rubric.score(first)
    assert counts(report) == {"f": {"timed_out": 1}}
    rubric.score(second)
    release.set()
    rubric.close()
    assert second[0].rewards == [1.0]


def test_everything_works_inside_a_running_loop():
    async def cell():
        async def waits(completion):
            await asyncio.sleep(0.01)
            return 1.0

        rubric = Rubric(waits, lambda completion: 2.0, reward(name="t", timeout=5)(lambda completion: 3.0), f"{FLAKY}:does_as_told", timeout=20)
        return scored(rubric, group(["4"]))[0]

    assert asyncio.run(cell()) == [10.0]


# Overlap


def test_scoring_goes_on_while_groups_are_still_being_made():
    """Three levels at once, each a second of work for three groups, done when the last group is added."""
    rubric = Rubric(
        reward(name="thread", timeout=20)(lambda completion: time.sleep(0.2) or 1.0),
        reward(name="async")(lambda completion: asyncio.sleep(0.2, 1.0)),
        f"{FLAKY}:slow",
        timeout=20,
    )
    rubric.score([group(["0"])])  # workers have started
    groups = [group(["0.2"], id=i) for i in range(4)]
    with rubric.scoring() as batch:
        for each in groups:
            batch.add(each)
            time.sleep(0.5)
        begun = time.perf_counter()
        rubric.fill(groups, batch)
    rubric.close()
    assert time.perf_counter() - begun < 0.15
    assert [each.rewards for each in groups] == [[3.0]] * 4


def test_scores_and_notes_come_in_the_order_of_groups_whatever_finishes_first():
    def f(completion, log_metric):
        time.sleep(float(completion))
        log_metric("m", float(completion))
        return float(completion)

    texts = ["0.2", "0.05", "0.1"]
    rubric = Rubric(f, timeout=20)
    groups = [group([text], id=i) for i, text in enumerate(texts)]
    with rubric.scoring() as batch:
        for each in reversed(groups):
            batch.add(each)
        report = rubric.fill(groups, batch)
    assert [each.rewards[0] for each in groups] == [float(text) for text in texts]
    assert report.metrics == {"m": [float(text) for text in texts]}


def test_a_batch_reward_is_still_called_once_with_everything():
    sizes = []
    rubric = Rubric(lambda completions: sizes.append(len(completions)) or [0.0] * len(completions), timeout=20)
    groups = [group(["a", "b"]), group(["c"], id=1)]
    with rubric.scoring() as batch:
        for each in groups:
            batch.add(each)
        rubric.fill(groups, batch)
    assert sizes == [3]


def test_leaving_a_batch_unfinished_cancels_what_is_running():
    cancelled = threading.Event()

    async def f(completion):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with Rubric(f).scoring() as batch:
        batch.add(group(["a"]))
        time.sleep(0.2)
    assert cancelled.wait(5)


def test_no_more_threads_are_left_than_calls_that_hang():
    before = threading.active_count()

    async def waits(completion):
        return 1.0

    rubric = Rubric(reward(name="thread", timeout=5)(lambda completion: 1.0), waits, lambda completion: waits(completion))
    for _ in range(3):
        rubric.score([group(["a"] * 20)])
    assert threading.active_count() <= before + 4  # the loop that keeps time, and one for each reward
    rubric.close()


def leaves(completion):
    sys.exit(f"goodbye, {completion}")


async def leaves_later(completion):
    await asyncio.create_task(asyncio.to_thread(sys.exit, "goodbye"))


@pytest.mark.parametrize("function", [leaves, leaves_later])
@pytest.mark.parametrize("timeout", [math.inf, 5])
def test_a_reward_that_leaves_is_a_reward_that_raised(function, timeout):
    rewards, report = scored(Rubric(function, on_error="drop", timeout=timeout), group(["a", "b"]))
    assert rewards == [None, None]
    assert counts(report) == {function.__name__: {"raised": 2}}
    assert "SystemExit: goodbye" in report.traces[function.__name__]


def test_a_set_of_scores_has_no_order():
    with pytest.raises(RewardError, match="must return a list of 2 numbers"):
        scored(Rubric(lambda completions: {0.5, 1.0}), group(["a", "b"]))


def test_what_an_environment_broke_over_has_no_reward():
    broken = group(["a", "b"])
    broken.completions[1].broken = "the world ended"
    rewards, report = scored(Rubric(lambda completion: 1.0, on_error="stop"), broken)
    assert rewards == [1.0, None]
    assert broken.completions[1].scores == {"lambda": 1.0}
    assert report.failures == {}
