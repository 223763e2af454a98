"""Proximal Policy Optimisation (Schulman et al. 2017; for language models Ouyang et al. 2022). A value model predicts, before each token, what the
completion will still earn; a token's advantage is by how much it turned out better (GAE).

    r_t = -kl_coef * KL_t, and the score at the last token            A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})
    loss = mean over tokens of -min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t) + vf_coef * 1/2 max((V_t - R_t)^2, (V_t held near its old value - R_t)^2)

The values are a head on the policy's own backbone, computed in the same forward, or a model of their own. A completion that was cut is
followed by the value of what would have come; one that ended is followed by nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_tensors_into
from safetensors.torch import save_model as save_tensors_of
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.stream import PackItem, Stream, pack
from posttrain.errors import UserError
from posttrain.losses.kl import KL_ESTIMATORS
from posttrain.losses.policy import PPO, PolicyOptions
from posttrain.losses.value import Moments, generalised_advantages, sums, token_rewards, value_loss, whitened
from posttrain.models.forward import StreamLogprobs
from posttrain.models.head import base_model
from posttrain.models.heads import VALUE_HEAD, add_value_head, load_reward_model, make_scores, reward_model, without_submodule
from posttrain.models.precision import make_trainable
from posttrain.rewards import Rubric
from posttrain.trainers.core.config import as_config, refuse
from posttrain.trainers.core.fingerprint import Fingerprint, of_weights
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.environment import as_environment
from posttrain.trainers.online.rows import GenerationBatch, PolicyBatch, Row, gathered, rows_of
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.trainers.ppo_config import PPOConfig
from posttrain.types import Completion, Group

__all__ = ["PPOConfig", "PPOTrainer"]

VALUES = "value.safetensors"  # within a checkpoint: the value head or model
_REFUSED = {
    "ref_model": "the reference is the model as it is when training starts (its adapters off, or a frozen copy); leave it out",
    "data_collator": "streams are packed without padding; leave it out",
}


class PPOTrainer(OnlineTrainer):
    """`PPOTrainer(model, reward_funcs, args, train_dataset).train()`: data, rewards and environments as for GRPOTrainer.

    reward_model: a trained reward model (a directory, or a classifier with one label), beside reward_funcs or instead of them.
    value_model: a model of its own for the values (a causal model or a classifier; its name or itself). None: a head on the policy.
    """

    args: PPOConfig
    objective = PPO

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        reward_model: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        ref_model: Any = None,
        data_collator: Any = None,
        quantization_config: Any = None,
        tools: Any = None,
        environment_factory: Any = None,
        env: Any = None,
    ) -> None:
        refuse(_REFUSED, locals())
        if value_model is not None and value_model is reward_model:
            raise UserError("value_model is the very reward_model, which would be trained away; give a copy of it (its directory, say)")
        super().__init__(
            model,
            _with_reward_model(reward_funcs, reward_model),
            as_config(args, PPOConfig),
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
        self.options = PolicyOptions(epsilon=self.args.cliprange, kl_estimator=self.args.kl_estimator)  # type: ignore[arg-type]
        self.use_reference(needed=self.args.kl_coef != 0)
        self._add_values(value_model if value_model is not None else self.args.value_model_path)

    # Values

    def _add_values(self, value_model: str | PreTrainedModel | None) -> None:
        """The value head or model lives inside the policy, so that it is optimised, moved and wrapped with it."""
        if value_model is None:
            self.values: nn.Module = add_value_head(self.model)
            self._value_scores = None
        else:
            loading = self.args.loading(value_model) | {"dtype": "float32"} if isinstance(value_model, str) else {}  # it is trained, all of it
            made = load_reward_model(value_model, **loading) if isinstance(value_model, str) else reward_model(value_model, seed=self.args.seed)
            make_trainable(made)
            self._value_scores = make_scores(made)
            self.values = made.to(self.args.device)  # type: ignore[arg-type]
            base_model(self.model).add_module(VALUE_HEAD, made)

    def starting_weights(self) -> dict[str, Fingerprint]:
        with without_submodule(self.model, VALUE_HEAD):
            return super().starting_weights() | {"value_weights": of_weights(self.values)}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As transformers makes it; the values in groups of their own where they have their own learning rate."""
        is_made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_made and self.args.value_learning_rate is not None:
            values = {id(parameter) for parameter in self.values.parameters()}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in values]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in values]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": self.args.value_learning_rate})
        return optimizer

    def answer(self, model: nn.Module, stream: Stream, **wanted: Any) -> StreamLogprobs:
        """Log-probs and values; of a shared backbone both come from one forward."""
        if self._value_scores is None:
            return self.logprobs(model, stream, self.sampling.temperature, scorer=self.values, **wanted)
        answer = self.logprobs(model, stream, self.sampling.temperature, **wanted)
        with self.accelerator.autocast():
            scores = self._value_scores(self.values, stream)
        return answer._replace(values=scores.states, last_values=scores.last)

    def _freeze_policy(self, rows: list[Row]) -> list[float]:
        """Old log-probs and values into the rows; returns the value of the state after each row's last token."""
        last: dict[tuple[int, int], float] = {}
        with self.frozen(self.model_wrapped) as module:
            for batch in self.micro_batches(rows, [0.0] * len(rows)):
                answer = self.answer(module, batch.stream)
                assert answer.values is not None
                assert answer.last_values is not None
                columns = (answer.logps.tolist(), answer.values.tolist(), answer.last_values.tolist())
                for row, logps, values, final in zip(batch.rows, *columns, strict=True):
                    row.old_logps, row.old_values = logps[: len(row.token_ids)], values[: len(row.token_ids)]
                    last[row.group, row.index] = final
        return [last[row.group, row.index] for row in rows]

    # A rollout becomes rows

    def learn_from(self, groups: list[tuple[int, Group]]) -> GenerationBatch:
        completions = [completion for _, group in groups for completion in group.completions]
        rows = rows_of(groups, lambda completion: completion.reward is not None)
        with self.metrics.timed("time/freeze"):
            self.freeze(rows, old=False)
            last_values = self._freeze_policy(rows)
        self._credit(rows, completions, last_values)
        _, _, lengths = gathered(rows, [None] * len(rows), self.args.device)
        if self.args.on_policy:
            for row in rows:
                row.old_logps = None  # one update per rollout: the new ones, detached, so the ratio is exactly 1
        self.record.groups(self.state.global_step + 1, groups, rows, self.tokenizer.decode, self.args.device)
        return GenerationBatch(rows, lengths, slices=self.args.steps_per_generation)  # type: ignore[arg-type]

    def _credit(self, rows: list[Row], completions: list[Completion], last_values: list[float]) -> None:
        """Advantages and returns of every token. float64; what is whitened is whitened over all processes."""
        args = self.args
        T = max((len(row.token_ids) for row in rows), default=0)
        mask = _table([row.trained for row in rows], T).bool()  # (B, T)
        values = _table([row.old_values or [] for row in rows], T)
        scores = torch.tensor([self._score_of(completion) for completion in completions], dtype=torch.float64)  # (B,)
        final = torch.tensor(last_values, dtype=torch.float64)
        goes_on = torch.tensor([args.bootstrap_truncated and completion.is_truncated for completion in completions], dtype=torch.bool)
        kl = torch.zeros_like(values)
        if self.reference is not None:
            kl = KL_ESTIMATORS[args.kl_estimator](_table([row.old_logps or [] for row in rows], T), _table([row.ref_logps or [] for row in rows], T))
        rewards = token_rewards(scores, kl, mask, args.kl_coef)
        self._note_credit(scores, rewards, mask)
        if args.whiten_rewards:
            rewards = whitened(rewards, mask, self._moments(rewards, mask), shift_mean=False)
        advantages, returns = generalised_advantages(rewards, values, mask, torch.where(goes_on, final, 0.0), gamma=args.gamma, lam=args.lam)
        self.metrics.note("value/explained_variance", *self._explained(values, returns, mask))
        advantages = whitened(advantages, mask, self._moments(advantages, mask))
        for row, ours, theirs in zip(rows, advantages.tolist(), returns.tolist(), strict=True):
            row.token_advantages, row.returns = ours[: len(row.token_ids)], theirs[: len(row.token_ids)]
            row.advantage = sum(row.token_advantages) / max(row.length, 1)  # for the record; the update reads those of the tokens

    def _score_of(self, completion: Completion) -> float:
        penalty = self.args.missing_eos_penalty or 0.0
        return (completion.reward or 0.0) - (penalty if completion.is_truncated else 0.0)

    def _moments(self, values: torch.Tensor, mask: torch.Tensor) -> Moments:
        return Moments.of(gather_json(sums(values, mask), self.args.device))

    def _explained(self, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
        """1 - var(returns - values) / var(returns): 1 where values foresee everything, 0 where they say nothing."""
        errors, spread = self._moments(returns - values, mask), self._moments(returns, mask)
        return (1 - errors.variance / spread.variance, 1.0) if spread.variance else (0.0, 1.0)

    def _note_credit(self, scores: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        trained = mask.any(dim=1)
        total, score = rewards.sum(dim=1)[trained].sum(), scores[trained].sum()
        count = float(trained.sum())
        for name, value in (("objective/scores", score), ("objective/non_score_reward", total - score), ("objective/rlhf_reward", total)):
            self.metrics.note(name, float(value), count)

    # The loss

    def loss(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        answer = self.answer(model, batch.stream, expected_grad=self.expected_policy_grad(batch))
        assert answer.values is not None
        assert batch.old_values is not None
        assert batch.returns is not None
        terms = self.terms(batch, answer.logps)
        errors, held = value_loss(answer.values, batch.old_values, batch.returns, batch.mask, cliprange=self.args.cliprange_value)  # (B, T)
        self.note_update(batch, answer.logps, answer.entropy, terms)
        count = batch.mask.sum()
        for name, tensor in (("policy_loss", terms.per_token), ("value_loss", errors), ("value/mean", answer.values * batch.mask)):
            self.metrics.note(name, tensor.detach().sum(), count)
        self.metrics.note("value/clip_ratio", held.sum(), count)
        return self.share_of(batch, terms.per_token + self.args.vf_coef * errors)

    def _zero_loss(self, model: nn.Module) -> torch.Tensor:
        answer = self.answer(model, pack([PackItem([0], [[0]])]).to(self.args.device))
        assert answer.values is not None
        return (answer.logps.sum() + answer.values.sum()) * 0.0

    # What is saved, and what a reference follows, is a plain language model; the values go beside it

    @contextlib.contextmanager
    def _without_values(self) -> Iterator[None]:
        with without_submodule(self.accelerator.unwrap_model(self.model), VALUE_HEAD):
            yield

    def move_reference(self) -> None:
        with self._without_values():
            super().move_reference()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._without_values():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._without_values():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_tensors(self, directory: Path) -> None:
        super().save_tensors(directory)
        save_tensors_of(self.values, str(directory / VALUES))

    def load_tensors(self, directory: Path) -> None:
        super().load_tensors(directory)
        load_tensors_into(self.values, str(directory / VALUES))


def _with_reward_model(reward_funcs: Any, model: str | PreTrainedModel | None) -> Any:
    """The reward model as one more reward function, of weight 1."""
    if model is None:
        return reward_funcs
    if isinstance(reward_funcs, Rubric):
        raise UserError("reward_model and a Rubric are given: put the model into the rubric, as posttrain.ModelReward(directory)")
    functions = [] if reward_funcs is None else list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    return [*functions, model]


def _table(lists: list[Any], T: int) -> torch.Tensor:
    """(B, T) float64, 0 behind each row's end."""
    table = torch.zeros(len(lists), T, dtype=torch.float64)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return table
