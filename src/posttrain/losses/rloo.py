"""REINFORCE with a leave-one-out baseline: a completion is compared with the mean of its siblings (Ahmadian et al.
2024, arXiv:2402.14740).

B completions in contiguous groups. All arithmetic is float64; a completion that could not be scored (NaN) has advantage
0 and is nobody's baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.losses.advantages import EPSILON, equal_groups, in_groups


def leave_one_out(rewards: Tensor, group_sizes: Sequence[int], *, normalize: bool = False) -> Tensor:
    """rewards (B,) float64 -> (B,): reward minus the mean of the other scored ones of its group. 0 for one without
    scored siblings, and exactly 0 where all of a group are equal. `normalize`: the others are standardised over the
    batch (n - 1 in the variance, 1e-4 added to the deviation)."""
    sizes = torch.tensor(list(group_sizes), dtype=torch.long)
    groups = in_groups(rewards, sizes)
    scored = (~groups.isnan()).sum(dim=1).repeat_interleave(sizes)  # (B,)
    total = groups.nansum(dim=1).repeat_interleave(sizes)
    others = (total - rewards) / (scored - 1).clamp(min=1)
    is_zero_variance = equal_groups(rewards[:, None], sizes).repeat_interleave(sizes) | (scored < 2)
    advantages = torch.where(is_zero_variance, 0.0, rewards - others)
    advantages = torch.where(rewards.isnan(), torch.nan, advantages)
    if normalize:
        known = advantages[~advantages.isnan()]
        deviation = known.std() if len(known) > 1 else known.new_zeros(())
        advantages = (advantages - known.mean()) / (deviation + EPSILON) if len(known) else advantages
    return torch.where(is_zero_variance, 0.0, advantages.nan_to_num(nan=0.0))  # a mean that misses 0 by a bit makes no advantage
