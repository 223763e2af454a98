"""What a rollout looked like, for the log: rewards and their parts, signal, lengths, why completions ended. It decides
nothing."""

from __future__ import annotations

import torch

from posttrain.rewards import Rubric
from posttrain.rewards.library.repetition import repeated_fraction
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.online.environment import note_episode
from posttrain.types import Completion, Group


def note_groups(groups: list[Group], metrics: Metrics, rubric: Rubric | None, *, in_environment: bool) -> None:
    """Scored groups, before any is dropped: otherwise the curves would lie."""
    for group in groups:
        for completion in group.completions:
            _note_length(completion, metrics)
            if in_environment:
                note_episode(completion, metrics)
            if rubric is not None:
                _note_scores(completion, metrics, rubric)
        if rubric is not None and len(group.completions) > 1:
            metrics.note("frac_reward_zero_std", not group.has_signal)
        scored = [reward for reward in group.rewards if reward is not None]
        if len(scored) > 1:
            metrics.note("reward_std", torch.tensor(scored).std().item())


def _note_scores(completion: Completion, metrics: Metrics, rubric: Rubric) -> None:
    if completion.reward is not None:
        metrics.note("reward", completion.reward)
    for name, score in completion.scores.items():
        if score is not None:
            metrics.note(f"rewards/{name}/mean", score)
            metrics.note_spread(f"rewards/{name}/std", score)
    metrics.note("unscored", completion.reward is None)
    is_right = rubric.is_right(completion)
    if is_right is not None:
        metrics.note("solved", is_right)


def _note_length(completion: Completion, metrics: Metrics) -> None:
    length = sum(completion.sampled)
    for kind in ("", "terminated_") if not completion.is_truncated else ("",):
        metrics.note(f"completions/mean_{kind}length", length)
        metrics.note_extreme(f"completions/min_{kind}length", "min", length)
        metrics.note_extreme(f"completions/max_{kind}length", "max", length)
    metrics.note("completions/clipped_ratio", completion.is_truncated)
    metrics.note("completions/repeated", repeated_fraction(completion.sampled_ids, 3))
