"""GRPO's settings: the objective. What is sampled and how batches are counted stands in online_config.py."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from posttrain.errors import UserError
from posttrain.losses.policy import OBJECTIVES, find_objective
from posttrain.trainers.core.config import setting, settings
from posttrain.trainers.online.config import OnlineConfig

logger = logging.getLogger(__name__)


@settings
@dataclass
class GRPOConfig(OnlineConfig):
    """Names and defaults are TRL's where the concept is the same."""

    learning_rate: float = setting(1e-6, "AdamW's learning rate.")
    loss_type: str = setting("dapo", f"Which objective: {', '.join(OBJECTIVES)}. How each is normalised stands in posttrain.losses.reductions.")
    beta: float = setting(0.0, "Weight of the KL against the reference (adapter off, or a frozen copy). 0 needs no reference; the recipes use 0.04.")
    kl_estimator: str = setting(
        "k3",
        "'k3': the paper's, exp(ref - new) - (ref - new) - 1; with use_bias_correction_kl, on-policy, its gradient is the reverse KL's, without it the "
        "forward KL's. 'k2': half the squared log-ratio, the reverse KL's gradient per token. 'k1_in_reward': beta * sum(log new - log ref) leaves the "
        "reward before advantages are taken, the reverse KL of whole completions.",
    )
    use_bias_correction_kl: bool = setting(True, "Multiply the KL by the importance ratio (DeepSeek-V3.2), which makes it unbiased off-policy.")
    epsilon: float = setting(0.2, "Lower clip of the ratio, and the upper one unless epsilon_high is set.")
    epsilon_high: float | None = setting(None, "Upper clip (DAPO recommends 0.28). For cispo the absolute cap of the weight (5.0, say).")
    delta: float | None = setting(None, "Two-sided clipping: the ratio is capped at delta also where the advantage is negative (INTELLECT-2).")
    importance_sampling_level: str | None = setting(None, "'token' or 'sequence' (GSPO). Default: what the loss type says.")
    sapo_temperature_neg: float = setting(1.05, "SAPO's gate temperature for negative advantages.")
    sapo_temperature_pos: float = setting(1.0, "SAPO's gate temperature for positive advantages.")
    vespo_k_pos: float = setting(2.0, "VESPO's power of the sequence weight, positive advantages.")
    vespo_lambda_pos: float = setting(3.0, "VESPO's decay of the sequence weight, positive advantages.")
    vespo_k_neg: float = setting(3.0, "VESPO's power of the sequence weight, negative advantages.")
    vespo_lambda_neg: float = setting(2.0, "VESPO's decay of the sequence weight, negative advantages.")
    off_policy_mask_threshold: float | None = setting(
        None, "Drop the policy term of a completion with negative advantage whose mean log-ratio to its sampler exceeds this (DeepSeek-V3.2)."
    )
    scale_rewards: Any = setting("group", "Divide advantages by the standard deviation of the 'group', the 'batch', or 'none' (Dr. GRPO).")
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", "Or 'normalize_then_sum': each reward is normalised within its group first (GDPO)."
    )
    mask_truncated_completions: bool = setting(False, "Completions cut at max_completion_length teach nothing and leave the token counts.")
    top_entropy_quantile: float = setting(
        1.0, "Train the policy term on this share of tokens with the highest entropy, over the whole window. 1.0 is all."
    )
    entropy_coef: float = setting(
        0.0, "Weight of an entropy bonus, for every loss type a mean over the tokens whose policy term is trained (top_entropy_quantile)."
    )
    use_adaptive_entropy: bool = setting(False, "Let the coefficient rise while entropy is below entropy_target and fall above it.")
    entropy_coef_min: float = setting(0.0, "Lower bound of the adaptive coefficient.")
    entropy_coef_max: float = setting(1.0, "Upper bound of the adaptive coefficient.")
    entropy_coef_delta: float = setting(0.005, "How far the adaptive coefficient moves per optimizer step.")
    entropy_target: float = setting(0.2, "Entropy in nats per token that the adaptive coefficient aims for.")

    @property
    def holds_reference(self) -> bool:
        return bool(self.beta)

    @property
    def knows_gradient(self) -> bool:
        kl_in_loss = self.beta != 0 and self.kl_estimator != "k1_in_reward"
        by_entropy = self.entropy_coef != 0 or self.use_adaptive_entropy or self.top_entropy_quantile < 1
        return super().knows_gradient and not kl_in_loss and not by_entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        objective = find_objective(self.loss_type)
        if self.importance_sampling_level is None:
            self.importance_sampling_level = "sequence" if objective.per_sequence else "token"
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
        if self.loss_type == "gspo" and self.importance_sampling_level == "token":
            raise UserError(
                "loss_type='gspo' means importance_sampling_level='sequence'; leave the level out, or use loss_type='grpo' for token ratios"
            )
        if self.loss_type in ("sapo", "vespo", "cispo") and self.delta is not None:
            raise UserError(f"delta has no meaning for loss_type={self.loss_type!r}, which does not clip that way; leave it out")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            logger.warning("loss_type='cispo' without epsilon_high: weights are capped at epsilon=%g, as in TRL; 5.0 is usual", self.epsilon)
        if not 0 < self.top_entropy_quantile <= 1:
            raise UserError(f"top_entropy_quantile={self.top_entropy_quantile}: a share of tokens, above 0 and at most 1")
        if self.use_adaptive_entropy and not self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max:
            raise UserError(
                f"entropy_coef={self.entropy_coef} must lie between entropy_coef_min={self.entropy_coef_min} and entropy_coef_max={self.entropy_coef_max}"
            )
        if self.beta < 0:
            raise UserError(f"beta={self.beta}: a negative weight would push the policy away from its reference; set it to 0 or more")
        if self.kl_estimator == "k1_in_reward" and self.multi_objective_aggregation == "normalize_then_sum":
            raise UserError(
                "kl_estimator='k1_in_reward' makes the KL one of the rewards, and multi_objective_aggregation='normalize_then_sum' would divide it by "
                "its own deviation, so that beta means nothing; use 'k2' or 'k3', or 'sum_then_normalize'"
            )
        if self.sync_ref_model and not self.beta:
            raise UserError("sync_ref_model moves a reference, but beta=0.0 uses none; set beta, or leave sync_ref_model out")


_CHOICES: dict[str, tuple[str, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "kl_estimator": ("k3", "k2", "k1_in_reward"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
