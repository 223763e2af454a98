"""From scores to advantages: how much better a completion is than its siblings. Whole groups in, no tokens and no
gradients.

B completions in contiguous groups, K rewards. A score that could not be given is None (or NaN) and takes no part in any
mean, nor does any score of a monitor (a reward with weight 0); a completion with no other score gets advantage 0. All
arithmetic is float64. Standard deviations divide by n - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.errors import UserError, did_you_mean
from posttrain.types import ROUNDING

EPSILON = 1e-4  # added to a standard deviation before dividing; the value that GRPO trainers share

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass(frozen=True)
class Advantages:
    """What the update needs, and what a log shows of it."""

    advantages: Tensor  # (B,) float64; 0 where nothing could be scored
    rewards: Tensor  # (B,) float64, weighted sum of the scores before any scaling; NaN where nothing could be scored
    is_zero_std: Tensor  # (n,) bool: every advantage of the group is exactly 0, for there is nothing to compare


def advantages(
    scores: Tensor | Sequence[Sequence[float | None]],
    group_sizes: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    scale_rewards: Scale = "group",
    aggregation: Aggregation = "sum_then_normalize",
) -> Advantages:
    """Scores (B, K) of whole groups, in order, groups may differ in size; weights (K,), None: all 1.

    sum_then_normalize: A = total - its group's mean, divided by the standard deviation (+ 1e-4) of the group, of the
    batch, or by nothing (GRPO, arXiv:2402.03300; "none" as in Dr. GRPO). normalize_then_sum: each reward is
    standardised in its group, then weighted and summed, then standardised over the batch (GDPO); scale_rewards has no
    say there. Across ranks, gather the scores of all groups first.
    """
    table = score_table(scores, 0 if weights is None else len(weights))  # (B, K)
    if sum(group_sizes) != len(table):
        raise ValueError(f"groups of {list(group_sizes)} rows do not cover the {len(table)} rows that were scored")
    weight = torch.ones(table.shape[1], dtype=torch.float64) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    if len(weight) != table.shape[1]:
        raise UserError(f"there are {len(weight)} reward_weights for {table.shape[1]} rewards: give one weight per reward")
    for name, value, known in (("scale_rewards", scale_rewards, SCALES), ("multi_objective_aggregation", aggregation, AGGREGATIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; it can be {', '.join(known)}.{did_you_mean(str(value), known)}")

    sizes = torch.tensor(list(group_sizes), dtype=torch.long)
    table = torch.where(weight == 0, torch.nan, table)
    rewards = total(table * weight)
    raw, is_zero_std = AGGREGATIONS[aggregation](table, weight, sizes, scale_rewards)
    raw = torch.where(is_zero_std.repeat_interleave(sizes) | raw.isnan(), 0.0, raw)
    return Advantages(raw, rewards, is_zero_std)


def sum_then_normalize(table: Tensor, weight: Tensor, sizes: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    weighted = table * weight
    rewards = total(weighted)
    return centred(rewards, sizes) / SCALES[scale](rewards, sizes), equal_groups(weighted, sizes)


def normalize_then_sum(table: Tensor, weight: Tensor, sizes: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    columns = []
    for column in table.T:  # (B,)
        zero_std = equal_groups(column[:, None], sizes).repeat_interleave(sizes)
        standardised = centred(column, sizes) / group_scale(column, sizes)
        columns.append(torch.where(zero_std & ~column.isnan(), 0.0, standardised))
    weighted = torch.stack(columns, dim=1) * weight  # (B, K)
    rewards = total(weighted)
    return (rewards - rewards.nanmean()) / batch_scale(rewards, sizes), equal_groups(weighted, sizes)


def group_scale(rewards: Tensor, sizes: Tensor) -> Tensor:
    return (std(in_groups(rewards, sizes)) + EPSILON).repeat_interleave(sizes)


def batch_scale(rewards: Tensor, sizes: Tensor) -> Tensor:
    return std(rewards[None]) + EPSILON


def no_scale(rewards: Tensor, sizes: Tensor) -> Tensor:
    return torch.ones_like(rewards)


SCALES = {"group": group_scale, "batch": batch_scale, "none": no_scale}
AGGREGATIONS = {"sum_then_normalize": sum_then_normalize, "normalize_then_sum": normalize_then_sum}


def score_table(scores: Tensor | Sequence[Sequence[float | None]], columns: int) -> Tensor:
    """(B, K) float64 with NaN for None. `columns`: K, where no row tells it."""
    if isinstance(scores, Tensor):
        return scores.detach().to("cpu", torch.float64)
    rows = [[float("nan") if score is None else float(score) for score in row] for row in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(rows[0]) if rows else columns)


def total(weighted: Tensor) -> Tensor:
    """(B, K) -> (B,) over the scored ones; NaN where none was."""
    return torch.where(weighted.isnan().all(dim=1), torch.nan, weighted.nansum(dim=1))


def in_groups(values: Tensor, sizes: Tensor) -> Tensor:
    """(B,) -> (n, G), NaN after the end of a smaller group: an absent row is treated as an unscored one."""
    present = torch.arange(int(sizes.max()) if len(sizes) else 1) < sizes[:, None]
    return torch.full(present.shape, torch.nan, dtype=values.dtype).masked_scatter(present, values)


def centred(rewards: Tensor, sizes: Tensor) -> Tensor:
    return rewards - in_groups(rewards, sizes).nanmean(dim=1).repeat_interleave(sizes)


def std(groups: Tensor) -> Tensor:
    """(n, G) -> (n,) over the scored ones, n - 1 in the denominator; 0 for fewer than two."""
    count = (~groups.isnan()).sum(dim=1)
    squares = (groups - groups.nanmean(dim=1, keepdim=True)).square().nansum(dim=1)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def equal_groups(weighted: Tensor, sizes: Tensor) -> Tensor:
    """(n,) bool: no two scored rewards of the group differ by more than the rounding of their sums. A computed
    deviation is no witness: equal rewards can miss their own mean by one bit, and dividing that by a tiny number makes
    an advantage out of nothing."""
    rewards = in_groups(total(weighted), sizes)
    magnitude = in_groups(weighted.abs().nansum(dim=1), sizes).nan_to_num(0.0).amax(dim=1)
    spread = rewards.nan_to_num(nan=-torch.inf).amax(dim=1) - rewards.nan_to_num(nan=torch.inf).amin(dim=1)  # -inf when nothing was scored
    return spread <= ROUNDING * magnitude
