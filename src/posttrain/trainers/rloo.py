"""REINFORCE Leave-One-Out (Ahmadian et al. 2024, arXiv:2402.14740). GRPO's neighbour: the baseline is the mean of a
completion's siblings without itself, which leaves the policy gradient unbiased, and the distance to the reference is a
part of the reward.

    R_i = reward_i - beta * sum_t (log p_old - log p_ref)        A_i = R_i - mean of R_j over the other completions j of the group
    loss = mean over i of -min(r_i A_i, clip(r_i, 1 - eps, 1 + eps) A_i),   r_i = p(completion i) / p_old(completion i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.errors import UserError
from posttrain.losses.kl import k1_penalty
from posttrain.losses.policy import RLOO, PolicyOptions
from posttrain.losses.rloo import leave_one_out
from posttrain.trainers.core.config import as_config, refuse, setting, settings
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.environment import as_environment
from posttrain.trainers.online.rows import PolicyBatch, Row
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.types import Completion

_REFUSED = {
    "rollout_func": "write an environment (env=), or an Engine (posttrain.types.Engine), instead of a rollout function",
}


@settings
@dataclass
class RLOOConfig(OnlineConfig):
    """Names and defaults are TRL's where the concept is the same."""

    why_so_many = "a completion's baseline is the mean of its siblings"

    learning_rate: float = setting(1e-6, "AdamW's learning rate.")
    num_generations: int = setting(2, "G, the completions drawn for each prompt. At least 2: the others are a completion's baseline.")
    beta: float = setting(0.05, "What a nat of the completion's log-ratio to the reference costs, in reward. 0 needs no reference.")
    epsilon: float = setting(0.2, "Lower clip of a completion's ratio, and the upper one unless epsilon_high is set.")
    epsilon_high: float | None = setting(None, "Upper clip.")
    normalize_advantages: bool = setting(False, "Standardise advantages over the whole rollout.")
    reward_clip_range: list[float] | None = setting(None, "[low, high]: rewards are clamped to it, before the reference's part.")
    mask_truncated_completions: bool = setting(
        False, "Completions truncated at max_completion_length teach nothing; they stay in their siblings' baseline."
    )

    @property
    def holds_reference(self) -> bool:
        return bool(self.beta)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise UserError(f"beta={self.beta}: a negative price would push the policy away from its reference; set it to 0 or more")
        if self.reward_clip_range is not None:
            if not isinstance(self.reward_clip_range, (list, tuple)) or len(self.reward_clip_range) != 2:
                raise UserError(f"reward_clip_range={self.reward_clip_range!r}: give two numbers, the lowest and the highest reward")
            low, high = self.reward_clip_range
            if not low < high:
                raise UserError(f"reward_clip_range={self.reward_clip_range!r}: the first number must be below the second")
        if self.sync_ref_model and not self.beta:
            raise UserError("sync_ref_model moves a reference, but beta=0.0 uses none; set beta, or leave sync_ref_model out")


class RLOOTrainer(OnlineTrainer):
    """`RLOOTrainer(model, reward_funcs, args, train_dataset).train()`: data, rewards and environments as for
    GRPOTrainer."""

    args: RLOOConfig
    objective = RLOO

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        env: Any = None,
    ) -> None:
        refuse(_REFUSED, locals())
        super().__init__(
            model,
            reward_funcs,
            as_config(args, RLOOConfig),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
            environment=as_environment(env, tools, environment_factory),
        )
        self.options = PolicyOptions(epsilon=self.args.epsilon, epsilon_high=self.args.epsilon_high, kl_estimator="k1")
        self.use_reference(needed=self.args.beta != 0)

    def is_trained(self, completion: Completion) -> bool:
        return not (self.args.mask_truncated_completions and completion.is_truncated)

    @property
    def needs_old_logps(self) -> bool:
        return self.reference is not None

    def scores(self, completions: list[Completion], rows: list[Row]) -> list[float | None]:
        given = [completion.reward for completion in completions]
        return [None if reward is None else self._clamped(reward) - self._distance(row) for reward, row in zip(given, rows, strict=True)]

    def advantages(self, scores: list[float | None], sizes: list[int]) -> torch.Tensor:
        table = torch.tensor([torch.nan if reward is None else reward for reward in scores], dtype=torch.float64)
        return leave_one_out(table, sizes, normalize=self.args.normalize_advantages)

    def _clamped(self, reward: float) -> float:
        if self.args.reward_clip_range is None:
            return reward
        low, high = self.args.reward_clip_range
        return min(max(reward, low), high)

    def _distance(self, row: Row) -> float:
        """What the log-ratio of the completion's trained tokens to the reference costs."""
        if self.reference is None:
            return 0.0
        old, ref, mask = (torch.tensor([values], dtype=torch.float64) for values in (row.old_logps, row.ref_logps, row.trained))
        return self.args.beta * float(k1_penalty(old, ref, mask))

    def has_gradient(self, row: Row) -> bool:
        return row.advantage != 0.0

    def loss(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        expected = self.known_policy_grad(batch)
        logps, entropy = self.logprobs(model, batch.stream, self.sampling.temperature, known_grad=expected)[:2]  # (B, T)
        terms = self.terms(batch, logps)
        self.note_update(batch, logps, entropy, terms)
        return self.weighted_sum(batch, terms.per_token)
