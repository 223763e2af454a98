"""A unit test for rewards: gold answers must earn the most, and text without the answer nothing. Needs no model and no
training."""

from posttrain.rewards.check.bench import Bench
from posttrain.rewards.check.checks import CHECKS, CheckFinding, CheckReport, check_reward

__all__ = ["CHECKS", "Bench", "CheckFinding", "CheckReport", "check_reward"]
