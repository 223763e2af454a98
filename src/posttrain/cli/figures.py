"""The figures of an evaluation, from scored answers: accuracies with intervals, categories, and what one model gained over another.

Mappings that `--json` prints as they are. The statistics are evaluation.py's; answers are asked for in exams.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.evaluation import Estimate, Proportion, bootstrap, mcnemar, paired_difference, pass_at_k, permutation, rate, wilson
from posttrain.rewards.rubric import Rubric
from posttrain.types import Group


@dataclass(frozen=True)
class Answers:
    """What one model said."""

    greedy: list[Group]  # of one
    sampled: list[Group] = field(default_factory=list)


def summary(given: Answers, rubric: Rubric) -> dict[str, Any]:
    """The figures of one model."""
    rollouts = [group.rollouts[0] for group in given.greedy]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    result: dict[str, Any] = {
        "questions": len(rollouts),
        "truncated": sum(rollout.is_truncated for rollout in rollouts) / len(rollouts),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
    }
    if rubric.can_decide():
        accuracy = wilson(sum(right_counts(given.greedy, rubric)), len(rollouts))
        result |= {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high], "right": accuracy.right}
    if given.sampled:
        result["sampled"] = _sampled(given.sampled, rubric)
    return result


def _sampled(groups: list[Group], rubric: Rubric) -> dict[str, Any]:
    n = len(groups[0].rollouts)
    result: dict[str, Any] = {"completions": n, "truncated": sum(r.is_truncated for group in groups for r in group.rollouts) / (n * len(groups))}
    if rubric.can_decide():
        counts = right_counts(groups, rubric)
        sizes = sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})
        result["pass_at"] = {str(k): as_list(rate([pass_at_k(n, right, k) for right in counts], n // k)) for k in sizes}
    if (means := mean_rewards(groups)) and None not in means:
        values = [mean for mean in means if mean is not None]
        result["mean_reward"] = as_list(bootstrap(values, bounds=rubric.range or (min(values), max(values))))
    return result


def right_counts(groups: Sequence[Group], rubric: Rubric) -> list[int]:
    """How many answers to each question are right; one that could not be judged is not."""
    return [sum(rubric.is_right(rollout) is True for rollout in group.rollouts) for group in groups]


def mean_rewards(groups: Sequence[Group]) -> list[float | None]:
    """The mean reward of each question's answers; None where no answer was scored."""
    scored = [[reward for reward in group.rewards if reward is not None] for group in groups]
    return [sum(rewards) / len(rewards) if rewards else None for rewards in scored]


def as_list(estimate: Estimate | Proportion) -> list[float]:
    """[value, low, high]."""
    return [estimate.value, estimate.low, estimate.high]


def categories(groups: Sequence[Group], rubric: Rubric, column: str) -> list[dict[str, Any]]:
    """Greedy accuracy for each value of a column, the commonest value first; the mean reward where nothing decides."""
    values = [str(group.task.columns[column]) for group in groups]
    table = []
    for value in sorted(set(values), key=lambda value: (-values.count(value), value)):
        mine = [group for group, own in zip(groups, values, strict=True) if own == value]
        table.append({"value": value, **summary(Answers(mine), rubric)})
    return table


def compared(before: Answers, after: Answers, rubric: Rubric) -> dict[str, Any]:
    """What `after` gained, on the same questions: differences with their intervals over questions, and exact or permutation p-values."""
    result: dict[str, Any] = {}
    if rubric.can_decide():
        old, new = ([count == 1 for count in right_counts(given.greedy, rubric)] for given in (before, after))
        changes = [int(now) - int(then) for then, now in zip(old, new, strict=True)]
        result |= {"difference": as_list(paired_difference(old, new)), "p_value": mcnemar(old, new)}
        result |= {"gained": changes.count(1), "lost": changes.count(-1)}
    then, now = (mean_rewards(given.greedy) for given in (before, after))
    result["reward"] = _paired([(a, b) for a, b in zip(then, now, strict=True) if a is not None and b is not None], rubric.range)
    if before.sampled and rubric.can_decide():
        n = len(before.sampled[0].rollouts)
        counts = (right_counts(given.sampled, rubric) for given in (before, after))
        result["sampled_difference"] = _paired([(a / n, b / n) for a, b in zip(*counts, strict=True)], (0.0, 1.0))
    return result


def _paired(pairs: list[tuple[float, float]], ends: tuple[float, float] | None) -> dict[str, Any] | None:
    """The mean difference of pairs; None where there are none."""
    if not pairs:
        return None
    before, after = ([pair[place] for pair in pairs] for place in (0, 1))
    low, high = ends or (min(*before, *after), max(*before, *after))
    changes = [new - old for old, new in pairs]
    return {"difference": as_list(bootstrap(changes, bounds=(low - high, high - low))), "p_value": permutation(before, after)}
