"""Runs as the recorder writes them, without a model: for tests of what reads them."""

import contextlib
import math
import subprocess
import sys

from posttrain.tracking.events import CollectedGroup, CompletionKey, RunStore, StepRecord, TokenDetail
from posttrain.types import Completion, Group, StopReason, Task

CONFIG = {"max_steps": 100, "epsilon": 0.2, "epsilon_high": None, "scale_rewards": "group", "temperature": 1.0, "record_tokens_of": 4}


def completion(text, reward, *, scores=None, stop="stop", sampled=None, **more):
    """One token a character; its id is the character's code."""
    ids = [ord(char) for char in text] or [0]
    logprobs = [-0.1 * (place % 7) for place in range(len(ids))]
    scores = {"right": reward} if scores is None else scores
    return Completion([1], ids, sampled or [True] * len(ids), logprobs, logprobs, StopReason(stop), text, scores=scores, reward=reward, **more)


def group(prompt, completions, advantages=None):
    """Advantages as GRPO has them, unless they are given."""
    scored = [one.reward for one in completions if one.reward is not None]
    mean = sum(scored) / len(scored) if scored else 0.0
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in scored) / max(len(scored) - 1, 1))
    given = advantages or [0.0 if one.reward is None else (one.reward - mean) / (deviation + 1e-4) for one in completions]
    return CollectedGroup(Group(Task(0, prompt), completions), given, prompt)


def details(step, number, collected, ratio=1.0, updated_at=None):
    made = []
    for index, one in enumerate(collected.group.completions):
        count = len(one.token_ids)
        made.append(TokenDetail(CompletionKey(step, number, index), [-0.2] * count, [ratio] * count, [0.7] * count, [0.01] * count))
    return made


def scalars(step):
    return {
        "reward": -1.0 + 0.04 * step,
        "rewards/right/mean": -1.0 + 0.03 * step,
        "rewards/form/mean": 0.01 * step,
        "frac_reward_zero_std": 0.25,
        "reward_std": 0.8,
        "entropy": 1.0 / step,
        "kl": 0.001 * step,
        "clip_ratio/region_mean": 0.01,
        "completions/mean_length": 20.0 + step,
        "completions/clipped_ratio": 0.1,
        "grad_norm": 0.5,
        "learning_rate": 1e-5,
        "loss": 0.01,
        "time/collect": 0.6,
        "time/reward": 0.1,
        "time/update": 0.9,
        "step_time": 1.8,
        "tokens_per_second": 900.0,
        "memory/process_gib": 1.5,
    }


def record(step, groups, *, ratio=1.0):
    """A step of these groups, with the details of all their tokens."""
    seen = {token for one in groups for member in one.group.completions for token in member.token_ids}
    return StepRecord(
        step,
        scalars(step),
        groups,
        [detail for number, one in enumerate(groups) for detail in details(step, number, one, ratio)],
        seconds=1.8 * step,
        vocabulary={token: chr(token) if token else "<end>" for token in seen},
    )


def plain_groups(step):
    """Four groups of four: one with a signal, one without, one with an answer that was cut, one with one that was not scored."""
    return [
        group(f"What is {step}+1?", [completion(f"It is {step + place}", float(place == 1)) for place in range(4)]),
        group("Say a number.", [completion(f"{step} {place}", 1.0) for place in range(4)]),
        group(
            "Be brief.",
            [completion("no", 0.5), completion("yes, and on and on", 0.1, stop="length"), completion("no.", 0.4), completion("never", 0.2)],
        ),
        group("Odd one.", [completion("a", 1.0), completion("b", None, scores={"right": None}), completion("c", 0.0), completion("d", 0.5)]),
    ]


def write_run(directory, steps, *, groups=plain_groups, meta=None, first=1, ratio=1.0):
    """The store, still open: close it, or go on with `store.write(record(...))`."""
    store = RunStore(directory / "run.sqlite")
    store.write_meta({"config": CONFIG, "method": "GRPO", "max_steps": 100, "started_at": 1.0, "versions": {"posttrain": "0"}} | (meta or {}))
    for step in range(first, first + steps):
        store.write(record(step, groups(step), ratio=ratio))
    return store


# Writes a step, and holds the store open until it is told to end.
WRITER = """
import sys
from posttrain.tracking.events import RunStore, StepRecord
store = RunStore(sys.argv[1])
store.write(StepRecord(1, {"reward": 1.0}))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_writer(directory):
    """A process that writes a run there."""
    command = [sys.executable, "-c", WRITER, str(directory / "run.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
