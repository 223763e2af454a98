"""Shared-prefix attention in plain torch: the twin of the fused CPU path, and the way on every other device and under a sliding window.

The stream is cut into chunks of neighbouring queries. Each chunk attends, under an explicit mask, to the keys that any of its queries sees:
its own segments, and their prompts as far as the window reaches. A mask is (rows of a chunk, their keys), never (S, S).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

Segments = Sequence[tuple[int, int, int | None]]  # (start, length, index of the prompt's segment; None: it is a prompt)

CHUNK_ROWS = 256


class Chunk:
    """Queries [start, end) of the stream, the keys that any of them sees, and who sees which."""

    def __init__(self, segments: Segments, table: torch.Tensor, start: int, end: int, window: int | None) -> None:
        self.start, self.end = start, end
        self.keys = torch.cat([torch.arange(low, high, device=table.device) for low, high in _seen(segments, start, end, window)])  # (K,)
        owner, _, position = table.index_select(0, self.keys).unbind(1)  # (K,) each
        q_owner, q_prompt, q_position = table[start:end, :, None].unbind(1)  # (rows, 1) each
        self.mask = ((owner == q_owner) & (position <= q_position)) | (owner == q_prompt)  # (rows, K)
        if window is not None:
            self.mask &= q_position - position < window


def token_table(segments: Segments, device: torch.device) -> torch.Tensor:
    """(S, 3): segment, its prompt's segment (-1: none) and position of each token."""
    places = [
        (index, -1 if prompt is None else prompt, step + (0 if prompt is None else segments[prompt][1]))
        for index, (_, length, prompt) in enumerate(segments)
        for step in range(length)
    ]
    return torch.tensor(places, device=device).reshape(-1, 3)


def cut(segments: Segments, table: torch.Tensor, window: int | None) -> list[Chunk]:
    """The chunks of a stream under one sliding window (None: no window). `table` is its token table."""
    tokens = table.shape[0]
    return [Chunk(segments, table, start, min(start + CHUNK_ROWS, tokens), window) for start in range(0, tokens, CHUNK_ROWS)]


def prefix_attention_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Sequence[Chunk], *, scaling: float) -> torch.Tensor:
    """q (S, H, d), k and v (S, Hkv, d) -> (S, H, d). The query heads of a kv head stand one below the other, so K and V are not repeated."""
    repeats = q.shape[1] // k.shape[1]
    outs = []
    for chunk in chunks:
        queries = q[chunk.start : chunk.end].unflatten(1, (k.shape[1], repeats)).permute(1, 2, 0, 3).flatten(1, 2)  # (Hkv, repeats * rows, d)
        keys, values = (x.index_select(0, chunk.keys).transpose(0, 1) for x in (k, v))  # (Hkv, K, d)
        mask = chunk.mask.repeat(repeats, 1)  # (repeats * rows, K)
        out = scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=scaling)[0]
        outs.append(out.unflatten(1, (repeats, -1)).permute(2, 0, 1, 3).flatten(1, 2))  # (rows, H, d)
    return torch.cat(outs)


def _seen(segments: Segments, start: int, end: int, window: int | None) -> list[tuple[int, int]]:
    """Runs [low, high) of the stream, apart from each other, that hold every key which queries [start, end) see."""
    seen: dict[int, tuple[int, int]] = {}

    def add(index: int, low: int, high: int) -> None:
        if low < high:
            known_low, known_high = seen.get(index, (low, high))
            seen[index] = (min(low, known_low), max(high, known_high))

    for index, (first, length, prompt) in enumerate(segments):
        low, high = max(first, start), min(first + length, end)
        if low >= high:
            continue
        back = high if window is None else window - 1  # how many tokens the first of these queries looks back
        add(index, max(first, low - back), high)
        if prompt is not None:
            prompt_start, prompt_length, _ = segments[prompt]
            position = prompt_length + low - first
            add(prompt, prompt_start + max(0, position - back), prompt_start + prompt_length)
    return [seen[index] for index in sorted(seen)]
