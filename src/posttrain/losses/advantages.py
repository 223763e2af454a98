"""From scores to advantages: how much better a completion is than its siblings. Whole groups in, no tokens and no gradients.

B completions in contiguous groups, K rewards. A score that could not be given is None (or NaN) and takes no part in any mean; a completion
with no score at all gets advantage 0. All arithmetic is float64. Standard deviations divide by n - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError, did_you_mean

EPSILON = 1e-4  # added to a standard deviation before dividing; the value that GRPO trainers share
ROUNDING = 1e-12  # rewards that differ by less than this part of their summands are equal: 0.1 + 0.2 is 0.3

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass(frozen=True)
class Advantages:
    """What the update needs, and what a log shows of it."""

    advantages: Tensor  # (B,) float64; 0 where nothing could be scored
    rewards: Tensor  # (B,) float64, weighted sum of the scores before any scaling; NaN where nothing could be scored
    group_mean: Tensor  # (n,) of the rewards; NaN when none was scored
    group_std: Tensor  # (n,) of the rewards; 0 when fewer than two were scored
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

    sum_then_normalize: A = total - its group's mean, divided by the standard deviation (+ 1e-4) of the group, of the batch, or by nothing
    (GRPO, arXiv:2402.03300; "none" as in Dr. GRPO). normalize_then_sum: each reward is standardised in its group, then weighted and summed,
    then standardised over the batch (GDPO); scale_rewards has no say there. Across ranks, gather the scores of all groups first.
    """
    table = score_table(scores)  # (B, K)
    if sum(group_sizes) != len(table):
        raise ValueError(f"groups of {list(group_sizes)} rows do not cover the {len(table)} rows that were scored")
    weight = torch.ones(table.shape[1], dtype=torch.float64) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    if len(weight) != table.shape[1]:
        raise UserError(f"there are {len(weight)} reward_weights for {table.shape[1]} rewards: give one weight per reward")
    for name, value, known in (("scale_rewards", scale_rewards, SCALES), ("multi_objective_aggregation", aggregation, AGGREGATIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; it can be {', '.join(known)}.{did_you_mean(str(value), known)}")

    sizes = list(group_sizes)
    weighted = table * weight
    rewards = total(weighted)
    raw, is_zero_std = AGGREGATIONS[aggregation](table, weight, sizes, scale_rewards)
    silent = torch.repeat_interleave(is_zero_std, torch.tensor(sizes, dtype=torch.long))  # (B,)
    raw = torch.where(silent | raw.isnan(), 0.0, raw)
    groups = rewards.split(sizes)
    return Advantages(raw, rewards, stack([mean(group) for group in groups]), stack([std(group) for group in groups]), is_zero_std)


def sum_then_normalize(table: Tensor, weight: Tensor, sizes: list[int], scale: str) -> tuple[Tensor, Tensor]:
    weighted = table * weight
    rewards = total(weighted)
    raw = centred(rewards, sizes) / SCALES[scale](rewards, sizes)
    return raw, equal_groups(weighted, sizes)


def normalize_then_sum(table: Tensor, weight: Tensor, sizes: list[int], scale: str) -> tuple[Tensor, Tensor]:
    columns = []
    for column in table.T:
        silent = torch.repeat_interleave(equal_groups(column[:, None], sizes), torch.tensor(sizes, dtype=torch.long))
        standardised = centred(column, sizes) / group_scale(column, sizes)
        columns.append(torch.where(silent & ~column.isnan(), 0.0, standardised))
    weighted = torch.stack(columns, dim=1) * weight  # (B, K)
    rewards = total(weighted)
    return (rewards - mean(rewards)) / (std(rewards) + EPSILON), equal_groups(weighted, sizes)


def group_scale(rewards: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([(std(group) + EPSILON).expand(len(group)) for group in rewards.split(sizes)])


def batch_scale(rewards: Tensor, sizes: list[int]) -> Tensor:
    return std(rewards) + EPSILON


def no_scale(rewards: Tensor, sizes: list[int]) -> Tensor:
    return torch.ones_like(rewards)


SCALES = {"group": group_scale, "batch": batch_scale, "none": no_scale}
AGGREGATIONS = {"sum_then_normalize": sum_then_normalize, "normalize_then_sum": normalize_then_sum}


def score_table(scores: Tensor | Sequence[Sequence[float | None]]) -> Tensor:
    """(B, K) float64 with NaN for None."""
    if isinstance(scores, Tensor):
        return scores.detach().to("cpu", torch.float64)
    return torch.tensor([[float("nan") if score is None else float(score) for score in row] for row in scores], dtype=torch.float64)


def total(weighted: Tensor) -> Tensor:
    """(B, K) -> (B,) over the scored ones; NaN where none was."""
    return torch.where(weighted.isnan().all(dim=1), torch.nan, weighted.nansum(dim=1))


def centred(rewards: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([group - mean(group) for group in rewards.split(sizes)])


def mean(rewards: Tensor) -> Tensor:
    return rewards.nanmean()


def std(rewards: Tensor) -> Tensor:
    """Over the scored ones, n - 1 in the denominator; 0 for fewer than two."""
    scored = rewards[~rewards.isnan()]
    return scored.std() if len(scored) > 1 else rewards.new_zeros(())


def equal_groups(weighted: Tensor, sizes: list[int]) -> Tensor:
    """(n,) bool: no two scored rewards of the group differ by more than the rounding of their sums. A computed deviation is no witness:
    equal rewards can miss their own mean by one bit, and dividing that by a tiny number makes an advantage out of nothing."""
    flags = []
    for group in weighted.split(sizes):
        scored = group[~group.isnan().all(dim=1)]
        rewards = scored.nansum(dim=1)
        magnitude = scored.abs().nansum(dim=1).max() if len(scored) else weighted.new_zeros(())
        flags.append(not len(scored) or bool(rewards.max() - rewards.min() <= ROUNDING * magnitude))
    return torch.tensor(flags, dtype=torch.bool)


def stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)
