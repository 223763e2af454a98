"""A stream unrolled: one right-padded row per completion, its prompt repeated, in chunks of bounded size. Only index
work, no model.

B rows (one a completion), L the longest row of a chunk, n targets of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from posttrain.data.stream import Stream

# Tokens, padding included, that one chunk may hold.
MAX_TOKENS = 8192


class Rows(NamedTuple):
    input_ids: torch.Tensor  # (rows, L) token 0 behind each row's end
    attention_mask: torch.Tensor  # (rows, L) made from lengths, never from token ids: a padding id may be a real token
    predicted_by: torch.Tensor  # (n,) places in the flattened (rows, L) whose hidden states predict the chosen targets
    chosen: torch.Tensor  # (n,) which of the stream's targets
    last: torch.Tensor  # (rows,) places in the flattened (rows, L) of each row's last token


def unroll(stream: Stream) -> Iterator[Rows]:
    """Chunks of at most MAX_TOKENS tokens, or of one row where that alone is longer."""
    device = stream.device
    pairs = [(stream.segments[segment.prompt], segment) for segment in stream.segments if segment.prompt is not None]
    lengths = torch.tensor([prompt.length + completion.length for prompt, completion in pairs], device=device)  # (B,)
    prompt_lengths = torch.tensor([prompt.length for prompt, _ in pairs], device=device)  # (B,)
    rows_per_chunk = max(1, MAX_TOKENS // int(lengths.max()))
    for first in range(0, len(pairs), rows_per_chunk):
        chunk = pairs[first : first + rows_per_chunk]
        width = int(lengths[first : first + len(chunk)].max())
        input_ids = torch.zeros(len(chunk), width, dtype=torch.long, device=device)
        for row, (prompt, completion) in zip(input_ids, chunk, strict=True):
            row[: prompt.length] = stream.input_ids[prompt.start : prompt.start + prompt.length]
            row[prompt.length : prompt.length + completion.length] = stream.input_ids[completion.start : completion.start + completion.length]
        attention_mask = torch.arange(width, device=device) < lengths[first : first + len(chunk), None]
        chosen = ((stream.rows >= first) & (stream.rows < first + len(chunk))).nonzero()[:, 0]
        rows, cols = stream.rows[chosen], stream.cols[chosen]
        last = torch.arange(len(chunk), device=device) * width + lengths[first : first + len(chunk)] - 1
        yield Rows(input_ids, attention_mask.long(), (rows - first) * width + prompt_lengths[rows] + cols - 1, chosen, last)
