"""The tasks of reasoning-gym by name, such as "leg_counting?size=500&seed=1". Rows are generated here; the same name
gives the same rows.

Both the rows (`data/sources.py`) and the reward (`rewards/library/reasoning_gym.py`) start from it. Tasks are functions
of their seed: a row holds its question's number, by which the scorer makes the same question again. Five tasks
(word_ladder is one) also depend on the hashes of strings, which Python randomises in each process; so rows are made and
scored where PYTHONHASHSEED is 0, unless the user has set it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from posttrain.errors import UserError, did_you_mean
from posttrain.processes import guard, release

SCHEME = "reasoning-gym:"
SIZE, SEED = 500, 0


def rows_of(source: str) -> list[dict[str, Any]]:
    """All rows of "reasoning-gym:TASK": `prompt`, `answer` (one right answer; some tasks have none or many), and where
    the question came from."""
    task = source.removeprefix(SCHEME)
    if os.environ.get("PYTHONHASHSEED", "random") != "random":
        return _made(task)
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "posttrain.reasoning_gym_tasks", task]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        guard(process.pid)
        try:
            said, _ = process.communicate()
        finally:
            process.kill()
            process.wait()
            release(process.pid)
    if process.returncode:
        raise RuntimeError(f"the process that makes the rows of {source} ended with code {process.returncode}")
    told = json.loads(said)
    if isinstance(told, str):
        raise UserError(told)
    return list(told)


def _made(task: str) -> list[dict[str, Any]]:
    dataset = open_task(task)
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "reasoning_gym_task": task, "reasoning_gym_index": index}
        for index, entry in ((index, dataset[index]) for index in range(len(dataset)))
    ]


def library() -> Any:
    """Importing it takes seconds."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"reasoning-gym is not installed ({error}): pip install 'posttrain[envs]'") from error
    return reasoning_gym


@functools.lru_cache(maxsize=64)
def open_task(task: str) -> Any:
    """The library's dataset. Options are `size`, `seed` and those of the task itself. Raises UserError for unknown
    tasks and options."""
    reasoning_gym = library()
    known = reasoning_gym.factory.DATASETS
    parts = urlsplit(task)
    if parts.path not in known:
        some = f"it has {len(known)}, such as leg_counting, basic_arithmetic, spell_backward"
        raise UserError(f"reasoning-gym has no task '{parts.path}'; {some}.{did_you_mean(parts.path, known)}")
    if parts.path == "composite":  # it scores with other tasks' scorers, which the guards would not recognise
        raise UserError(
            "the reasoning-gym task 'composite' is a mixture of tasks; give data.train a list of them: [reasoning-gym:gcd, reasoning-gym:lcm]"
        )
    settings = {"size": SIZE, "seed": SEED} | {name: _value(text) for name, text in parse_qsl(parts.query, keep_blank_values=True)}
    for name in ("size", "seed"):
        if not isinstance(settings[name], int):
            raise UserError(f"reasoning-gym refuses {task}: {name} is a whole number, not {settings[name]!r}")
    try:
        return reasoning_gym.create_dataset(parts.path, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym refuses {task}: {error}") from error


@functools.lru_cache(maxsize=4096)
def question(task: str, index: int) -> dict[str, Any]:
    """The library's entry: question, answer, metadata."""
    return open_task(task)[index]


def _value(text: str) -> Any:
    """Numbers, true, false and lists as JSON writes them; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be read as rows
    try:
        json.dump(_made(sys.argv[1]), answers)
    except UserError as error:
        json.dump(str(error), answers)
    answers.close()
