"""Who attends to whom while sampling: a layout for prefilling prompts, and one for decoding a token of every active
row.

A rows, n prompts, R rows of the prompt that has most, S stream tokens, P prompt tokens, T tokens after it. H query
heads, Hkv key heads, rep = H / Hkv. Query heads are folded onto their key head, so no key or value is ever repeated;
masks and indices are made once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from posttrain.rollout.local.cache import Cache
from posttrain.sizes import DECODE_SCORES

_HIDDEN = -1e30  # finite: a query that sees none of a prompt then weighs it with exp(-1e30) = 0, not with NaN; within float32's and bfloat16's range


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, mask: torch.Tensor | None = None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, S, d), k and v (B, Hkv, T, d), additive mask (B, 1, S, T) -> (B, H, S, d) and the log of each softmax's
    denominator (B, H, S)."""
    if q.device.type == "cpu":
        # The operator behind scaled_dot_product_attention: it takes grouped heads and tells the denominators, but
        # assumes rows of unit stride.
        q = q if q.stride(-1) == 1 else q.contiguous()
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask, scale=scaling)
        return out, lse
    return attend_plainly(q, k, v, scaling=scaling, mask=mask, causal=causal)


def attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, mask: torch.Tensor | None = None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by matrix products, on any device, in as many tiles of queries as keep the scores of one small."""
    tile = max(DECODE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    parts = []
    for first in range(0, q.shape[2], tile):
        last = min(first + tile, q.shape[2])
        seen = last if causal else k.shape[2]
        rows = None if mask is None else mask if mask.shape[2] == 1 else mask[:, :, first:last]
        parts.append(_attend_tile(q[:, :, first:last], k[:, :, :seen], v[:, :, :seen], scaling, rows, first if causal else None))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _attend_tile(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor | None, first: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`first`: of these queries, which see the keys up to their own; None: all keys."""
    batch, heads, queries, _ = q.shape
    folded = q.reshape(batch, k.shape[1], -1, q.shape[3])  # (B, Hkv, rep * S, d)
    scores = (folded @ k.transpose(2, 3)).view(batch, heads, queries, -1).float() * scaling
    if first is not None:
        scores = scores + torch.full_like(scores[0, 0], _HIDDEN).triu(first + 1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).to(v.dtype).view(batch, k.shape[1], folded.shape[2], -1)
    return (weights @ v).view(batch, heads, queries, -1), scores.logsumexp(-1)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hidden = max(_HIDDEN, torch.finfo(dtype).min / 2)  # float16 ends at 65,504, and exp(-32,752) is 0 too
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)


class PromptPiece(NamedTuple):
    """Prompt tokens start..end-1 of one prompt, computed in one call."""

    slot: int
    start: int
    end: int


class PrefillLayout:
    """Pieces of prompts side by side in one stream (1, S). Each is causal and sees the earlier pieces of its own
    prompt."""

    def __init__(self, cache: Cache, pieces: Sequence[PromptPiece], dtype: torch.dtype | None):
        self.cache = cache
        self.pieces = pieces
        self.dtype = dtype  # of keys and values; None: as the model makes them
        self.layers: set[int] = set()  # layers that attended
        self._masks: dict[tuple[PromptPiece, int | None], torch.Tensor] = {}

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, window: int | None) -> torch.Tensor:
        self.layers.add(layer_idx)
        dtype = self.dtype or v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        keys, values = self.cache.prompts.layer(layer_idx, k, v)  # (prompts, Hkv, P, d)
        outputs = []
        offset = 0
        for piece in self.pieces:
            slot, start, end = piece
            span = slice(offset, offset + end - start)
            keys[slot, :, start:end] = k[0, :, span]
            values[slot, :, start:end] = v[0, :, span]
            plain = start == 0 and (window is None or end <= window)
            mask = None if plain else self._mask(piece, window, q)
            output, _ = attend(
                q[:, :, span], keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end], scaling=scaling, mask=mask, causal=plain
            )
            outputs.append(output.transpose(1, 2))  # (1, tokens, H, d)
            offset = span.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _mask(self, piece: PromptPiece, window: int | None, q: torch.Tensor) -> torch.Tensor:
        if (piece, window) not in self._masks:
            distance = torch.arange(piece.start, piece.end, device=q.device)[:, None] - torch.arange(piece.end, device=q.device)  # (tokens, end)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[piece, window] = _additive(visible, q.dtype)[None, None]
        return self._masks[piece, window]


class DecodeLayout:
    """The newest token of A rows as one stream (1, A). A row sees its prompt, stored once for all its rows, and its own
    suffix.

    The two parts are attended apart and merged by their softmax denominators, which is exact.
    """

    def __init__(
        self,
        cache: Cache,
        row_prompts: Sequence[int],
        prompt_lengths: Sequence[int],
        cached: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device,
    ):
        """row_prompts [A]: each row's prompt slot; prompt_lengths [n]; cached [A]: tokens of each suffix that are
        stored already."""
        self.cache = cache
        self.dtype = dtype
        self.rows = len(row_prompts)
        self.prompts = len(prompt_lengths)
        self.longest_prompt = max(prompt_lengths)
        self.longest_suffix = max(cached) + 1  # the new token included
        self._even_prompts = min(prompt_lengths) == self.longest_prompt
        self._column = cached[0] if min(cached) == max(cached) else None  # the one column that all rows write, if it is one
        self._columns = torch.tensor(cached, device=device)  # (A,)
        self._lengths = torch.tensor(prompt_lengths, device=device)  # (n,)
        self._row_prompts = torch.tensor(row_prompts, device=device)  # (A,)
        self.position_ids = (self._lengths[self._row_prompts] + self._columns)[None]  # (1, A)
        self._longest_context = self.longest_prompt + self.longest_suffix

        ranks = []  # which of its prompt's rows a row is
        counts = [0] * self.prompts
        for prompt in row_prompts:
            ranks.append(counts[prompt])
            counts[prompt] += 1
        self._per_prompt = max(counts)  # R
        self._ranks = torch.tensor(ranks, device=device)
        self._seats = torch.zeros(
            self.prompts, self._per_prompt, dtype=torch.long, device=device
        )  # (n, R) the row in each seat; empty seats repeat row 0
        self._seats[self._row_prompts, self._ranks] = torch.arange(self.rows, device=device)
        self._indices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._prompt_masks: dict[tuple[int | None, int], torch.Tensor | None] = {}
        self._suffix_masks: dict[int | None, torch.Tensor | None] = {}

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, window: int | None) -> torch.Tensor:
        dtype = self.dtype or v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        _, heads, rows, dim = q.shape
        kv_heads = k.shape[1]
        rep = heads // kv_heads
        q = q.transpose(1, 2).reshape(rows, kv_heads, rep, dim)
        if window is not None and window >= self._longest_context:
            window = None

        keys, values = self.cache.suffixes.layer(layer_idx, k, v)  # (slots, Hkv, T, d)
        self._store(keys, k)
        self._store(values, v)
        last = self.longest_suffix
        own, own_lse = attend(q, keys[:rows, :, :last], values[:rows, :, :last], scaling=scaling, mask=self._suffix_mask(window, dtype))

        keys, values = self.cache.prompts.layer(layer_idx, k, v)  # (prompt slots, Hkv, P, d)
        seats, rows_back = self._index(kv_heads)
        seated = q.reshape(rows * kv_heads, rep * dim).index_select(0, seats).view(self.prompts, kv_heads, self._per_prompt * rep, dim)
        n, last = self.prompts, self.longest_prompt
        shared, shared_lse = attend(seated, keys[:n, :, :last], values[:n, :, :last], scaling=scaling, mask=self._prompt_mask(window, rep, dtype))
        shared = shared.reshape(-1, rep * dim).index_select(0, rows_back).view(rows, kv_heads, rep, dim)
        shared_lse = shared_lse.reshape(-1, rep).index_select(0, rows_back).view(rows, kv_heads, rep)

        weight = torch.sigmoid(own_lse.view(rows, kv_heads, rep) - shared_lse)[..., None]
        return torch.lerp(shared, own, weight.to(dtype)).view(1, rows, heads, dim)

    def _store(self, slab: torch.Tensor, new: torch.Tensor) -> None:
        """Write the new token's keys or values (1, Hkv, A, d) into each row's next column."""
        new = new[0].transpose(0, 1)  # (A, Hkv, d)
        if self._column is not None:
            slab[: self.rows, :, self._column] = new
        else:
            slab[torch.arange(self.rows, device=new.device), :, self._columns] = new

    def _index(self, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(n * Hkv * R) which (row, head) sits where when queries are grouped by prompt and head, and (A * Hkv) the way
        back."""
        if kv_heads not in self._indices:
            head = torch.arange(kv_heads, device=self._seats.device)
            seats = self._seats[:, None, :] * kv_heads + head[None, :, None]  # (n, Hkv, R)
            back = (self._row_prompts[:, None] * kv_heads + head) * self._per_prompt + self._ranks[:, None]  # (A, Hkv)
            self._indices[kv_heads] = (seats.flatten(), back.flatten())
        return self._indices[kv_heads]

    def _suffix_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(A, 1, 1, T), or None where every row sees all columns."""
        if window not in self._suffix_masks:
            distance = self._columns[:, None] - torch.arange(self.longest_suffix, device=self._columns.device)  # (A, T)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            everything = self._column is not None and (window is None or self.longest_suffix <= window)
            self._suffix_masks[window] = None if everything else _additive(visible, dtype)[:, None, None]
        return self._suffix_masks[window]

    def _prompt_mask(self, window: int | None, rep: int, dtype: torch.dtype) -> torch.Tensor | None:
        """(n, 1, R * rep or 1, P), or None where every row sees all of its prompt."""
        if (window, rep) not in self._prompt_masks:
            self._prompt_masks[window, rep] = self._make_prompt_mask(window, rep, dtype)
        return self._prompt_masks[window, rep]

    def _make_prompt_mask(self, window: int | None, rep: int, dtype: torch.dtype) -> torch.Tensor | None:
        if window is None and self._even_prompts:
            return None
        column = torch.arange(self.longest_prompt, device=self._lengths.device)
        exists = column < self._lengths[:, None]  # (n, P)
        if window is None:
            return _additive(exists, dtype)[:, None, None]
        distance = self.position_ids[0][self._seats][..., None] - column  # (n, R, P)
        visible = exists[:, None] & (distance < window)
        return _additive(visible, dtype).repeat_interleave(rep, dim=1)[:, None]
