"""NEFTune: noise on the embeddings of a stream, drawn for each example by itself, so that packing and order do not
change it.

Uniform in [-1, 1] times alpha / sqrt(L * D), L the tokens of the example, D the size of an embedding (Jain et al. 2023,
algorithm 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.models.head import base_model

if TYPE_CHECKING:
    from posttrain.data.stream import Stream


@contextmanager
def embedding_noise(model: nn.Module, stream: Stream, alpha: float, key: tuple[int, ...]) -> Iterator[None]:
    """Inside, the embedding layer of `model` adds noise to what it returns for `stream`. Each row's noise is drawn from
    `key` and its row id."""
    embedding = base_model(model).get_input_embeddings()

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.cat([_noise(length, output.shape[-1], alpha, (*key, row)) for row, length in _rows(stream)])  # (S, D)
        return output + noise.to(output)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _rows(stream: Stream) -> Iterator[tuple[int, int]]:
    """(row id, tokens of prompt and completion together) of each example; groups have one completion."""
    completions = [segment for segment in stream.segments if segment.prompt is not None]
    for row, completion in zip(stream.row_ids.tolist(), completions, strict=True):
        assert completion.prompt is not None
        yield row, stream.segments[completion.prompt].length + completion.length


def _noise(length: int, size: int, alpha: float, key: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
    uniform = torch.rand(length, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1  # (L, D), on the CPU: the same on every device
    return uniform * alpha / (length * size) ** 0.5
