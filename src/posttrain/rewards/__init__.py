"""Scoring completions: functions become rewards, rewards stack into a rubric."""

from posttrain.rewards.reward import RewardFunction, reward, verifier
from posttrain.rewards.rubric import Rubric

__all__ = ["RewardFunction", "Rubric", "reward", "verifier"]
