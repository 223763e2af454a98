"""A reward model's objective: of two completions the chosen one should score higher. Pure tensors, one value a pair;
dividing is the caller's job.

B pairs. Only differences of scores count, so scores are known up to a constant for each prompt; centring fixes it near
0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """(B,): -log sigmoid(chosen - rejected - margin), the negative log-likelihood of the preference (Bradley and Terry
    1952; with a margin Touvron et al. 2023, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,): (chosen + rejected)^2, which is least where a pair's scores lie around 0 (Eisenstein et al. 2023)."""
    return (chosen + rejected).square()


def is_ordered(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,) bool: the chosen completion scores strictly higher."""
    return torch.gt(chosen, rejected)
