"""Supervised fine-tuning's objective. Pure tensors: (B, T) in, a sum out. Dividing by the step's trained tokens is the caller's job."""

from __future__ import annotations

import torch
from torch import Tensor


def nll(logps: Tensor, mask: Tensor) -> Tensor:
    """(): the summed negative log-likelihood of the tokens in `mask`; connected to `logps` even if there are none."""
    return -torch.where(mask.bool(), logps, 0.0).sum()
