"""Completions as lines of JSON, one completion a line: what `posttrain eval` and `posttrain probe` leave to be read."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from posttrain.characters import encodable
from posttrain.errors import UserError
from posttrain.io import write_whole
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
            "completion": completion.text,
            **({} if completion.messages is None else {"messages": completion.messages}),
            "right": rubric.is_right(completion),
            "reward": completion.reward,
            "scores": completion.scores,
            "truncated": completion.is_truncated,
            "tokens": len(completion.token_ids),
        }
        for group in groups
        for number, completion in enumerate(group.completions)
    ]


def check(path: str | Path) -> None:
    """Raises UserError for a file that `save` could not write. To be asked before the completions are paid for."""
    with _explained(path):
        place = Path(path).expanduser().resolve()
        if place.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if place.is_file() or not place.exists():
            tempfile.TemporaryFile(dir=place.parent).close()


def save(path: str | Path, written: Iterable[dict[str, Any]]) -> None:
    """The whole file or none of it: until it is written, an older one stays. Raises UserError where that is not
    possible."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in written)
    with _explained(path):
        write_whole(Path(path).expanduser(), encodable(text))


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give --save a file that can be written") from error
