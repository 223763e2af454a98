"""Rewards that break, for tests: what happens to a completion follows from its text alone. Loaded by name, so it imports little."""

import ctypes
import hashlib
import os
import subprocess
import sys
import time

STATE = os.environ.get("FLAKY_STATE", "")  # a folder in which attempts are counted


class Leaves(BaseException):
    pass


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no")


LEAVES = {"GeneratorExit": GeneratorExit(), "KeyboardInterrupt": KeyboardInterrupt(), "Leaves": Leaves("for good")}


def fate(text):
    """raises 5 %, hangs 1 %, returns NaN 1 % of the time."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "raised" if number < 5 else "timed_out" if number < 6 else "not_finite" if number < 7 else "fine"


def breaks_sometimes(completion, prompt):
    kind = fate(prompt + completion)
    if kind == "raised":
        raise ValueError(f"no score for {completion!r}")
    if kind == "timed_out":
        time.sleep(300)
    return float("nan") if kind == "not_finite" else len(completion) + completion.count("1") / 4


def raises_sometimes(completion, prompt):
    """The same without hanging."""
    return float("nan") if fate(prompt + completion) == "timed_out" else breaks_sometimes(completion, prompt)


def does_as_told(completion):
    """The completion says what happens."""
    if completion == "print":
        print('{"answer": 99.0, "metrics": {}, "extras": {}}', flush=True)
        os.write(1, b'{"answer": 99.0, "metrics": {}, "extras": {}}\n')
        sys.__stdout__.flush()
        return 1.0
    if completion == "exit":
        os._exit(3)
    if completion == "sys.exit":
        sys.exit(3)
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "loop":
        while True:
            pass
    if completion == "C loop":  # holds the interpreter's lock for ever, and has started a process
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pow(3, 10**10)
    if completion == "memory":
        return float(len(bytearray(3 * 2**30)))
    if completion.startswith("message "):
        raise ValueError("x\n" * int(completion.split()[1]))
    if completion in LEAVES:
        raise LEAVES[completion]
    if completion == "unreadable":
        raise Unreadable
    if completion == "pid":
        return float(os.getpid())
    if completion == "stdin":
        return float(len(sys.stdin.read()))
    return float(completion)


def fails_at_first(completion):
    """Each completion fails as often as it says, then scores how often it was asked."""
    path = os.path.join(STATE, completion.replace("/", "_"))
    with open(path, "a") as file:
        file.write(".")
    asked = os.path.getsize(path)
    if asked <= int(completion.split()[0]):
        raise RuntimeError("not yet")
    return asked


def marks(completion, state):
    """Leaves its process id where the test finds it, so that only a worker at work is killed."""
    with open(os.path.join(state, "pid"), "w") as file:
        file.write(str(os.getpid()))
    return float(completion)


def slow(completion):
    time.sleep(float(completion))
    return 1.0


def logs(completion, log_metric, trainer_state):
    log_metric("length", len(completion))
    return trainer_state.global_step


def batch(completions, prompts, answer, log_extra, **columns):
    log_extra("said", [text.upper() for text in completions])
    return [float(text) for text in completions]


def of_group(group, answer):
    assert group.task.columns["answer"] == answer
    return [float(completion.stop.value == "stop" and not completion.is_truncated) for completion in group.completions]


async def waits(completion):
    import asyncio

    await asyncio.sleep(0)
    return float(completion)


def needs_a_setting(completion, scale=1.0):
    return scale * float(completion)
