"""Where keys and values live: two slabs, one for prompts (each stored once) and one for what their completions add.

A slab is a (rows, Hkv, T, d) pair of tensors for each layer. Rows and T grow by doubling and shrink when mostly idle,
layer by layer as they are touched, so memory follows the work in flight. Who owns a row is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from posttrain.sizes import CACHE_TOKENS


def _capacity(current: int, needed: int, first: int) -> int:
    """Powers of two times `first`; kept while at least a quarter of it is used."""
    if current >= needed > current // 4:
        return current
    capacity = first
    while capacity < needed:
        capacity *= 2
    return capacity


class Slab:
    """KV of up to `rows` rows of up to `tokens` tokens, for every layer that has written so far."""

    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # K, V, each (rows, Hkv, tokens, d)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for rows 0..rows-1 of this many tokens. What is beyond may be forgotten."""
        self.rows = _capacity(self.rows, rows, 1)
        self.tokens = _capacity(self.tokens, tokens, CACHE_TOKENS)

    def layer(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, made or resized when needed to hold heads like k's and v's (B, Hkv, S, d)."""
        held = self._layers.get(layer_idx)
        if held is None:
            held = (self._empty(k), self._empty(v))
        elif held[0].shape[0] != self.rows or held[0].shape[2] != self.tokens:
            held = (self._resized(held[0]), self._resized(held[1]))
        else:
            return held
        self._layers[layer_idx] = held
        return held

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros: columns that nobody wrote are masked, but 0 * NaN would still be NaN.
        return like.new_zeros(self.rows, like.shape[1], self.tokens, like.shape[3])

    def _resized(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty(old)
        rows, tokens = min(old.shape[0], self.rows), min(old.shape[2], self.tokens)
        new[:rows, :, :tokens] = old[:rows, :, :tokens]
        return new

    def move(self, moves: Iterable[tuple[int, int, int]]) -> None:
        """(from, to, tokens): copy rows to the slots that others have left, in this order. A row without tokens may lie
        beyond the slab."""
        for source, target, tokens in moves:
            if not tokens:
                continue
            for held in self._layers.values():
                for tensor in held:
                    tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def free(self) -> None:
        self._layers.clear()
        self.rows = self.tokens = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for held in self._layers.values() for tensor in held)


class Cache:
    """The KV memory of one rollout."""

    def __init__(self) -> None:
        self.prompts = Slab()
        self.suffixes = Slab()

    def free(self) -> None:
        self.prompts.free()
        self.suffixes.free()

    @property
    def nbytes(self) -> int:
        return self.prompts.nbytes + self.suffixes.nbytes
