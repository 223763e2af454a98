"""The figures of an evaluation, from scored answers: accuracies with intervals, categories, and what one model gained
over another.

Mappings that `--json` prints as they are. An answer that could not be judged is neither right nor wrong: it is counted
as `unjudged` and left out of every figure. The statistics are evaluation.py's; answers are asked for in evaluations.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from posttrain.evaluation import (
    Estimate,
    Proportion,
    bootstrap,
    judged_in_both,
    mcnemar,
    paired_difference,
    pass_at_k,
    permutation,
    rate,
    wilson,
)
from posttrain.rewards.rubric import Rubric
from posttrain.types import Group


@dataclass(frozen=True)
class Answers:
    """What one model said."""

    greedy: list[Group]  # of one
    sampled: list[Group] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # for each answer over which a reward or the environment broke: how


def summary(given: Answers, rubric: Rubric) -> dict[str, Any]:
    """The figures of one model. `accuracy`, `interval` and `right` are there only if some reward decides and some
    answer could be judged."""
    completions = [group.completions[0] for group in given.greedy]
    rewards = [completion.reward for completion in completions if completion.reward is not None]
    result: dict[str, Any] = {
        "questions": len(completions),
        "truncated": sum(completion.is_truncated for completion in completions) / len(completions),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "unscored": len(completions) - len(rewards),
    }
    if rubric.can_decide():
        judged = [right for group in given.greedy for right in verdicts(group, rubric)]
        result["unjudged"] = len(completions) - len(judged)
        if judged:
            accuracy = wilson(sum(judged), len(judged))
            result |= {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high], "right": accuracy.right}
    if given.sampled:
        result["sampled"] = _sampled(given.sampled, rubric)
    if given.broken:
        result["broken"] = {"answers": len(given.broken), "first": given.broken[0].splitlines()[0]}
    return result


def _sampled(groups: list[Group], rubric: Rubric) -> dict[str, Any]:
    n, completions = len(groups[0].completions), [completion for group in groups for completion in group.completions]
    truncated = sum(completion.is_truncated for completion in completions) / len(completions)
    result: dict[str, Any] = {"completions": n, "answers": len(completions), "truncated": truncated}
    if rubric.can_decide():
        judged = [verdicts(group, rubric) for group in groups]
        result |= {"unjudged": len(completions) - sum(map(len, judged)), "pass_at": {}}
        for k in sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n}):
            if enough := [own for own in judged if len(own) >= k]:
                chances = [pass_at_k(len(own), sum(own), k) for own in enough]
                result["pass_at"][str(k)] = as_list(rate(chances, fmean(len(own) // k for own in enough)))
    if values := [mean for mean in mean_rewards(groups) if mean is not None]:
        result["mean_reward"] = as_list(bootstrap(values, bounds=rubric.range or (min(values), max(values))))
    return result


def verdicts(group: Group, rubric: Rubric) -> list[bool]:
    """Right or wrong, of the answers that could be judged."""
    return [right for completion in group.completions if (right := rubric.is_right(completion)) is not None]


def mean_rewards(groups: Sequence[Group]) -> list[float | None]:
    """The mean reward of each question's answers; None where no answer was scored."""
    scored = [[reward for reward in group.rewards if reward is not None] for group in groups]
    return [sum(rewards) / len(rewards) if rewards else None for rewards in scored]


def as_list(estimate: Estimate | Proportion) -> list[float]:
    """[value, low, high]."""
    return [estimate.value, estimate.low, estimate.high]


def categories(groups: Sequence[Group], rubric: Rubric, column: str) -> list[dict[str, Any]]:
    """Greedy accuracy for each value of a column, the commonest value first; the mean reward where nothing decides. A
    row without it has None."""
    values = [str(group.task.columns.get(column)) for group in groups]
    table = []
    for value in sorted(set(values), key=lambda value: (-values.count(value), value)):
        mine = [group for group, own in zip(groups, values, strict=True) if own == value]
        table.append({"value": value, **summary(Answers(mine), rubric)})
    return table


def compared(before: Answers, after: Answers, rubric: Rubric) -> dict[str, Any]:
    """What `after` gained, on the same questions: differences with their intervals over questions, and exact or
    permutation p-values.

    Of the questions with an answer of both that could be judged (`paired`), or scored.
    """
    result: dict[str, Any] = {}
    old, new = ([rubric.is_right(group.completions[0]) for group in given.greedy] for given in (before, after))
    if pairs := judged_in_both(old, new):
        result |= {"paired": len(pairs), "difference": as_list(paired_difference(old, new)), "p_value": mcnemar(old, new)}
        result |= {"gained": pairs.count((False, True)), "lost": pairs.count((True, False))}
    result["reward"] = _paired(mean_rewards(before.greedy), mean_rewards(after.greedy), rubric.range)
    if before.sampled and rubric.can_decide():
        result["sampled_difference"] = _paired(_shares(before.sampled, rubric), _shares(after.sampled, rubric), (0.0, 1.0))
    return result


def _shares(groups: Sequence[Group], rubric: Rubric) -> list[float | None]:
    """The share of each question's judged answers that is right; None where none was judged."""
    return [fmean(judged) if (judged := verdicts(group, rubric)) else None for group in groups]


def _paired(before: Sequence[float | None], after: Sequence[float | None], ends: tuple[float, float] | None) -> dict[str, Any] | None:
    """The mean difference over the questions with a value on both sides; None where there are none."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    if not pairs:
        return None
    then, now = ([pair[side] for pair in pairs] for side in (0, 1))
    low, high = ends or (min(*then, *now), max(*then, *now))
    return {"difference": as_list(bootstrap([new - old for old, new in pairs], bounds=(low - high, high - low))), "p_value": permutation(then, now)}
