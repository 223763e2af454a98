"""Many at once: in order, none lost. And the same jobs somewhere else."""

import json
import sys
import threading
import time

import pytest

from posttrain.sandbox import Asserts, Call, CommandRunner, InputOutput, Job, Limits, Pool, Sandbox, Verdict, strongest
from posttrain.sandbox.isolation import Level
from posttrain.sandbox.job import Result

LEVEL = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")


class Slow:
    """A runner of one's own: anything with `judge`."""

    def __init__(self):
        self.running, self.most, self.lock = 0, 0, threading.Lock()

    def judge(self, job):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.02 if job.program == "0" else 0.001)
        with self.lock:
            self.running -= 1
        return Verdict((Result(True, job.program),))


def test_verdicts_come_in_the_order_of_the_jobs_and_no_more_run_than_said():
    runner = Slow()
    with Pool(runner, workers=3) as pool:
        verdicts = pool.judge_all(Job(str(i), [Asserts("")]) for i in range(100))
    assert [verdict.results[0].why for verdict in verdicts] == [str(i) for i in range(100)]
    assert runner.most == 3


@LEVEL
def test_forty_programs_are_judged_each_by_its_own_test():
    with Pool(Sandbox("namespaces"), workers=4) as pool:
        verdicts = pool.judge_all(Job(f"def f(): return {n if n % 4 else -1}", [Call("f", [], n)]) for n in range(1, 41))
    assert [verdict.passed for verdict in verdicts] == [n % 4 != 0 for n in range(1, 41)]


PARTIAL = json.dumps(Verdict((Result(True),)).to_json())  # of two tests
JOBS = [
    Job("def f(x): return x", [Call("f", [(1, 2**70)], (1, 2**70)), Call("f", [{1}], {2}, also=[{1}])], limits=Limits(wall_s=5)),
    Job("print(input())", [InputOutput("a", "a")], tolerance=0.5, stop_at_failure=True),
    Job("x = 1", [Asserts("assert f() == 1")], setup="import math"),
]


@pytest.mark.parametrize("job", JOBS, ids=["calls", "input_output", "asserts"])
def test_a_job_survives_the_journey(job):
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


@LEVEL
def test_a_command_that_speaks_the_protocol_gives_the_same_verdicts():
    remote, here = CommandRunner([sys.executable, "-m", "posttrain.sandbox"]), Sandbox("namespaces")
    for job in JOBS:
        there = remote.judge(job)
        assert there.error is None
        assert [result.passed for result in there.results] == [result.passed for result in here.judge(job).results]


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (["/no/such/command"], "failed"),
        ([sys.executable, "-c", "print('passed')"], "no verdict"),
        ([sys.executable, "-c", "import sys; sys.exit('down')"], "down"),
        ([sys.executable, "-c", "print('{\"results\": true}')"], "no verdict"),
        ([sys.executable, "-c", f"print({PARTIAL!r})"], "no verdict"),
    ],
)
def test_a_remote_that_fails_is_an_error_and_no_verdict(command, cause):
    verdict = CommandRunner(command).judge(JOBS[0])
    assert cause in verdict.error
    assert not verdict.passed
