"""posttrain: a pretrained language model becomes an aligned or reasoning one.

The names below are loaded when they are first used, so `import posttrain` takes milliseconds and does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Asks torch to hold its CPU tensors in huge pages where Linux allows that (fewer misses when weights are read). torch
# reads this once, when the first tensor is made; a value of the user's own stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOME = {
    "CPOConfig": "posttrain.trainers.cpo",
    "CPOTrainer": "posttrain.trainers.cpo",
    "DPOConfig": "posttrain.trainers.dpo",
    "DPOTrainer": "posttrain.trainers.dpo",
    "GRPOConfig": "posttrain.trainers.grpo",
    "GRPOTrainer": "posttrain.trainers.grpo",
    "KTOConfig": "posttrain.trainers.kto",
    "KTOTrainer": "posttrain.trainers.kto",
    "LocalEngine": "posttrain.rollout.local.engine",
    "ModelReward": "posttrain.trainers.online.reward_model",
    "ORPOConfig": "posttrain.trainers.orpo",
    "ORPOTrainer": "posttrain.trainers.orpo",
    "PPOConfig": "posttrain.trainers.ppo",
    "PPOTrainer": "posttrain.trainers.ppo",
    "Policy": "posttrain.policy",
    "RLOOConfig": "posttrain.trainers.rloo",
    "RLOOTrainer": "posttrain.trainers.rloo",
    "RewardConfig": "posttrain.trainers.reward",
    "RewardError": "posttrain.errors",
    "RewardTrainer": "posttrain.trainers.reward",
    "Rubric": "posttrain.rewards",
    "SFTConfig": "posttrain.trainers.sft",
    "SFTTrainer": "posttrain.trainers.sft",
    "UserError": "posttrain.errors",
    "apply_chat_template": "posttrain.data.convert",
    "extract_prompt": "posttrain.data.convert",
    "is_conversational": "posttrain.data.formats",
    "linear_logprobs": "posttrain.ops",
    "load_policy": "posttrain.policy",
    "maybe_apply_chat_template": "posttrain.data.convert",
    "maybe_convert_to_chatml": "posttrain.data.convert",
    "maybe_extract_prompt": "posttrain.data.convert",
    "maybe_unpair_preference_dataset": "posttrain.data.convert",
    "reward": "posttrain.rewards",
    "unpair_preference_dataset": "posttrain.data.convert",
    "verifier": "posttrain.rewards",
}

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "LocalEngine",
    "ModelReward",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "Policy",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardError",
    "RewardTrainer",
    "Rubric",
    "SFTConfig",
    "SFTTrainer",
    "UserError",
    "__version__",
    "apply_chat_template",
    "extract_prompt",
    "is_conversational",
    "linear_logprobs",
    "load_policy",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "reward",
    "unpair_preference_dataset",
    "verifier",
]

if TYPE_CHECKING:
    from posttrain.data.convert import (
        apply_chat_template,
        extract_prompt,
        maybe_apply_chat_template,
        maybe_convert_to_chatml,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )
    from posttrain.data.formats import is_conversational
    from posttrain.errors import RewardError, UserError
    from posttrain.ops import linear_logprobs
    from posttrain.policy import Policy, load_policy
    from posttrain.rewards.reward import reward, verifier
    from posttrain.rewards.rubric import Rubric
    from posttrain.rollout.local.engine import LocalEngine
    from posttrain.trainers.cpo import CPOConfig, CPOTrainer
    from posttrain.trainers.dpo import DPOConfig, DPOTrainer
    from posttrain.trainers.grpo import GRPOConfig, GRPOTrainer
    from posttrain.trainers.kto import KTOConfig, KTOTrainer
    from posttrain.trainers.online.reward_model import ModelReward
    from posttrain.trainers.orpo import ORPOConfig, ORPOTrainer
    from posttrain.trainers.ppo import PPOConfig, PPOTrainer
    from posttrain.trainers.reward import RewardConfig, RewardTrainer
    from posttrain.trainers.rloo import RLOOConfig, RLOOTrainer
    from posttrain.trainers.sft import SFTConfig, SFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
