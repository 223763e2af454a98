"""The trainers that a recipe can start, one row each: its command, its section of the recipe, its classes.

Names only, so that `posttrain --help` imports nothing heavy: `build.py` loads the classes when a row is used.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """How one trainer is started."""

    title: str  # in sentences: "is not a setting of GRPO"
    section: str  # the recipe's section with its settings
    config: str  # "module:class"
    trainer: str  # "module:class"
    help: str  # of its command
    is_online: bool = False  # it draws completions and has them scored (rubric, engine); otherwise the data holds what it learns from

    @property
    def method(self) -> str:
        """What the record of its runs calls it: GRPO, SFT, Reward, ..."""
        return self.config.rpartition(":")[2].removesuffix("Config")

    def config_class(self) -> Any:
        return _load(self.config)

    def trainer_class(self) -> Any:
        return _load(self.trainer)


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


KINDS = {
    "grpo": Kind(
        title="GRPO",
        section="train",
        config="posttrain.trainers.grpo:GRPOConfig",
        trainer="posttrain.trainers.grpo:GRPOTrainer",
        help="Train with GRPO. Any setting can follow: --train.learning_rate=1e-6 --model.name=... --data.train=rows.jsonl",
        is_online=True,
    ),
    "sft": Kind(
        title="SFT",
        section="sft",
        config="posttrain.trainers.sft:SFTConfig",
        trainer="posttrain.trainers.sft:SFTTrainer",
        help="Fine-tune on completions (sections model, data with `completion`, sft). Any setting can follow: --sft.max_steps=100",
    ),
    "dpo": Kind(
        title="DPO",
        section="dpo",
        config="posttrain.trainers.dpo:DPOConfig",
        trainer="posttrain.trainers.dpo:DPOTrainer",
        help="Learn from preferred and rejected completions (data with `chosen` and `rejected`). Any setting can follow: --dpo.beta=0.05",
    ),
    "kto": Kind(
        title="KTO",
        section="kto",
        config="posttrain.trainers.kto:KTOConfig",
        trainer="posttrain.trainers.kto:KTOTrainer",
        help="Learn from completions that are good or bad (data with `completion` and `label`, or pairs). Any setting can follow: --kto.beta=0.05",
    ),
    "orpo": Kind(
        title="ORPO",
        section="orpo",
        config="posttrain.trainers.orpo:ORPOConfig",
        trainer="posttrain.trainers.orpo:ORPOTrainer",
        help="Fine-tune and learn preferences at once, without a reference (data with `chosen` and `rejected`). Any setting can follow: --orpo.beta=0.2",
    ),
    "cpo": Kind(
        title="CPO",
        section="cpo",
        config="posttrain.trainers.cpo:CPOConfig",
        trainer="posttrain.trainers.cpo:CPOTrainer",
        help="CPO and SimPO: preferences without a reference (data with `chosen` and `rejected`). Any setting can follow: --cpo.loss_type=simpo",
    ),
    "reward-model": Kind(
        title="a reward model",
        section="reward",
        config="posttrain.trainers.reward:RewardConfig",
        trainer="posttrain.trainers.reward:RewardTrainer",
        help="Train a reward model on preferences (data with `chosen` and `rejected`). Any setting can follow: --reward.learning_rate=1e-5",
    ),
    "ppo": Kind(
        title="PPO",
        section="ppo",
        config="posttrain.trainers.ppo:PPOConfig",
        trainer="posttrain.trainers.ppo:PPOTrainer",
        help="Train with PPO, values on the policy's backbone. Any setting can follow: --ppo.kl_coef=0.02",
        is_online=True,
    ),
    "rloo": Kind(
        title="RLOO",
        section="rloo",
        config="posttrain.trainers.rloo:RLOOConfig",
        trainer="posttrain.trainers.rloo:RLOOTrainer",
        help="Train with RLOO: each completion against the mean of its siblings. Any setting can follow: --rloo.beta=0.01",
        is_online=True,
    ),
}
