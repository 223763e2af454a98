"""A metric that can be added: over micro-batches, over ranks, in any order. Means are taken once, at the end.

Everything stays a 0-d tensor on the device, so noting a metric never waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tally:
    """Sum and count of some values, and the smallest and largest mean of a row. Across ranks: SUM, SUM, MIN, MAX."""

    total: Tensor  # ()
    count: Tensor  # ()
    row_min: Tensor  # () +inf when nothing was counted
    row_max: Tensor  # () -inf when nothing was counted

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Tally:
        """`values` (B, T) counted where `mask` (B, T); values (B, 1) of whole rows are counted once per row that has
        any token."""
        values = values.detach().float()
        mask = mask.bool() if values.shape == mask.shape else mask.bool().any(dim=1, keepdim=True)
        kept = torch.where(mask, values, 0.0)
        if not values.numel():  # min and max of nothing raise
            return cls(kept.sum(), kept.sum(), kept.new_tensor(torch.inf), kept.new_tensor(-torch.inf))
        counts = mask.sum(dim=1)
        means = kept.sum(dim=1) / counts.clamp(min=1)  # (B,)
        least, most = (torch.where(counts > 0, means, limit) for limit in (torch.inf, -torch.inf))
        return cls(kept.sum(), mask.sum().to(kept.dtype), least.min(), most.max())

    def __add__(self, other: Tally) -> Tally:
        rows = torch.minimum(self.row_min, other.row_min), torch.maximum(self.row_max, other.row_max)
        return Tally(self.total + other.total, self.count + other.count, *rows)

    @property
    def mean(self) -> float:
        """NaN when nothing was counted. Waits for the device."""
        return (self.total / self.count).item()
