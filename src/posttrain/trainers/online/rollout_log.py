"""What a rollout looked like, for the log: rewards and their parts, signal, lengths, why completions ended. It decides nothing."""

from __future__ import annotations

import torch

from posttrain.rewards import Rubric
from posttrain.rewards.library.repetition import repeated_fraction
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.online.environment import note_episode
from posttrain.types import Completion, Group


def note_groups(groups: list[Group], metrics: Metrics, rubric: Rubric, *, in_environment: bool) -> None:
    """Scored groups, before any is dropped: otherwise the curves would lie."""
    for group in groups:
        if len(group.completions) > 1:
            metrics.note("frac_reward_zero_std", not group.has_signal)
        for completion in group.completions:
            _note_rollout(completion, metrics, rubric, in_environment)
        scored = [reward for reward in group.rewards if reward is not None]
        if len(scored) > 1:
            metrics.note("reward_std", torch.tensor(scored).std().item())


def _note_rollout(completion: Completion, metrics: Metrics, rubric: Rubric, in_environment: bool) -> None:
    if completion.reward is not None:
        metrics.note("reward", completion.reward)
    for name, score in completion.scores.items():
        if score is not None:
            metrics.note(f"rewards/{name}/mean", score)
    metrics.note("unscored", completion.reward is None)
    is_right = rubric.is_right(completion)
    if is_right is not None:
        metrics.note("solved", is_right)
    if in_environment:
        note_episode(completion, metrics)
    length = sum(completion.sampled)
    metrics.note("completions/mean_length", length)
    metrics.note_extreme("completions/min_length", "min", length)
    metrics.note_extreme("completions/max_length", "max", length)
    metrics.note("completions/clipped_ratio", completion.is_truncated)
    metrics.note("completions/repeated", repeated_fraction(completion.sampled_ids, 3))
    if not completion.is_truncated:
        metrics.note("completions/mean_terminated_length", length)
