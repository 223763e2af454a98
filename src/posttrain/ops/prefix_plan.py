"""The index tensors of shared-prefix attention, built once per stream and used by every layer.

A `Tile` is a batch of runs of similar length, read from the stream by an index and padded by repeating each run's last token (so that
everything stays finite; the surplus is dropped on the way back). Nothing here is attention: only who stands where.

S stream tokens, n runs in a tile, L the longest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch

from posttrain.ops.prefix_plain import Chunk, Segments, cut

Run = tuple[int, int]  # (start in the stream, length)
T = TypeVar("T")

# A run joins a tile when it is shorter than the longest by at most this share, or this many tokens: padding then costs less than another kernel call.
SLACK_SHARE = 8
SLACK_TOKENS = 16


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
        return flat.unflatten(0, (self.n, self.length))

    def real(self, x: torch.Tensor) -> torch.Tensor:
        """(n, L, ...) -> (m, ...): without the padding, in the order of `places`."""
        flat = x.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


class Bridge(NamedTuple):
    """The completions of n prompts (they stand side by side, so one run a prompt) looking back at those prompts."""

    queries: Tile
    keys: Tile


class PrefixPlan:
    """What `prefix_attention` needs to know about a stream."""

    def __init__(self, segments: Iterable[tuple[int, int, int | None]], device: torch.device) -> None:
        self.segments: Segments = list(segments)
        self.device = device
        # The most tokens that a query could see, itself included: a sliding window of at least this changes nothing.
        self.longest = max((length + (0 if prompt is None else self.segments[prompt][1]) for _, length, prompt in self.segments), default=0)
        self._chunks: dict[int | None, list[Chunk]] = {}

    def is_cut_by(self, window: int | None) -> bool:
        """Whether some query would see further than `window` lets it."""
        return window is not None and window < self.longest

    @cached_property
    def own(self) -> list[Tile]:
        runs = [(start, length) for start, length, _ in self.segments if length]
        return [Tile(group, self.device) for group in _alike(runs, lambda run: (run[1],))]

    @cached_property
    def bridges(self) -> list[Bridge]:
        pairs = _completions_of_prompts(self.segments)
        groups = _alike(pairs, lambda pair: (pair[0][1], pair[1][1]))
        return [Bridge(Tile([queries for queries, _ in group], self.device), Tile([prompt for _, prompt in group], self.device)) for group in groups]

    def chunks(self, window: int | None) -> list[Chunk]:
        """For the plain path: queries in stream order under explicit masks; made once per window."""
        window = window if self.is_cut_by(window) else None
        if window not in self._chunks:
            self._chunks[window] = cut(self.segments, window, self.device)
        return self._chunks[window]


def _completions_of_prompts(segments: Segments) -> list[tuple[Run, Run]]:
    """(all completions of a prompt as one run, the prompt), for each prompt that has a token of completion."""
    spans: dict[int, Run] = {}
    for start, length, prompt in segments:
        if prompt is not None and length:
            first, total = spans.get(prompt, (start, 0))
            assert first + total == start, "completions of a prompt must stand side by side"
            spans[prompt] = (first, total + length)
    return [(span, segments[prompt][:2]) for prompt, span in spans.items()]


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
