"""Several sources as one: each with a weight, and columns renamed where they are called differently.

A weight of 0.5 takes half of the rows, one of 2 takes each twice. The choice is drawn once from the seed, so a mixture
is as fixed as a file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from posttrain.data.sources import Rows, RowStream, load_rows, stream_rows
from posttrain.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    path: str  # as in `load_rows`
    weight: float = 1.0  # times that its rows are taken; in a stream, its share of the draws
    rename: Mapping[str, str] = field(default_factory=dict)  # {its column: the column's name in the mixture}

    @classmethod
    def read(cls, given: Any) -> Source:
        """From a path, or a mapping with the fields above. Raises UserError for anything else."""
        if isinstance(given, str):
            return cls(given)
        known = [f.name for f in fields(cls)]
        if not isinstance(given, Mapping) or "path" not in given:
            raise UserError(
                f"a source of a mixture is a path, or {{path: rows.jsonl, weight: 0.5, rename: {{problem: question}}}}; not {given!r}"[:300]
            )
        for name in given:
            if name not in known:
                raise UserError(f"a source of a mixture has {', '.join(known)}, not {name}.{did_you_mean(str(name), known)}")
        source = cls(**given)
        if isinstance(source.weight, bool) or not isinstance(source.weight, int | float) or not source.weight > 0:
            raise UserError(f"the weight of {source.path} is {source.weight!r}; a weight is a number above 0")
        return source

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in self.rename if name not in row]
        if missing:
            raise UserError(f"{self.path} has no column '{missing[0]}' to rename; it has: {', '.join(row)}.{did_you_mean(missing[0], row)}")
        return {self.rename.get(name, name): value for name, value in row.items()}


def load_data(given: str | Sequence[Any], *, streaming: bool = False, seed: int = 0) -> Any:
    """The rows of one source, or of a list of them (a mixture). With `streaming` a RowStream. Raises UserError as
    `load_rows` and `Source` do."""
    if isinstance(given, str):
        return stream_rows(given) if streaming else load_rows(given)
    sources = [Source.read(one) for one in given]
    if not sources:
        raise UserError("the mixture has no sources; list at least one path")
    if streaming:
        return RowStream(lambda: _interleaved(sources, random.Random(seed)))
    return [row for place, source in enumerate(sources) for row in _taken(source, random.Random(f"{seed}/{place}"))]


def _taken(source: Source, draw: random.Random) -> Rows:
    rows = [source.renamed(row) for row in load_rows(source.path)]
    times, rest = divmod(source.weight, 1)
    chosen = sorted(draw.sample(range(len(rows)), round(rest * len(rows))))
    whole = [_again(row, number) for number in range(int(times)) for row in rows]
    return whole + [_again(rows[place], int(times)) for place in chosen]


def _again(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row for the `number`-th time, from 0. Rows have ids of their own, so those of repetitions are marked."""
    return {**row, "id": f"{row['id']}#{number + 1}"} if number and "id" in row else dict(row)


def _interleaved(sources: Sequence[Source], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Every row once; at each draw a source that has rows left comes with the probability of its weight."""
    left = [(source, iter(stream_rows(source.path))) for source in sources]
    while left:
        place = draw.choices(range(len(left)), weights=[source.weight for source, _ in left])[0]
        source, rows = left[place]
        row = next(rows, None)
        if row is None:
            left.pop(place)
        else:
            yield source.renamed(row)
