"""The index tensors of shared-prefix attention, built once per stream and used by every layer.

A `Tile` is a batch of runs of similar length, read from the stream by an index and padded by repeating each run's last
token (so that everything stays finite; the surplus is dropped on the way back). Nothing here is attention: only who
stands where.

S stream tokens, n runs in a tile, L the longest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch

from posttrain.ops.prefix_plain import Chunk, Segments, cut, token_table

Run = tuple[int, int]  # (start in the stream, length)
T = TypeVar("T")

# A run joins a tile when it is shorter than the longest by at most this share, or this many tokens: padding then costs
# less than another kernel call.
SLACK_SHARE = 8
SLACK_TOKENS = 16
# Starting on a segment costs the kernel about as much time as this many scores (measured on a 2.5 GHz Xeon, head size
# 64).
SCORES_PER_TASK = 1000


class Tile:
    """n runs of the stream as a batch (n, L, ...)."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self.n, self.length = len(runs), max(length for _, length in runs)
        self.is_ragged = any(length != self.length for _, length in runs)
        side_by_side = all(start + length == following for (start, length), (following, _) in itertools.pairwise(runs))
        self.start = runs[0][0] if side_by_side and not self.is_ragged else None  # not None: the tile is a view of the stream
        starts = torch.tensor([start for start, _ in runs], device=device)[:, None]
        lengths = torch.tensor([length for _, length in runs], device=device)[:, None]
        steps = torch.arange(self.length, device=device)
        self.valid = steps < lengths  # (n, L)
        self.gather = (starts + torch.minimum(steps, lengths - 1)).flatten()  # (n * L,) places in the stream
        real = [row * self.length + step for row, (_, length) in enumerate(runs) for step in range(length)] if self.is_ragged else None
        self.slots = None if real is None else torch.tensor(real, device=device)  # (m,) entries of `gather` that are not padding
        self.places = self.gather if self.slots is None else self.gather.index_select(0, self.slots)  # (m,) where those stand in the stream

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(S, ...) -> (n, L, ...)"""
        flat = x.index_select(0, self.gather) if self.start is None else x.narrow(0, self.start, self.n * self.length)
        parts: torch.Tensor = flat.unflatten(0, (self.n, self.length))
        return parts

    def real(self, x: torch.Tensor) -> torch.Tensor:
        """(n, L, ...) -> (m, ...): without the padding, in the order of `places`."""
        flat = x.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


class AttentionPart:
    """Queries and the keys they attend to in one kernel call: causally, to all, or to those that `visible` names."""

    def __init__(self, queries: Tile, keys: Tile, *, causal: bool = False, visible: torch.Tensor | None = None) -> None:
        self.queries, self.keys, self.causal = queries, keys, causal
        self.visible = visible  # (n, 1, L or 1, L of the keys), True where attended; None: no mask
        self._masks: dict[torch.dtype, torch.Tensor] = {}

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """`visible` as the kernel wants it: additive, and in the dtype of the queries."""
        if self.visible is None:
            return None
        if dtype not in self._masks:
            self._masks[dtype] = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill(~self.visible, float("-inf"))
        return self._masks[dtype]


class PrefixPlan:
    """What `prefix_attention` needs to know about a stream."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self.segments = list(segments)
        self.device = device
        # The most tokens that a query could see, itself included: a sliding window of at least this changes nothing.
        self.longest = max((length + (0 if prompt is None else self.segments[prompt][1]) for _, length, prompt in self.segments), default=0)
        self._chunks: dict[int | None, list[Chunk]] = {}

    def is_cut_by(self, window: int | None) -> bool:
        """Whether some query would see further than `window` lets it."""
        return window is not None and window < self.longest

    def chunks(self, window: int | None) -> list[Chunk]:
        """For the plain path: queries in stream order under explicit masks; made once per window."""
        window = window if self.is_cut_by(window) else None
        if window not in self._chunks:
            self._chunks[window] = cut(self.segments, self.table, window)
        return self._chunks[window]

    @cached_property
    def table(self) -> torch.Tensor:
        """(S, 3): segment, its prompt's segment (-1: none) and position of each token."""
        return token_table(self.segments, self.device)

    @cached_property
    def own(self) -> list[AttentionPart]:
        """For the fused path: parts that reach every query once. Small groups attend as a whole, others segment by
        segment."""
        whole = [group.run for group in self._groups if group.is_small]
        runs = [run for group in self._groups if not group.is_small for run in group.segments]
        parts = [self._masked(Tile(some, self.device)) for some in _alike(whole, lambda run: (run[1],))]
        for some in _alike(runs, lambda run: (run[1],)):
            tile = Tile(some, self.device)
            parts.append(AttentionPart(tile, tile, causal=True))
        return parts

    @cached_property
    def bridges(self) -> list[AttentionPart]:
        """For the fused path: the completions of large groups (side by side, so one run a prompt) looking back at their
        prompts."""
        groups = [group for group in self._groups if not group.is_small and group.completions[1]]
        parts = []
        for some in _alike(groups, lambda group: (group.prompt[1], group.completions[1])):
            queries, keys = (Tile(runs, self.device) for runs in ([group.completions for group in some], [group.prompt for group in some]))
            parts.append(AttentionPart(queries, keys, visible=keys.valid[:, None, None, :] if keys.is_ragged else None))
        return parts

    @cached_property
    def _groups(self) -> list[_Group]:
        found: dict[int, _Group] = {}
        for index, (start, length, prompt) in enumerate(self.segments):
            if prompt is None:
                found[index] = _Group([(start, length)])
            elif length:
                group = found[prompt]
                assert sum(group.run) == start, "a prompt and its completions must stand side by side"
                group.segments.append((start, length))
        return [group.joined() for group in found.values()]

    def _masked(self, tile: Tile) -> AttentionPart:
        segment, prompt, position = (tile.take(column) for column in self.table.unbind(1))  # (n, L) each
        same = segment[:, :, None] == segment[:, None, :]  # (n, queries, keys), as below
        visible = (same & (position[:, :, None] >= position[:, None, :])) | (prompt[:, :, None] == segment[:, None, :])
        return AttentionPart(tile, tile, visible=(visible & tile.valid[:, None, :])[:, None])


class _Group:
    """A prompt and its completions that are not empty, side by side in the stream."""

    def __init__(self, segments: list[Run]) -> None:
        self.segments = segments

    def joined(self) -> _Group:
        """A prompt with a single completion is one causal run."""
        return _Group([self.run]) if len(self.segments) == 2 else self

    @property
    def prompt(self) -> Run:
        return self.segments[0]

    @property
    def run(self) -> Run:
        return self.prompt[0], sum(length for _, length in self.segments)

    @property
    def completions(self) -> Run:
        return sum(self.prompt), self.run[1] - self.prompt[1]

    @property
    def is_small(self) -> bool:
        """Whether wasting the scores between siblings is cheaper than a kernel task for each segment."""
        return self.run[1] ** 2 <= SCORES_PER_TASK * len(self.segments)


def _alike(runs: Sequence[T], sizes: Callable[[T], tuple[int, ...]]) -> list[list[T]]:
    """Greedy groups of runs, each of whose sizes is within the slack of the group's largest."""
    groups: list[list[T]] = []
    most: list[int] = []  # the largest sizes in the open group
    least: list[int] = []
    for run in sorted(runs, key=sizes, reverse=True):  # a stable sort: runs of one length keep their order in the stream
        size = sizes(run)
        most_with = [max(a, b) for a, b in zip(most, size, strict=False)] if groups else []
        least_with = [min(a, b) for a, b in zip(least, size, strict=False)] if groups else []
        if groups and all(high - low <= max(SLACK_TOKENS, high // SLACK_SHARE) for high, low in zip(most_with, least_with, strict=True)):
            groups[-1].append(run)
            most, least = most_with, least_with
        else:
            groups.append([run])
            most, least = list(size), list(size)
    return groups
