"""Shared-prefix attention in plain torch: the twin of the fused CPU path, and the way on every other device and under a
sliding window.

The stream is cut into chunks of neighbouring queries. Each chunk attends, under an explicit mask, to the keys that any
of its queries sees: its own segments, and their prompts as far as the window reaches. A mask is (rows of a chunk, their
keys), never (S, S), and exists while its chunk is computed; backward computes every chunk again, so only q, k and v are
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from posttrain.sizes import ATTENTION_ROWS

Segments = Sequence[tuple[int, int, int | None]]  # (start, length, index of the prompt's segment; None: it is a prompt)


class Chunk:
    """Queries [start, end) of the stream and the keys that any of them sees."""

    def __init__(self, segments: Segments, table: torch.Tensor, start: int, end: int, window: int | None) -> None:
        self.start, self.end = start, end
        self.runs = _joined(_seen(segments, start, end, window))  # [low, high) of the stream
        self._table, self._window = table, window

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """(S, ...) -> (K, ...): what stands at the keys. A view where they stand side by side."""
        parts = [x[low:high] for low, high in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def mask(self) -> torch.Tensor:
        """(rows, K): who sees which."""
        owner, _, position = self.seen(self._table).unbind(1)  # (K,) each
        q_owner, q_prompt, q_position = self._table[self.start : self.end, :, None].unbind(1)  # (rows, 1) each
        mask = ((owner == q_owner) & (position <= q_position)) | (owner == q_prompt)
        return mask if self._window is None else mask & (q_position - position < self._window)


def token_table(segments: Segments, device: torch.device) -> torch.Tensor:
    """(S, 3): segment, its prompt's segment (-1: none) and position of each token."""
    places = [
        (index, -1 if prompt is None else prompt, step + (0 if prompt is None else segments[prompt][1]))
        for index, (_, length, prompt) in enumerate(segments)
        for step in range(length)
    ]
    return torch.tensor(places, dtype=torch.int32, device=device).reshape(-1, 3)


def cut(segments: Segments, table: torch.Tensor, window: int | None) -> list[Chunk]:
    """The chunks of a stream under one sliding window (None: no window). `table` is its token table."""
    tokens = table.shape[0]
    return [Chunk(segments, table, start, min(start + ATTENTION_ROWS, tokens), window) for start in range(0, tokens, ATTENTION_ROWS)]


def prefix_attention_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Sequence[Chunk], *, scaling: float) -> torch.Tensor:
    """q (S, H, d), k and v (S, Hkv, d) -> (S, H, d)."""
    out: torch.Tensor = _ByChunks.apply(q, k, v, chunks, scaling)  # type: ignore[no-untyped-call]
    return out


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Sequence[Chunk], scaling: float) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.chunks, ctx.scaling = chunks, scaling
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (S, H, d)
        for chunk in chunks:
            out[chunk.start : chunk.end] = _attend(q[chunk.start : chunk.end], chunk.seen(k), chunk.seen(v), chunk.mask(), scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_q = torch.empty_like(q)
        sums = torch.promote_types(k.dtype, torch.float32)  # a prompt is seen from many chunks
        d_k, d_v = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (k, v))
        for chunk in ctx.chunks:
            rows = slice(chunk.start, chunk.end)
            with torch.enable_grad():
                asked, keys, values = inputs = tuple(x.detach().requires_grad_() for x in (q[rows], chunk.seen(k), chunk.seen(v)))
                out = _attend(asked, keys, values, chunk.mask(), ctx.scaling)
                shares = torch.autograd.grad(out, inputs, grad[rows])
            d_q[rows] = shares[0]
            for total, share in zip((d_k, d_v), shares[1:], strict=True):
                first = 0
                for low, high in chunk.runs:
                    total[low:high] += share[first : first + high - low]
                    first += high - low
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """q (rows, H, d), k and v (K, Hkv, d), mask (rows, K) -> (rows, H, d). The query heads of a kv head stand one below
    the other, so K and V are not repeated."""
    repeats = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (k.shape[1], repeats)).permute(1, 2, 0, 3).flatten(1, 2)  # (Hkv, repeats * rows, d)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (Hkv, K, d)
    out: torch.Tensor = scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask.repeat(repeats, 1), scale=scaling)[0]
    heads: torch.Tensor = out.unflatten(1, (repeats, -1)).permute(2, 0, 1, 3)  # (rows, Hkv, repeats, d)
    return heads.flatten(1, 2)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in order, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(runs):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


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
