"""Rewards that come with the library. PRESETS make a list of rewards from settings; FUNCTIONS are single rewards."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.rewards.library.arithmetic import arithmetic, number_detected, right_number
from posttrain.rewards.library.gsm8k import correctness, gsm8k, integer, soft_format, strict_format, tag_count
from posttrain.rewards.reward import RewardFunction

PRESETS: dict[str, Callable[..., list[RewardFunction]]] = {"arithmetic": arithmetic, "gsm8k": gsm8k}
FUNCTIONS: dict[str, RewardFunction] = {
    reward.name: reward for reward in (number_detected, right_number, correctness, integer, soft_format, strict_format, tag_count)
}
