"""Completions as lines of JSON, one completion a line: what `posttrain eval` and `posttrain probe` leave to be read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.rubric import Rubric
from posttrain.types import Group


def lines(groups: Iterable[Group], rubric: Rubric, **about: Any) -> list[dict[str, Any]]:
    """One mapping a completion, with `about` in front (which model, greedy or sampled)."""
    return [
        {
            **about,
            "task": group.task.id,
            "sample": number,
            "prompt": group.task.prompt,
            **({"columns": group.task.columns} if number == 0 else {}),
            "completion": rollout.text,
            **({} if rollout.messages is None else {"messages": rollout.messages}),
            "right": rubric.is_right(rollout),
            "reward": rollout.reward,
            "scores": rollout.scores,
            "truncated": rollout.is_truncated,
            "tokens": len(rollout.token_ids),
        }
        for group in groups
        for number, rollout in enumerate(group.rollouts)
    ]


def save(path: str | Path, written: Iterable[dict[str, Any]]) -> None:
    """Raises UserError for a file that cannot be written."""
    try:
        with Path(path).expanduser().open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in written)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
