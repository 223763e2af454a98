"""Completions as lines of JSON, one completion a line: what `posttrain eval` and `posttrain probe` leave to be read."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
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


def check(path: str | Path) -> None:
    """Raises UserError for a file that `save` could not write. To be asked before the completions are paid for."""
    with _explained(path):
        place = Path(path).expanduser()
        if place.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if not _is_elsewhere(place):
            tempfile.TemporaryFile(dir=place.parent).close()


def save(path: str | Path, written: Iterable[dict[str, Any]]) -> None:
    """The whole file or none of it: until it is written, an older one stays. Raises UserError where that is not possible."""
    with _explained(path):
        place = Path(path).expanduser()
        beside = place if _is_elsewhere(place) else place.with_name(f".{place.name}.tmp")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in written)
            if beside != place:
                beside.replace(place)
        except BaseException:
            if beside != place:
                beside.unlink(missing_ok=True)
            raise


def _is_elsewhere(place: Path) -> bool:
    """A link, a device or a pipe leads to what is written: no new file may take its place."""
    return place.is_symlink() or (place.exists() and not place.is_file())


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give --save a file that can be written") from error
