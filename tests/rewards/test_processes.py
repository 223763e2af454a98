"""Rewards in processes of their own: every call is answered once and by its own answer, whatever is killed, printed or crashed meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from posttrain.errors import RewardError, UserError
from posttrain.rewards import Rubric, reward, verifier
from posttrain.types import Completion, Group, StopReason, Task

HERE = Path(__file__).parent
FLAKY = f"{HERE}/flaky.py"


def group(texts, *, id=0, prompt="p", **columns):
    completions = [Completion([1], [2, 3], [True, True], [0.0, 0.0], [0.0, 0.0], StopReason.STOP, text) for text in texts]
    return Group(Task(id, prompt, columns), completions)


@pytest.fixture
def rubric():
    """Makes rubrics of flaky.py's rewards, in workers; their processes end with the test."""
    made = []

    def make(name, **policy):
        made.append(Rubric.from_config([{"reward": f"{FLAKY}:{name}", "timeout": 30, "workers": 2, "on_error": "drop", **policy}]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def scores(rubric, texts, **columns):
    one = group(texts, **columns)
    report = rubric.score([one])
    return one.rewards, {kind: count for kinds in report.failures.values() for kind, count in kinds.items()}


@pytest.fixture(autouse=True)
def before(monkeypatch):
    """Workers that other tests of this process have left: a reward of the library keeps its worker until the process ends."""
    monkeypatch.setitem(globals(), "OTHERS", {child.pid for child in psutil.Process().children()})


def workers():
    return [child for child in psutil.Process().children() if is_worker(child) and child.pid not in OTHERS]  # noqa: F821


def is_worker(child):
    try:
        return "posttrain.rewards.execution.worker" in child.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it ended just now
        return False


def test_a_named_reward_with_a_timeout_runs_in_another_process(rubric):
    (pid,), _ = scores(rubric("does_as_told"), ["pid"])
    assert pid != os.getpid()


def test_workers_alone_move_a_named_reward_out_as_well(rubric):
    (pid,), _ = scores(rubric("does_as_told", timeout=float("inf")), ["pid"])
    assert pid != os.getpid()


def test_without_a_timeout_a_named_reward_stays_here():
    (pid,), _ = scores(Rubric(f"{FLAKY}:does_as_told"), ["pid"])
    assert pid == os.getpid()


def test_an_async_reward_stays_here_unless_it_asks_for_workers(rubric):
    assert scores(rubric("waits"), ["2"])[0] == [2.0]
    assert len(workers()) == 1
    assert scores(Rubric.from_config([{"reward": f"{FLAKY}:waits", "timeout": 5}]), ["2"])[0] == [2.0]
    assert len(workers()) == 1


@pytest.mark.parametrize(
    ("text", "kind"), [("exit", "raised"), ("sys.exit", "raised"), ("crash", "raised"), ("word", "raised"), ("nan", "not_finite")]
)
def test_what_ends_or_breaks_a_worker_is_a_failure_of_that_completion_only(rubric, text, kind):
    rewards, failures = scores(rubric("does_as_told"), ["1", text, "2", "3"])
    assert rewards == [1.0, None, 2.0, 3.0]
    assert failures[kind] == 1


def test_an_endless_loop_is_killed_and_leaves_no_process(rubric):
    made = rubric("does_as_told", timeout=1.0, workers=1)
    assert scores(made, ["1", "loop", "2"]) == ([1.0, None, 2.0], {"timed_out": 1})
    assert len(workers()) == 1  # the one that took the killed one's place
    made.close()
    assert psutil.wait_procs(workers(), timeout=5)[1] == []


def test_what_a_reward_prints_is_no_answer_and_stdin_is_empty(rubric):
    assert scores(rubric("does_as_told"), ["print", "stdin", "2"]) == ([1.0, 0.0, 2.0], {})


def test_the_traceback_of_a_worker_reaches_the_report(rubric):
    report = rubric("does_as_told").score([group(["word"], id=6)])
    assert "'does_as_told' raised ValueError: could not convert string to float: 'word' at " in report.traces["does_as_told"]
    assert "prompt 6" in report.traces["does_as_told"]
    assert "return float(completion)" in report.traces["does_as_told"]


def test_under_stop_the_message_names_reward_row_and_line(rubric):
    with pytest.raises(RewardError, match=r"'does_as_told' raised ValueError.* at .*flaky\.py:\d+, while scoring prompt 0"):
        scores(rubric("does_as_told", on_error="stop"), ["word"])


def test_logs_trainer_state_batches_groups_and_settings_cross_over(rubric):
    @dataclass
    class State:
        global_step: int

    report = (made := rubric("logs")).score([one := group(["abc", "d"])], trainer_state=State(7))
    assert (one.rewards, report.metrics) == ([7.0, 7.0], {"length": [3.0, 1.0]})
    made.close()
    report = rubric("batch").score([one := group(["1", "2"], answer="x", level=3)])
    assert (one.rewards, report.extras) == ([1.0, 2.0], {"said": ["1", "2"]})
    assert scores(rubric("of_group"), ["1"], answer="x")[0] == [1.0]
    assert scores(rubric("needs_a_setting", scale=3.0), ["1"])[0] == [3.0]


@pytest.mark.parametrize("text", ["", "\0", "\ud800 half", "é" * 100_000, '"}\n{"answer": 5}\n', "\u2028"])
def test_any_text_crosses_over_unchanged(rubric, text):
    report = rubric("logs").score([group([text])], trainer_state=type("S", (), {})())
    assert report.failures["logs"] == {"raised": 1}  # that state has no step; the text came that far
    assert report.metrics == {}


def test_a_column_that_is_not_json_is_the_users_mistake(rubric):
    with pytest.raises(UserError, match="its argument 'answer' is not JSON"):
        scores(rubric("batch"), ["1"], answer={1, 2})


REFUSES = """
from posttrain.errors import UserError
from posttrain.rewards import reward

def prepare():
    with open({count!r}, "a") as file:
        file.write(".")
    raise UserError("it needs a library: pip install it")

@reward(prepare=prepare, on_error="drop", workers=1)
def needs_a_library(completion):
    return 1.0
"""


def test_a_worker_that_finds_something_missing_stops_the_run_and_no_other_is_started(tmp_path):
    (tmp_path / "mine.py").write_text(REFUSES.format(count=str(tmp_path / "count")))
    rubric = Rubric(f"{tmp_path}/mine.py:needs_a_library")
    with pytest.raises(UserError, match=r"'needs_a_library' cannot start in a worker: .*pip install it.* prompt 5"):
        rubric.score([group(["a"] * 4, id=5)])
    assert (tmp_path / "count").read_text() == "."
    rubric.close()


def test_a_closure_that_asks_for_workers_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="no other process can find it"):
        Rubric(reward(workers=2)(lambda completion: 1.0))
    with pytest.raises(UserError, match="no other process can find it"):
        Rubric(verifier(lambda completion: True), workers=1)


def test_workers_killed_from_outside_lose_and_double_no_score(rubric, tmp_path):
    """Eight times a worker at work is killed: every completion still gets its own score, and what was repeated is counted."""
    made = rubric("marks", workers=2)
    killed, marked = [], tmp_path / "pid"

    def kill():
        while len(killed) < 8:
            time.sleep(0.1)
            victim = marked.read_text() if marked.exists() else ""
            if victim and victim not in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(victim), signal.SIGKILL)
                killed.append(victim)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    retried = rounds = 0
    while killer.is_alive() and rounds < 200:
        texts = [str(rounds * 1000 + index) for index in range(200)]
        rewards, failures = scores(made, texts, state=str(tmp_path))
        assert rewards == [float(text) for text in texts]
        assert set(failures) <= {"retried"}
        retried += failures.get("retried", 0)
        rounds += 1
    assert len(killed) == 8
    assert 1 <= retried <= 8


TRAINER = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from test_processes import FLAKY, group
from posttrain.rewards import Rubric
Rubric.from_config([{{"reward": f"{{FLAKY}}:does_as_told", "timeout": 600, "workers": 1}}]).score([group(sys.argv[1:])])
"""


def test_when_the_trainer_is_killed_its_workers_end_with_all_they_started_whatever_they_do():
    trainers = {text: subprocess.Popen([sys.executable, "-c", TRAINER, text]) for text in ("loop", "C loop")}
    for text, trainer in trainers.items():
        found = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(is_worker(each) and each.cpu_times().user > 1.5 for each in found):  # it is in the loop
            time.sleep(0.1)
            found = psutil.Process(trainer.pid).children(recursive=True)
        assert len(found) == (3 if text == "C loop" else 2)  # worker, guard, and what the worker started
        trainer.kill()
        trainer.wait()
        assert psutil.wait_procs(found, timeout=10)[1] == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a process's memory")
def test_more_memory_than_allowed_is_an_error_of_the_reward_and_the_worker_goes_on(rubric):
    made = rubric("does_as_told", memory_mb=512, workers=1)
    assert scores(made, ["1", "memory", "2"]) == ([1.0, None, 2.0], {"raised": 1})
    assert "MemoryError" in made.score([group(["memory"])]).traces["does_as_told"]


def test_a_reward_that_limits_memory_runs_in_a_worker_and_needs_a_name():
    made = Rubric.from_config([{"reward": f"{FLAKY}:does_as_told", "memory_mb": 512}])
    assert scores(made, ["pid"])[0] != [float(os.getpid())]
    made.close()
    with pytest.raises(UserError, match="no other process can find it"):
        Rubric(reward(memory_mb=512)(lambda completion: 1.0))


def test_of_a_message_of_50_megabytes_the_beginning_arrives_and_soon(rubric):
    made = rubric("does_as_told", workers=1)
    scores(made, ["1"])
    begun = time.perf_counter()
    report = made.score([group(["message 25000000"])])
    assert time.perf_counter() - begun < 15  # it was more than 30; now 0.3 on an idle machine
    assert "ValueError: x\nx\n" in report.traces["does_as_told"]
    assert len(report.traces["does_as_told"]) < 10_000


@pytest.mark.parametrize("text", ["GeneratorExit", "KeyboardInterrupt", "Leaves", "unreadable"])
def test_what_is_no_ordinary_exception_is_named_all_the_same(rubric, text):
    made = rubric("does_as_told", workers=1)
    report = made.score([one := group(["1", text, "2"])])
    assert one.rewards == [1.0, None, 2.0]
    assert f"raised {text.capitalize() if text == 'unreadable' else text}" in report.traces["does_as_told"]
    assert report.failures["does_as_told"] == {"raised": 1}  # by the same worker, not by its death
