"""Groups -> a Stream: prompts and completions side by side, without padding, each prompt once. The only place that
makes tensors of tokens.

S stream tokens, N trained targets, B rows (one a completion), T columns (the longest completion). A completion's
positions go on from its prompt's, so a row reads the same as it would alone. Who may attend to whom is not decided
here: `segments` say it, `ops.prefix_attention` does it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from posttrain.errors import UserError


class Segment(NamedTuple):
    """A run of the stream that attends causally to itself and, if it is a completion, in full to its prompt."""

    start: int
    length: int
    prompt: int | None  # index of the prompt's segment; None: this is a prompt


@dataclass(frozen=True)
class PackItem:
    """One prompt with its completions. Completions may be empty and untrained; a prompt may not be empty."""

    prompt_ids: Sequence[int]  # [P]
    completions: Sequence[Sequence[int]]  # [G][R] token ids
    trained: Sequence[Sequence[bool]] | None = None  # [G][R] True: this token is a target. None: every token is
    row_ids: Sequence[int] | None = None  # [G] the caller's number of each row. None: numbered in packing order

    def __len__(self) -> int:
        """Tokens in the stream."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


class Stream:
    """One micro-batch as the model sees it. `scatter` brings per-target values back to (B, T)."""

    def __init__(
        self,
        *,
        input_ids: torch.Tensor,  # (S,)
        position_ids: torch.Tensor,  # (S,)
        segments: list[Segment],  # completions appear in the order of the rows
        logit_index: torch.Tensor,  # (N,) stream position whose hidden state predicts targets[n]
        targets: torch.Tensor,  # (N,)
        rows: torch.Tensor,  # (N,)
        cols: torch.Tensor,  # (N,) place of the target within its completion
        shape: tuple[int, int],  # (B, T)
        row_ids: torch.Tensor,  # (B,) the caller's numbers: `advantages[stream.row_ids]` lines up with the rows
    ) -> None:
        self.input_ids, self.position_ids, self.segments = input_ids, position_ids, segments
        self.logit_index, self.targets, self.rows, self.cols = logit_index, targets, rows, cols
        self.shape, self.row_ids = shape, row_ids

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def last_index(self) -> torch.Tensor:
        """(B,) stream position of each row's last token: its prompt's last where the completion is empty."""
        ends = []
        for segment in self.segments:
            if segment.prompt is not None:
                end = segment if segment.length else self.segments[segment.prompt]
                ends.append(end.start + end.length - 1)
        return torch.tensor(ends, dtype=torch.long, device=self.device)

    def scatter(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(N,) values of the targets -> (B, T), `fill` elsewhere. Differentiable."""
        return values.new_full(self.shape, fill).index_put((self.rows, self.cols), values)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (N,) values of the targets: what `scatter` put there."""
        return values[self.rows, self.cols]

    def to(self, device: torch.device | str) -> Stream:
        names = ("input_ids", "position_ids", "logit_index", "targets", "rows", "cols", "row_ids")
        moved = {name: getattr(self, name).to(device) for name in names}
        return Stream(segments=self.segments, shape=self.shape, **moved)


def pack(items: Sequence[PackItem]) -> Stream:
    """`[prompt, completion_1 .. completion_G, prompt, ...]`. Raises UserError on an empty prompt: nothing would predict
    the first token."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    target_of: list[tuple[int, int, int, int]] = []  # (logit position, target, row, col)
    row_ids: list[int] = []

    def append(tokens: Sequence[int], first_position: int, prompt: int | None) -> int:
        segments.append(Segment(len(ids), len(tokens), prompt))
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        return segments[-1].start

    for item in items:
        _check(item)
        numbers = range(len(row_ids), len(row_ids) + len(item.completions)) if item.row_ids is None else item.row_ids
        prompt = len(segments)
        last_of_prompt = append(item.prompt_ids, 0, None) + len(item.prompt_ids) - 1
        for completion, trained, number in zip(item.completions, _masks(item), numbers, strict=True):
            start = append(completion, len(item.prompt_ids), prompt)
            for col, (token, is_target) in enumerate(zip(completion, trained, strict=True)):
                if is_target:
                    target_of.append((start + col - 1 if col else last_of_prompt, token, len(row_ids), col))
            row_ids.append(number)

    longest = max((segment.length for segment in segments if segment.prompt is not None), default=0)
    columns = torch.tensor(target_of, dtype=torch.long).reshape(-1, 4).unbind(1)
    logit_index, targets, rows, cols = (column.contiguous() for column in columns)
    return Stream(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        segments=segments,
        logit_index=logit_index,
        targets=targets,
        rows=rows,
        cols=cols,
        shape=(len(row_ids), longest),
        row_ids=torch.tensor(row_ids, dtype=torch.long),
    )


def split(items: Sequence[PackItem], max_tokens: int, *, whole: bool = False) -> list[list[PackItem]]:
    """Micro-batches of at most `max_tokens` stream tokens each, in order, every item carrying its `row_ids`.

    A group over the budget is split by completions into even parts, its prompt repeated in each. One completion over
    the budget is a part of its own. `whole`: groups are never split, since their completions meet in the loss; one over
    the budget is a part of its own.
    """
    parts: list[list[PackItem]] = []
    room = 0
    for item in _numbered(items):
        for piece in [item] if whole else _pieces(item, max_tokens):
            if not parts or len(piece) > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(piece)
            room -= len(piece)
    return parts


def _numbered(items: Sequence[PackItem]) -> Iterator[PackItem]:
    row = 0
    for item in items:
        yield item if item.row_ids is not None else replace(item, row_ids=range(row, row + len(item.completions)))
        row += len(item.completions)


def _pieces(item: PackItem, max_tokens: int) -> Iterator[PackItem]:
    """`item` in as few parts as the budget allows, at least one completion each, the largest part as small as that
    number of parts permits."""
    lengths = [len(completion) for completion in item.completions]
    room = max_tokens - len(item.prompt_ids)
    fewest, longest = len(_cuts(lengths, room)), max(lengths, default=0)
    rooms = range(longest, room)  # smaller ones that may do with as many parts
    even = longest + bisect.bisect_left(rooms, True, key=lambda smaller: len(_cuts(lengths, smaller)) <= fewest) if rooms else room
    assert item.row_ids is not None
    for first, last in _cuts(lengths, even):
        trained = None if item.trained is None else item.trained[first:last]
        yield PackItem(item.prompt_ids, item.completions[first:last], trained, item.row_ids[first:last])


def _cuts(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Runs [first, last) of completions, each filled until the next one would exceed `room` tokens."""
    cuts: list[tuple[int, int]] = []
    first = tokens = 0
    for index, length in enumerate(lengths):
        if index > first and tokens + length > room:
            cuts.append((first, index))
            first, tokens = index, 0
        tokens += length
    return [*cuts, (first, len(lengths))] if lengths else []


def _masks(item: PackItem) -> Sequence[Sequence[bool]]:
    return [[True] * len(completion) for completion in item.completions] if item.trained is None else item.trained


def _check(item: PackItem) -> None:
    if not len(item.prompt_ids):
        raise UserError(
            "a prompt has no tokens, so nothing predicts the first token of its completion; start the prompt with a BOS token or some text"
        )
    lengths = [len(completion) for completion in item.completions]
    masks = [len(mask) for mask in _masks(item)]
    if masks != lengths:
        raise UserError(f"trained masks must be as long as their completions: masks have {masks} entries, completions {lengths} tokens")
