"""The training layout: how a packed stream attends. Pure (a checkpoint recomputes layers in reverse) and shared by all
layers of one forward.

It knows segments and indices only; the arithmetic is `ops.prefix_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.ops.prefix_attention import prefix_attention
from posttrain.ops.prefix_plan import PrefixPlan


class TrainLayout:
    """Implements `ops.attention.Layout` for the segments of one stream. A plain class: wrappers rebuild dataclasses
    among a module's inputs."""

    def __init__(self, segments: Sequence[tuple[int, int, int | None]], device: torch.device) -> None:
        self.plan = PrefixPlan(segments, device)

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, window: int | None) -> torch.Tensor:
        """q (1, H, S, d), k and v (1, Hkv, S, d) -> (1, S, H, d)."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (S, heads, d)
        return prefix_attention(q, k, v, self.plan, scaling=scaling, window=window)[None]
