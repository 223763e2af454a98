"""PPO's settings, under the names of TRL's PPOConfig. What is sampled stands in online_config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain.errors import UserError
from posttrain.trainers.core.config import setting, settings
from posttrain.trainers.online.config import OnlineConfig

_ENDS = "every end-of-sequence token of the model ends a completion; add others with generation_kwargs={'stop_token_ids': [...]}"
_DERIVED = "it follows from per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches; leave it out"
_ADAPTER = "the reference is the model without its adapter; leave it out"


@settings
@dataclass
class PPOConfig(OnlineConfig):
    """A rollout has per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches completions on each device; every mini-batch
    is one optimizer step, num_ppo_epochs times."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = {
        **OnlineConfig.refused,
        "response_length": (None, "it is called max_completion_length here, as in the other trainers"),
        "stop_token": (None, _ENDS),
        "stop_token_id": (None, _ENDS),
        "total_episodes": (None, "set max_steps or num_train_epochs, as in the other trainers"),
        "local_rollout_forward_batch_size": (64, "max_tokens_per_micro_batch says how much goes through the model at once; leave it out"),
        "num_sample_generations": (10, "every completion is in the record; log_completions prints some"),
        "reward_model_path": (None, "give the directory as reward_model to PPOTrainer, or in a recipe as an entry of the rubric"),
        "sft_model_path": (None, "give the directory as model to PPOTrainer"),
        "exp_name": (None, "name the run with output_dir"),
        "model_adapter_name": (None, _ADAPTER),
        "ref_adapter_name": (None, _ADAPTER),
        "batch_size": (None, _DERIVED),
        "local_batch_size": (None, _DERIVED),
        "mini_batch_size": (None, _DERIVED),
        "local_mini_batch_size": (None, _DERIVED),
        "micro_batch_size": (None, _DERIVED),
        "num_total_batches": (None, _DERIVED),
    }
    lowest: ClassVar[dict[str, float]] = {
        **{"num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0, "cliprange": 0, "cliprange_value": 0, "vf_coef": 0},
        **OnlineConfig.lowest,
    }
    fewest_generations = 1
    why_so_many = "a prompt needs a completion"

    learning_rate: float = setting(3e-6, "AdamW's learning rate.")
    value_learning_rate: float | None = setting(
        None,
        "That of the value head or model. Default: learning_rate, which is slow for a new head: it has to reach the size of the returns. A hundred "
        "times learning_rate suits a head.",
    )
    num_generations: int = setting(1, "G, the completions drawn for each prompt. 1 is usual: the value model is the baseline.")
    temperature: float = setting(0.7, "Divides the logits in sampling and in training.")
    num_ppo_epochs: int = setting(4, "How often a rollout is trained on.")
    num_mini_batches: int = setting(1, "Optimizer steps that one pass over a rollout is divided into.")
    value_model_path: str | None = setting(
        None, "A model of its own for the values: a reward model or language model by name or directory. Default: a head on the policy's backbone."
    )
    kl_coef: float = setting(0.05, "What a nat of log-ratio to the reference costs at each token, in reward. 0 needs no reference.")
    kl_estimator: str = setting("k1", "'k1': log p - log ref, unbiased. 'k3': exp(log ref - log p) - 1 + (log p - log ref), never negative.")
    cliprange: float = setting(0.2, "Clip of a token's ratio on both sides.")
    cliprange_value: float = setting(0.2, "How far a value may move from the frozen one before its loss stops helping.")
    vf_coef: float = setting(0.1, "Weight of the value loss.")
    gamma: float = setting(1.0, "Discount per token.")
    lam: float = setting(0.95, "GAE's lambda: 1 is the whole return against the value, 0 one token against the next value.")
    whiten_rewards: bool = setting(False, "Divide the rewards of tokens by their standard deviation over the rollout.")
    missing_eos_penalty: float | None = setting(None, "Taken from the score of a completion that was cut.")
    bootstrap_truncated: bool = setting(
        True, "After a completion that was cut, count the value of what would have come. Off: being cut is an end like any other, as in TRL."
    )

    @property
    def holds_reference(self) -> bool:
        return bool(self.kl_coef)

    def __post_init__(self) -> None:
        if self.num_iterations not in (1, self.num_ppo_epochs):
            raise UserError("num_iterations is called num_ppo_epochs in PPO; set only that")
        self.num_iterations = self.num_ppo_epochs
        self._resolve_mini_batches()
        super().__post_init__()
        if self.kl_estimator not in ("k1", "k3"):
            raise UserError(f"kl_estimator={self.kl_estimator!r}: use 'k1' or 'k3'")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: it lies between 0 and 1")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise UserError(f"missing_eos_penalty={self.missing_eos_penalty}: it is taken from the score, so give a positive number")
        if self.zero_signal_groups != "keep":
            raise UserError(
                f"zero_signal_groups={self.zero_signal_groups!r}: PPO compares a completion with its value, not with its siblings; leave it at 'keep'"
            )
        if self.sync_ref_model and not self.kl_coef:
            raise UserError("sync_ref_model moves a reference, but kl_coef=0.0 uses none; set kl_coef, or leave sync_ref_model out")

    def _resolve_mini_batches(self) -> None:
        steps = self.gradient_accumulation_steps * self.num_mini_batches
        if self.steps_per_generation not in (None, steps):
            raise UserError(
                f"steps_per_generation={self.steps_per_generation}, but gradient_accumulation_steps x num_mini_batches = {steps}; set num_mini_batches only"
            )
        self.steps_per_generation = steps
