"""From per-token losses to one number: a weight per row, known before the forward. loss = sum over (i, t) of mask *
per_token * weight_i.

The counts are those of the whole optimizer step (all micro-batches, all ranks, after truncated completions were masked)
and are given by the caller. So the sum does not depend on how the step is split, and nothing is divided a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Count = int | float | Tensor


@dataclass(frozen=True)
class StepCounts:
    """What a step's loss is divided by."""

    rows: Count  # completions, empty (fully masked) ones included
    tokens: Count  # trained tokens
    max_completion_length: int


RowWeights = Callable[[Tensor, StepCounts], Tensor]


def sequence_mean(lengths: Tensor, counts: StepCounts) -> Tensor:
    """The mean over completions of the mean over their tokens. An empty completion weighs 0 and still counts as a
    row."""
    return torch.where(lengths > 0, 1.0 / (lengths.clamp(min=1) * counts.rows), 0.0)


def token_mean(lengths: Tensor, counts: StepCounts) -> Tensor:
    """The mean over all tokens: long completions weigh more."""
    tokens = torch.as_tensor(counts.tokens, device=lengths.device)
    return torch.ones_like(lengths) / tokens.clamp(min=1)


def constant_length(lengths: Tensor, counts: StepCounts) -> Tensor:
    """The sum over tokens, divided by a length that no completion can change: no bias towards short or long ones. Dr.
    GRPO, arXiv:2503.20783."""
    return torch.ones_like(lengths) / (counts.rows * counts.max_completion_length)


def sequence_sum(lengths: Tensor, counts: StepCounts) -> Tensor:
    """The mean over completions of the sum over their tokens. LUSPO."""
    return torch.ones_like(lengths) / counts.rows
