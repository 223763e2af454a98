"""Group Relative Policy Optimisation (Shao et al. 2024, arXiv:2402.03300) and its relatives.

For each prompt draw G completions, score them, and call a completion's advantage its reward minus the group's mean
(over the group's standard deviation): no value model. Then raise the probability of what was better than its siblings,
by a clipped step, held near a reference:

    loss = sum_it w_i * (-min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) + beta * KL_it),   r_it = p(token) / p_old(token)

The weights w_i are what distinguishes GRPO, DAPO, Dr. GRPO...; they are known before the forward, so no micro-batch
waits for another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.errors import UserError
from posttrain.losses.advantages import advantages
from posttrain.losses.entropy import EntropyController, entropy_bonus, entropy_threshold, high_entropy_mask
from posttrain.losses.kl import k1_penalty
from posttrain.losses.policy import OBJECTIVES, Objective, PolicyOptions, find_objective
from posttrain.losses.surrogates import capped, clipped
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.core.config import as_config, refuse, setting, settings
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.environment import as_environment
from posttrain.trainers.online.rows import PolicyBatch, PolicyUpdate, Row
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.types import Completion

logger = logging.getLogger(__name__)

_REFUSED = {
    "rollout_func": "write an environment (env=, docs/environments.md), or an Engine (posttrain.types.Engine), instead of a rollout function",
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "kl_estimator": ("k3", "k2", "k1_in_reward"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


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
    mask_truncated_completions: bool = setting(False, "Completions truncated at max_completion_length teach nothing and leave the token counts.")
    top_entropy_quantile: float = setting(
        1.0, "Train the policy term on this fraction of tokens, those with the highest entropy, over the whole window. 1.0 is all."
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
        if objective.per_sequence and self.importance_sampling_level == "token":
            raise UserError(
                f"loss_type={self.loss_type!r} means importance_sampling_level='sequence'; leave the level out, or use loss_type='grpo' for token ratios"
            )
        if objective.surrogate is not clipped and self.delta is not None:
            raise UserError(f"delta has no meaning for loss_type={self.loss_type!r}, which does not clip that way; leave it out")
        if objective.surrogate is capped and self.epsilon_high is None:
            logger.warning(
                "loss_type=%r without epsilon_high: weights are capped at epsilon=%g, as in TRL; 5.0 is usual", self.loss_type, self.epsilon
            )
        if not 0 < self.top_entropy_quantile <= 1:
            raise UserError(f"top_entropy_quantile={self.top_entropy_quantile}: a fraction of tokens, above 0 and at most 1")
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


class GRPOTrainer(OnlineTrainer):
    """`GRPOTrainer(model, reward_funcs, args, train_dataset).train()`. The dataset has a column `prompt`; rewards may
    ask for the others.

    model: a name, a directory or a transformers model. reward_funcs: functions `f(completions, **columns) -> list[float
    | None]`, functions of one `completion`, reward models, or a Rubric. tools: Python functions that the model may
    call; env: an `envs.Environment`, or what makes an `Env` of a task; environment_factory: a class whose methods are
    tools, as in TRL. Raises UserError for what cannot work, RewardError when a reward breaks.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        env: Any = None,
    ) -> None:
        refuse(_REFUSED, locals())
        super().__init__(
            model,
            reward_funcs,
            as_config(args, GRPOConfig),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
            environment=as_environment(env, tools, environment_factory),
            reward_processing_classes=reward_processing_classes,
        )
        args = self.args
        self.objective: Objective = find_objective(args.loss_type)
        self.options = PolicyOptions(
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            delta=args.delta,
            importance_sampling_level=args.importance_sampling_level,  # type: ignore[arg-type]
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
            beta=args.beta,
            kl_estimator="k1" if self.kl_in_reward else args.kl_estimator,  # type: ignore[arg-type]
            use_bias_correction_kl=args.use_bias_correction_kl,
            off_policy_mask_threshold=args.off_policy_mask_threshold,
        )
        self.use_reference(needed=args.beta != 0)
        self.entropy = EntropyController(
            coef=args.entropy_coef,
            adaptive=args.use_adaptive_entropy,
            minimum=args.entropy_coef_min,
            maximum=args.entropy_coef_max,
            delta=args.entropy_coef_delta,
            target=args.entropy_target,
        )

    @property
    def kl_in_reward(self) -> bool:
        return self.args.kl_estimator == "k1_in_reward"

    # Advantages

    def is_trained(self, completion: Completion) -> bool:
        return not (self.args.mask_truncated_completions and completion.is_truncated)

    @property
    def needs_old_logps(self) -> bool:
        return self.kl_in_reward and self.reference is not None

    def scores(self, completions: list[Completion], rows: list[Row]) -> list[list[float | None]]:
        """With the KL in the reward as one more score, so that it is inside the group's baseline; a KL alone is no
        score."""
        assert self.rubric is not None
        given = [_scores_of(completion, self.rubric.names) for completion in completions]
        if not (self.kl_in_reward and self.args.beta):
            return given
        return [[*scores, None if all(score is None for score in scores) else _k1_of(row)] for scores, row in zip(given, rows, strict=True)]

    def advantages(self, scores: list[list[float | None]], sizes: list[int]) -> torch.Tensor:
        assert self.rubric is not None
        return advantages(
            scores,
            sizes,
            weights=[*self.rubric.weights, *([-self.args.beta] if self.kl_in_reward and self.args.beta else [])],
            scale_rewards=self.args.scale_rewards,
            aggregation=self.args.multi_objective_aggregation,  # type: ignore[arg-type]
        ).advantages

    # An update

    def window(self, micro_steps: list[Any]) -> list[MicroBatch]:
        self.entropy.step(gather_json(self.entropy.seen, self.args.device))
        if self.args.use_adaptive_entropy or self.entropy.coef:
            self.metrics.note("entropy_coef", self.entropy.coef)
        return super().window(micro_steps)

    def has_gradient(self, row: Row) -> bool:
        by_kl = self.args.beta != 0 and not self.kl_in_reward
        return by_kl or self.args.entropy_coef != 0 or self.args.use_adaptive_entropy or row.advantage != 0.0

    def describe_update(self, rows: list[Row], num_tokens: int) -> PolicyUpdate:
        """With `top_entropy_quantile`: which entropy is high, over all trained tokens of the update (TRL: of a
        micro-batch)."""
        if self.args.top_entropy_quantile == 1:
            return PolicyUpdate(num_tokens, None, num_tokens)
        mine: list[float] = []
        with self.evaluating(self.model_wrapped) as module:
            for batch in self.micro_batches(rows):
                entropy = self.logprobs(module, batch.stream, self.sampling.temperature).entropy
                mine += entropy[batch.mask].tolist()
        entropies = torch.tensor([value for part in gather_json(mine, self.args.device) for value in part], device=self.args.device)
        threshold = entropy_threshold(entropies, self.args.top_entropy_quantile)
        return PolicyUpdate(num_tokens, threshold, int((entropies >= threshold).sum()))

    # The loss

    def loss(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        update, bonus = batch.update, bool(self.entropy.current)
        assert update is not None
        threshold = update.entropy_threshold
        expected = self.known_policy_grad(batch) if threshold is None and not bonus else None
        answer = self.logprobs(model, batch.stream, self.sampling.temperature, entropy_grad=bonus, known_grad=expected)
        logps, entropy = answer.logps, answer.entropy  # (B, T) each; never (B, T, V)
        policy_mask = None if threshold is None else high_entropy_mask(entropy, batch.mask, threshold)  # (B, T)
        terms = self.terms(batch, logps, policy_mask)
        loss = self.weighted_sum(batch, terms.per_token)
        mask = batch.mask if policy_mask is None else policy_mask
        if bonus:
            loss = loss + entropy_bonus(entropy, mask, coef=self.entropy.current, num_tokens=update.num_policy_tokens) * self.args.world_size
        self.note_update(batch, logps, entropy, terms)
        if self.args.use_adaptive_entropy:
            self.entropy.see(entropy, mask)
        return loss

    def rollback_point(self) -> Callable[[], None]:
        seen, rollback = self.entropy.seen, super().rollback_point()

        def rollback_all() -> None:
            self.entropy.seen = seen
            rollback()

        return rollback_all

    # Resuming

    def state_to_resume(self) -> dict[str, Any]:
        return super().state_to_resume() | {"entropy": self.entropy.state_dict()}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        super().load_state_to_resume(state)
        older = {"seen": state["entropy_of_step"]} if "entropy_of_step" in state else {}  # where it stood once
        self.entropy.load_state_dict(older | state["entropy"])


def _scores_of(completion: Completion, names: list[str]) -> list[float | None]:
    """None throughout where a reward broke: a total without its part would not compare with the others of the group."""
    return [completion.scores[name] if completion.reward is not None else None for name in names]


def _k1_of(row: Row) -> float:
    """The completion's summed log-ratio to the reference, under the policy that sampled it."""
    old, ref, mask = (torch.tensor([values]) for values in (row.old_logps, row.ref_logps, row.trained))
    return float(k1_penalty(old, ref, mask))
