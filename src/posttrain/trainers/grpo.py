"""Group Relative Policy Optimisation (Shao et al. 2024, arXiv:2402.03300) and its relatives.

For each prompt draw G completions, score them, and call a completion's advantage its reward minus the group's mean (over the group's standard
deviation): no value model. Then raise the probability of what was better than its siblings, by a clipped step, held near a reference:

    loss = sum_it w_i * (-min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) + beta * KL_it),   r_it = p(token) / p_old(token)

The weights w_i are what distinguishes GRPO, DAPO, Dr. GRPO...; they are known before the forward, so no micro-batch waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.losses.advantages import advantages
from posttrain.losses.entropy import EntropyController, entropy_bonus, entropy_threshold, high_entropy_mask
from posttrain.losses.kl import k1_penalty
from posttrain.losses.policy import OBJECTIVES, Objective, PolicyOptions
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.core.config import as_config, refuse
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.grpo_config import GRPOConfig
from posttrain.trainers.online.environment import as_environment
from posttrain.trainers.online.rows import GenerationBatch, PolicyBatch, Row, Slice, gathered, rows_of
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.types import Completion, Group

__all__ = ["GRPOConfig", "GRPOTrainer"]

_REFUSED = {
    "rollout_func": "write an environment (env=, docs/environments.md), or an Engine (posttrain.types.Engine), instead of a rollout function",
}


class GRPOTrainer(OnlineTrainer):
    """`GRPOTrainer(model, reward_funcs, args, train_dataset).train()`. The dataset has a column `prompt`; rewards may ask for the others.

    model: a name, a directory or a transformers model. reward_funcs: functions `f(completions, **columns) -> list[float | None]`, functions of
    one `completion`, reward models, or a Rubric. tools: Python functions that the model may call; env: an `envs.Environment`, or what makes an `Env` of a task;
    environment_factory: a class whose methods are tools, as in TRL. Raises UserError for what cannot work, RewardError when a reward breaks.
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
        self.objective: Objective = OBJECTIVES[args.loss_type]
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
        self._entropy_of_step = [0.0, 0.0]  # sum over trained tokens and their count, of this process, since the last update
        self._window_rows: list[Row] = []  # of the update in progress, of this process, those without a gradient too
        self._threshold: torch.Tensor | None = None  # entropy above which the policy term of tokens is trained; None: of all
        self._undecided = 0  # tokens of the update in progress that reach it, over all processes

    @property
    def kl_in_reward(self) -> bool:
        return self.args.kl_estimator == "k1_in_reward"

    # A rollout becomes rows

    def learn_from(self, groups: list[tuple[int, Group]]) -> GenerationBatch:
        mask_truncated = self.args.mask_truncated_completions
        rows = rows_of(groups, lambda completion: not (mask_truncated and completion.is_truncated))
        self.freeze(rows, old=not self.args.on_policy or (self.kl_in_reward and self.reference is not None))
        lengths = self._compare(groups, rows)
        if self.args.on_policy:
            for row in rows:
                row.old_logps = None  # one update per rollout: the new ones, detached, so the ratio is exactly 1
        self.record.groups(self.state.global_step + 1, groups, rows, self.tokenizer.decode, self.args.device)
        return GenerationBatch(rows, lengths, slices=self.args.steps_per_generation)  # type: ignore[arg-type]

    def _compare(self, groups: list[tuple[int, Group]], rows: list[Row]) -> list[list[int]]:
        """Set every row's advantage, from the scores of all processes; return all groups' trained lengths."""
        names, weights = list(self.rubric.names), list(self.rubric.weights)
        scores = {(number, i): _scores_of(completion, names) for number, group in groups for i, completion in enumerate(group.completions)}
        if self.kl_in_reward and self.args.beta:
            weights.append(-self.args.beta)  # one more reward, so that the penalty is inside the group's baseline
            for row in rows:
                given = scores[row.group, row.index]
                given.append(None if all(score is None for score in given) else _k1_of(row))  # a penalty alone is no score
        everyone, places, lengths = gathered(rows, [scores[row.group, row.index] for row in rows], self.args.device)
        compared = advantages(
            everyone,
            [len(group) for group in lengths],
            weights=weights,
            scale_rewards=self.args.scale_rewards,
            aggregation=self.args.multi_objective_aggregation,  # type: ignore[arg-type]
        )
        by_row = dict(zip(places, compared.advantages.tolist(), strict=True))
        for row in rows:
            row.advantage = by_row[row.group, row.index]
        return lengths

    # An update's normaliser

    def row_weights(self, chosen: list[Slice]) -> list[tuple[Row, float]]:
        """A row whose gradient is exactly 0 is left out of the forward, never out of the counts."""
        weighted = super().row_weights(chosen)
        self._window_rows = [row for row, _ in weighted]
        if self._every_row_has_a_gradient:
            return weighted
        return [(row, weight) for row, weight in weighted if row.advantage != 0.0]

    @property
    def _every_row_has_a_gradient(self) -> bool:
        return (self.args.beta != 0 and not self.kl_in_reward) or self.args.entropy_coef != 0 or self.args.use_adaptive_entropy

    def window(self, micro_steps: list[Any]) -> list[MicroBatch]:
        self._between_updates()
        batches = super().window(micro_steps)
        self._threshold, self._undecided = None, self.num_tokens
        if self.args.top_entropy_quantile < 1:
            entropies = self._entropies()
            self._threshold = entropy_threshold(entropies, self.args.top_entropy_quantile)
            self._undecided = int((entropies >= self._threshold).sum())
        return batches

    def _between_updates(self) -> None:
        """Once per optimizer step the entropy coefficient moves, and is noted."""
        parts = gather_json(self._entropy_of_step, self.args.device)
        total, count = (sum(part[i] for part in parts) for i in (0, 1))
        self._entropy_of_step = [0.0, 0.0]
        if count:
            self.entropy.update(total / count)
        if self.args.use_adaptive_entropy or self.entropy.coef:
            self.metrics.note("entropy_coef", self.entropy.coef)

    def _entropies(self) -> torch.Tensor:
        """(N,) of all trained tokens of the update, on all processes (TRL: of a micro-batch)."""
        values: list[float] = []
        with self.frozen(self.model_wrapped) as module:
            for batch in self.micro_batches(self._window_rows, [0.0] * len(self._window_rows)):
                entropy = self.logprobs(module, batch.stream, self.sampling.temperature).entropy
                values += entropy[batch.mask].tolist()
        everyone = [value for part in gather_json(values, self.args.device) for value in part]
        return torch.tensor(everyone, device=self.args.device)

    # The loss

    def loss(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        bonus = bool(self.entropy.current)
        expected = self.expected_policy_grad(batch) if self._threshold is None and not bonus else None
        answer = self.logprobs(model, batch.stream, self.sampling.temperature, entropy_grad=bonus, expected_grad=expected)
        logps, entropy = answer.logps, answer.entropy  # (B, T) each; never (B, T, V)
        undecided = None if self._threshold is None else high_entropy_mask(entropy, batch.mask, self._threshold)  # (B, T)
        terms = self.terms(batch, logps, undecided)
        loss = self.share_of(batch, terms.per_token)
        mask = batch.mask if undecided is None else undecided
        if bonus:
            loss = loss + entropy_bonus(entropy, mask, coef=self.entropy.current, num_tokens=self._undecided) * self.args.world_size
        self.note_update(batch, logps, entropy, terms)
        if self.args.use_adaptive_entropy:
            total, count = self._entropy_of_step
            self._entropy_of_step = [total + float((entropy.detach() * mask).sum()), count + float(mask.sum())]
        return loss

    def notes(self) -> Callable[[], None]:
        before, take_back = self._entropy_of_step, super().notes()

        def take_all_back() -> None:
            self._entropy_of_step = before
            take_back()

        return take_all_back

    # Resuming

    def state_to_resume(self) -> dict[str, Any]:
        return super().state_to_resume() | {"entropy": self.entropy.state_dict(), "entropy_of_step": self._entropy_of_step}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        super().load_state_to_resume(state)
        self.entropy.load_state_dict(state["entropy"])
        self._entropy_of_step = state["entropy_of_step"]


def _scores_of(completion: Completion, names: list[str]) -> list[float | None]:
    """None throughout where a reward broke: a total without its part would not compare with the others of the group."""
    return [completion.scores[name] if completion.reward is not None else None for name in names]


def _k1_of(row: Row) -> float:
    """The completion's summed log-ratio to the reference, under the policy that sampled it."""
    old, ref, mask = (torch.tensor([values]) for values in (row.old_logps, row.ref_logps, row.trained))
    return float(k1_penalty(old, ref, mask))
