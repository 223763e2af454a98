"""posttrain: a pretrained language model becomes an aligned or reasoning one.

The names below are loaded when they are first used, so `import posttrain` takes milliseconds and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "GRPOConfig": "posttrain.trainers.grpo",
    "GRPOTrainer": "posttrain.trainers.grpo",
    "LocalEngine": "posttrain.rollout.local.engine",
    "RewardError": "posttrain.errors",
    "Rubric": "posttrain.rewards",
    "SFTConfig": "posttrain.trainers.sft",
    "SFTTrainer": "posttrain.trainers.sft",
    "UserError": "posttrain.errors",
    "linear_logprobs": "posttrain.ops",
    "load_policy": "posttrain.models.load",
    "reward": "posttrain.rewards",
    "verifier": "posttrain.rewards",
}

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "LocalEngine",
    "RewardError",
    "Rubric",
    "SFTConfig",
    "SFTTrainer",
    "UserError",
    "__version__",
    "linear_logprobs",
    "load_policy",
    "reward",
    "verifier",
]

if TYPE_CHECKING:
    from posttrain.errors import RewardError, UserError
    from posttrain.models.load import load_policy
    from posttrain.ops import linear_logprobs
    from posttrain.rewards import Rubric, reward, verifier
    from posttrain.rollout.local.engine import LocalEngine
    from posttrain.trainers.grpo import GRPOConfig, GRPOTrainer
    from posttrain.trainers.sft import SFTConfig, SFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
