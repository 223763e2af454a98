"""Scoring completions: functions become rewards, rewards stack into a rubric, and what breaks is counted."""

import importlib
from typing import Any

from posttrain.rewards.failures import FailurePolicy
from posttrain.rewards.reward import RewardFunction, reward, verifier
from posttrain.rewards.rubric import Rubric
from posttrain.rewards.scoring import Report, Scoring

_TRL = (  # names that scripts for TRL import from here
    "accuracy_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
)
__all__ = ["FailurePolicy", "Report", "RewardFunction", "Rubric", "Scoring", "reward", "verifier", *_TRL]


def __getattr__(name: str) -> Any:
    if name not in _TRL:
        raise AttributeError(f"module 'posttrain.rewards' has no attribute '{name}'")
    return getattr(importlib.import_module("posttrain.rewards.library.trl"), name)
