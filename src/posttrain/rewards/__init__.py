"""Scoring completions: functions become rewards, rewards stack into a rubric, and what breaks is counted."""

from posttrain.rewards.failures import FailurePolicy
from posttrain.rewards.reward import RewardFunction, reward, verifier
from posttrain.rewards.rubric import Rubric
from posttrain.rewards.scoring import Report, Scoring

__all__ = ["FailurePolicy", "Report", "RewardFunction", "Rubric", "Scoring", "reward", "verifier"]
