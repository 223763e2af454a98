"""Proximal Policy Optimisation (Schulman et al. 2017; for language models Ouyang et al. 2022). A value model predicts,
before each token, what the completion will still earn; a token's advantage is by how much it turned out better (GAE).

    r_t = -kl_coef * KL_t, and the score at the last token            A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})
    loss = mean over tokens of -min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t) + vf_coef * 1/2 max((V_t - R_t)^2, (V_t clamped near its old value - R_t)^2)

The values are a head on the policy's own backbone, computed in the same forward, or a model of their own. A truncated
completion is followed by the value of what would have come; one that ended is followed by nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from posttrain.trainers.core.config import as_config, refuse, setting, settings
from posttrain.trainers.core.fingerprint import Fingerprint, of_weights
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.environment import as_environment
from posttrain.trainers.online.rows import PolicyBatch, Row
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.types import Completion

VALUES = "value.safetensors"  # within a checkpoint: the value head or model
_REFUSED = {
    "ref_model": "the reference is the model as it is when training starts (its adapters off, or a frozen copy); leave it out",
    "data_collator": "streams are packed without padding; leave it out",
}

_ENDS = "every end-of-sequence token of the model ends a completion; add others with generation_kwargs={'stop_token_ids': [...]}"
_DERIVED = "it follows from per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches; leave it out"
_ADAPTER = "the reference is the model without its adapter; leave it out"


@settings
@dataclass
class PPOConfig(OnlineConfig):
    """A rollout has per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches completions on each
    device; every mini-batch is one optimizer step, num_ppo_epochs times."""

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
    missing_eos_penalty: float | None = setting(None, "Taken from the score of a truncated completion.")
    bootstrap_truncated: bool = setting(
        True, "After a truncated completion, count the value of what would have come. Off: truncation is an end like any other, as in TRL."
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


class PPOTrainer(OnlineTrainer):
    """`PPOTrainer(model, reward_funcs, args, train_dataset).train()`: data, rewards and environments as for
    GRPOTrainer.

    reward_model: a trained reward model (a directory, or a classifier with one label), beside reward_funcs or instead
    of them. value_model: a model of its own for the values (a causal model or a classifier; its name or itself). None:
    a head on the policy.
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

    # Advantages

    def is_trained(self, completion: Completion) -> bool:
        return completion.reward is not None

    def precompute_old_logps(self, rows: list[Row]) -> None:
        """With the values, of the same forward."""
        found: dict[tuple[int, int], tuple[list[float], list[float], float]] = {}
        with self.evaluating(self.model_wrapped) as module:
            for batch in self.micro_batches(rows):
                answer = self.answer(module, batch.stream)
                assert answer.values is not None
                assert answer.last_values is not None
                columns = (answer.logps.tolist(), answer.values.tolist(), answer.last_values.tolist())
                for row, logps, values, last in zip(batch.rows, *columns, strict=True):
                    found[row.group, row.index] = logps[: len(row.token_ids)], values[: len(row.token_ids)], last
        for row in rows:
            row.old_logps, row.old_values, row.last_value = found[row.group, row.index]

    @property
    def needs_old_logps(self) -> bool:
        return True

    def set_advantages(self, rows: list[Row], completions: list[Completion], scores: list[Any], lengths: list[list[int]]) -> None:
        """Advantages and returns of every token. float64; what is whitened is whitened over all processes."""
        args = self.args
        T = max((len(row.token_ids) for row in rows), default=0)
        mask = _table([row.trained for row in rows], T).bool()  # (B, T)
        values = _table([row.old_values or [] for row in rows], T)
        earned = torch.tensor([self._score_of(completion) for completion in completions], dtype=torch.float64)  # (B,)
        final = torch.tensor([row.last_value for row in rows], dtype=torch.float64)
        goes_on = torch.tensor([args.bootstrap_truncated and completion.is_truncated for completion in completions], dtype=torch.bool)
        kl = torch.zeros_like(values)
        if self.reference is not None:
            kl = KL_ESTIMATORS[args.kl_estimator](_table([row.old_logps or [] for row in rows], T), _table([row.ref_logps or [] for row in rows], T))
        rewards = token_rewards(earned, kl, mask, args.kl_coef)
        self._note_rewards(earned, rewards, mask)
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

    def _note_rewards(self, scores: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        trained = mask.any(dim=1)
        total, score = rewards.sum(dim=1)[trained].sum(), scores[trained].sum()
        count = float(trained.sum())
        for name, value in (("objective/scores", score), ("objective/non_score_reward", total - score), ("objective/rlhf_reward", total)):
            self.metrics.note(name, float(value), count)

    # The loss

    def loss(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        answer = self.answer(model, batch.stream, known_grad=self.known_policy_grad(batch))
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
        return self.weighted_sum(batch, terms.per_token + self.args.vf_coef * errors)

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
