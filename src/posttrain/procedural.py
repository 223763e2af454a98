"""The tasks of reasoning-gym by name: "leg_counting?size=500&seed=1". Generated here, nothing is downloaded; the same text is always the same questions.

What both the rows (`data/sources.py`) and the reward (`rewards/library/reasoning_gym.py`) start from. Tasks are functions of their seed, so a row
names its question by a number, and the scorer finds the question again as it was.
"""

from __future__ import annotations

import functools
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from posttrain.errors import UserError, did_you_mean

SCHEME = "reasoning-gym:"
SIZE, SEED = 500, 0


def rows_of(source: str) -> list[dict[str, Any]]:
    """All rows of "reasoning-gym:TASK": `prompt`, `answer` (one right answer; some tasks have none or many), and where the question came from."""
    task = source.removeprefix(SCHEME)
    dataset = open_task(task)
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "reasoning_gym_task": task, "reasoning_gym_index": index}
        for index, entry in ((index, dataset[index]) for index in range(len(dataset)))
    ]


@functools.lru_cache(maxsize=64)
def open_task(task: str) -> Any:
    """The library's dataset. Options are `size`, `seed` and those of the task itself. Raises UserError for what the library does not know."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"reasoning-gym is not installed ({error}): pip install 'posttrain[envs]'") from error
    parts = urlsplit(task)
    if parts.path not in DATASETS:
        some = f"it has {len(DATASETS)}, such as leg_counting, basic_arithmetic, spell_backward"
        raise UserError(f"reasoning-gym has no task '{parts.path}'; {some}.{did_you_mean(parts.path, DATASETS)}")
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
