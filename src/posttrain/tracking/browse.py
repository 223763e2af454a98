"""Finding groups in a long run: the nearest step that has some, the next one of a kind, a word in a completion.

Every search goes step by step through an index and stops when its time is up; where it stopped is part of the answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from posttrain.tracking.blobs import unpack_halves
from posttrain.tracking.reader import RunReader
from posttrain.tracking.typed import blob, optional, real, whole

BUDGET = 1.5  # seconds that one search may take
CHUNK = 16  # steps that are read at once


@dataclass(frozen=True)
class Marks:
    """What is worth knowing about a group before it is opened."""

    group: int
    truncated: int  # completions that were cut
    unscored: int  # completions that have no reward
    has_signal: bool  # any two rewards differ
    same_text: bool  # all completions say the same

    @property
    def is_alarming(self) -> bool:
        """A reward that broke or was silent, or that gives the same text different scores."""
        return self.unscored > 0 or (self.same_text and self.has_signal)


@dataclass(frozen=True)
class Trust:
    """The region in which a token's ratio pushes: outside of it a token is clipped."""

    low: float
    high: float

    def is_clipped(self, ratio: float, advantage: float) -> bool:
        return (ratio < self.low and advantage < 0) or (ratio > self.high and advantage > 0)


@dataclass(frozen=True)
class Wanted:
    """What a group must be, all of it."""

    kinds: frozenset[str] = frozenset()  # names of FILTERS, or CLIPPED
    words: str = ""  # in the prompt or a completion, in whatever case
    trust: Trust = Trust(0.8, 1.2)  # what CLIPPED means


@dataclass(frozen=True)
class Found:
    """Where a search ended: a place, or none in all that was read."""

    step: int | None  # None: nothing was found
    group: int | None
    read_to: int  # the last step that was read
    is_complete: bool  # False: time was up before the end of the run


# A filter's name -> what holds for the completions of a group that it keeps.
FILTERS = {
    "truncated": "sum(r.stop = 'length') > 0",
    "no signal": "count(*) > 1 AND coalesce(max(r.reward) = min(r.reward), 1)",
    "reward alarm": "(sum(r.reward IS NULL) > 0 OR (count(*) > 1 AND count(DISTINCT r.text) = 1 AND max(r.reward) != min(r.reward)))",
}
CLIPPED = "clipped"
_WORDS = "max(instr(lower(r.text), lower(:words)) > 0 OR instr(lower(g.prompt), lower(:words)) > 0)"
_MATCHING = """
SELECT r.step, r.grp FROM rollouts r JOIN groups g ON g.step = r.step AND g.grp = r.grp
WHERE r.step BETWEEN :first AND :last GROUP BY r.step, r.grp {having} ORDER BY r.step {order}, r.grp
"""
_MARKS = """
SELECT grp, sum(stop = 'length'), sum(reward IS NULL), coalesce(max(reward) != min(reward), 0), count(*) > 1 AND count(DISTINCT text) = 1
FROM rollouts WHERE step = ? GROUP BY grp ORDER BY grp
"""
_RATIOS = """
SELECT d.ratio, {own}, r.advantage FROM token_details d JOIN rollouts r ON r.step = d.step AND r.grp = d.grp AND r.idx = d.idx
WHERE d.step = ? AND d.grp = ? AND d.ratio IS NOT NULL
"""


class Browser(RunReader):
    """A reader that also searches."""

    def first_and_last(self) -> tuple[int, int] | None:
        """The first and the last step with groups; None: the run has none, since it learns from completions that are
        given."""
        first, last = (self.row(f"SELECT step FROM groups ORDER BY step {order} LIMIT 1", kinds=(whole,)) for order in ("ASC", "DESC"))
        return None if first is None or last is None else (first[0], last[0])

    def nearest(self, step: int) -> int | None:
        """The step with groups that is nearest to `step`."""
        around = [self.neighbour(step + 1, -1), self.neighbour(step - 1, 1)]
        return min((found for found in around if found is not None), key=lambda found: abs(found - step), default=None)

    def neighbour(self, step: int, direction: int) -> int | None:
        """The next step with groups, later for direction 1 and earlier for -1."""
        order, sign = ("ASC", ">") if direction > 0 else ("DESC", "<")
        row = self.row(f"SELECT step FROM groups WHERE step {sign} ? ORDER BY step {order} LIMIT 1", (step,), kinds=(whole,))
        return None if row is None else int(row[0])

    def marks(self, step: int) -> list[Marks]:
        return [Marks(row[0], row[1], row[2], bool(row[3]), bool(row[4])) for row in self.rows(_MARKS, (step,), kinds=(whole,) * 5)]

    def matching(self, wanted: Wanted, first: int, last: int, direction: int = 1, limit: int | None = None) -> list[tuple[int, int]]:
        """(step, group) of the groups from step `first` to `last` that are as wanted, in the order of the direction; at
        most `limit`."""
        conditions = [FILTERS[kind] for kind in sorted(wanted.kinds - {CLIPPED})] + ([_WORDS] if wanted.words else [])
        having = f"HAVING {' AND '.join(conditions)}" if conditions else ""
        query = _MATCHING.format(having=having, order="ASC" if direction > 0 else "DESC")
        found = []
        for step, group in self.rows(query, {"first": first, "last": last, "words": wanted.words}, kinds=(whole, whole)):
            if CLIPPED not in wanted.kinds or self._is_clipped(step, group, wanted.trust):
                found.append((step, group))
                if len(found) == limit:
                    break
        return found

    def search(self, wanted: Wanted, start: int, direction: int, budget: float = BUDGET) -> Found:
        """The first group as wanted in the steps after `start` (before it for direction -1)."""
        ends = self.first_and_last()
        if ends is None:
            return Found(None, None, start, True)
        first, last = ends
        until = time.monotonic() + budget
        at = max(start + 1, first) if direction > 0 else min(start - 1, last)
        while first <= at <= last:
            far = min(at + CHUNK - 1, last) if direction > 0 else max(at - CHUNK + 1, first)
            found = self.matching(wanted, min(at, far), max(at, far), direction, limit=1)
            if found:
                return Found(*found[0], found[0][0], True)
            at = far + direction
            if time.monotonic() > until:
                return Found(None, None, far, not first <= at <= last)
        return Found(None, None, last if direction > 0 else first, True)

    def _is_clipped(self, step: int, group: int, trust: Trust) -> bool:
        own = "d.advantage" if self._version >= 3 else "NULL"
        for packed, advantages, advantage in self.rows(_RATIOS.format(own=own), (step, group), kinds=(blob, optional(blob), real)):
            ratios = unpack_halves(packed, offset=1.0) or []
            if any(map(trust.is_clipped, ratios, unpack_halves(advantages) or [advantage] * len(ratios))):
                return True
        return False
