"""Rewards that come with the library, by the names that recipes use.

FUNCTIONS are single rewards. MAKERS make a single reward from settings, PRESETS a list of rewards that belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.rewards.judge import judge
from posttrain.rewards.library.answers import exact_answer, numeric_answer
from posttrain.rewards.library.arithmetic import arithmetic, number_detected, right_number
from posttrain.rewards.library.code import code, passes_tests, program_given
from posttrain.rewards.library.deepseek_r1 import deepseek_r1
from posttrain.rewards.library.email import desired_reply, email, keywords_present, recipient_named, signature_block, too_long
from posttrain.rewards.library.environment import environment
from posttrain.rewards.library.gsm8k import correctness, gsm8k, integer, soft_format, strict_format, tag_count
from posttrain.rewards.library.language import language
from posttrain.rewards.library.length import brevity, cosine_length, soft_overlong
from posttrain.rewards.library.math import math_answer
from posttrain.rewards.library.patterns import keywords, regex
from posttrain.rewards.library.proximity import proximity
from posttrain.rewards.library.qwen3_proximity import qwen3_proximity
from posttrain.rewards.library.reasoning import reasoning_first, reasoning_present, steps
from posttrain.rewards.library.reasoning_gym import reasoning_gym
from posttrain.rewards.library.repetition import repetition
from posttrain.rewards.library.structured import json_schema, json_valid
from posttrain.rewards.library.tags import answer_format, tags_once, think_format
from posttrain.rewards.library.trl import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from posttrain.rewards.reward import RewardFunction

PRESETS: dict[str, Callable[..., list[RewardFunction]]] = {
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
    "deepseek-r1": deepseek_r1,
    "email": email,
    "qwen3-proximity": qwen3_proximity,
    "code": code,
}
MAKERS: dict[str, Callable[..., Callable[..., Any]]] = {
    maker.__name__: maker
    for maker in (
        *(answer_format, tags_once, think_format, reasoning_first, reasoning_present, steps),
        *(exact_answer, numeric_answer, proximity, reasoning_gym, judge, passes_tests, program_given),
        *(brevity, cosine_length, soft_overlong, too_long, repetition, language),
        *(json_schema, json_valid, keywords, keywords_present, regex),
        *(get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment),
    )
}
FUNCTIONS: dict[str, RewardFunction] = {
    reward.name: reward
    for reward in (
        *(number_detected, right_number, math_answer, environment),
        *(correctness, integer, soft_format, strict_format, tag_count),
        *(desired_reply, recipient_named, signature_block),
        *(accuracy_reward, reasoning_accuracy_reward, think_format_reward),
    )
}
