"""Trainers that learn from their own completions: prompts go in, scored groups come out, and the window hands them on as micro-batches.

`collect` is the rollout, `learn_from` (of the algorithm) turns scored groups into rows, `window` normalises an update over everything it
holds. Old and reference log-probs are taken once per rollout. Randomness is keyed by (seed, step, prompt, index), never by a global generator.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.chat import encode_task
from posttrain.data.given import named
from posttrain.data.prompts import to_tasks
from posttrain.envs import Environment
from posttrain.errors import RewardError, UserError
from posttrain.losses.policy import Objective, PolicyOptions, Terms, policy_terms
from posttrain.models.adapters import Reference, reference_for
from posttrain.models.load import context_length, stop_token_ids
from posttrain.models.vocabulary import check_ids
from posttrain.rewards import Scoring
from posttrain.rollout.engines import make_engine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.trainers.core.base import BaseTrainer, MicroBatch
from posttrain.trainers.core.loader import PromptSampler, prompt_loader
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.environment import first_prompts, stage_for
from posttrain.trainers.online.inputs import as_rubric, check_trains, place_reward_models, sized
from posttrain.trainers.online.recording import RolloutRecord
from posttrain.trainers.online.reward_log import RewardLog
from posttrain.trainers.online.rollout_log import note_groups
from posttrain.trainers.online.rows import GenerationBatch, PolicyBatch, Row, Slice, policy_batches, weighted_rows
from posttrain.types import Group, Task

_NAMES = {"clip_ratio/low": "clip_ratio/low_mean", "clip_ratio/high": "clip_ratio/high_mean", "clip_ratio/region": "clip_ratio/region_mean"}
_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class OnlineTrainer(BaseTrainer):
    """Rollouts, rewards and the buffer between them and the updates."""

    args: OnlineConfig
    objective: Objective  # how the algorithm turns log-probs into a loss, and what the loss is divided by
    options: PolicyOptions

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: OnlineConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
        environment: Environment | None = None,
        reward_processing_classes: Any = None,
    ) -> None:
        self.environment = environment
        self.rubric = as_rubric(reward_funcs, args.reward_weights, environment, reward_processing_classes, processing_class)
        check_trains(self.rubric)
        tasks = to_tasks(sized(train_dataset, "train_dataset"))
        self.rubric.check_columns(tasks[0].columns)
        self.eval_tasks = {name: to_tasks(sized(rows, "eval_dataset")) for name, rows in named(eval_dataset).items()}
        for eval_tasks in self.eval_tasks.values():
            self.rubric.check_columns(eval_tasks[0].columns)
        super().__init__(
            model,
            args,
            train_dataset=tasks,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        place_reward_models(self.rubric, self.args.device)
        self.sampling = args.sampling(stop_token_ids(self.model, self.tokenizer))
        self.stage = stage_for(self.environment, self.tokenizer, self.sampling.stop_token_ids, args)
        self.prompt_ids = self._encode(tasks)
        self.eval_prompt_ids = {name: self._encode(eval_tasks) for name, eval_tasks in self.eval_tasks.items()}
        if len(tasks) < args.prompts_per_generation:
            raise UserError(
                f"the dataset has {len(tasks)} prompts, but one rollout takes {args.prompts_per_generation}; add rows or lower generation_batch_size"
            )
        self.record = RolloutRecord(self.recorder)
        self.reward_log = RewardLog(self.recorder)
        self.buffer: GenerationBatch | None = None
        self._last_groups: list[Group] = []  # of the latest rollout, for printing
        self.reference: Reference | None = None  # None: nothing is compared with it
        self.num_tokens = 0  # trained tokens of the update in progress, over all processes

    def use_switches(self) -> None:
        super().use_switches()
        dtype = _AUTOCAST[self.accelerator.mixed_precision]
        self.engine = make_engine(self.args.engine, self.tokenizer, autocast_dtype=dtype, max_slots=self.args.most_completions)

    @property
    def chosen(self) -> dict[str, Any]:
        return super().chosen | ({"completions_at_once": self.engine.max_slots} if isinstance(self.engine, LocalEngine) else {})

    def take_chosen(self, chosen: Mapping[str, Any]) -> None:
        super().take_chosen(chosen)
        if isinstance(self.engine, LocalEngine):
            self.engine.max_slots = chosen.get("completions_at_once", self.engine.max_slots)

    def _encode(self, tasks: Sequence[Task]) -> list[list[int]]:
        """Prompt ids, once for the whole run. Raises UserError for a prompt that leaves no room for a completion."""
        if self.stage is not None and self.environment is not None:
            if self.args.max_prompt_length is not None:
                raise UserError("max_prompt_length cuts prompts, and an environment goes on with the whole conversation; leave it out")
            encoded = first_prompts(self.environment, self.stage, tasks)
        else:
            encoded = [encode_task(self.tokenizer, task, self.args.chat_template_kwargs) for task in tasks]
            encoded = [ids[-self.args.max_prompt_length :] for ids in encoded] if self.args.max_prompt_length is not None else encoded
        limit = context_length(self.model)
        check_ids(self.model, self.tokenizer, encoded)
        for task, ids in zip(tasks, encoded, strict=True):
            if limit is not None and len(ids) + self.sampling.max_new_tokens > limit:
                raise UserError(
                    f"row {task.id}: its prompt has {len(ids)} tokens; with max_completion_length={self.sampling.max_new_tokens} that is beyond the model's "
                    f"context of {limit}. Filter long rows or lower max_completion_length."
                )
        return encoded

    # Prompts

    def get_train_dataloader(self) -> DataLoader:
        every = self.args.steps_per_generation * self.args.num_iterations  # type: ignore[operator]
        sampler = PromptSampler(
            len(self.train_dataset),
            prompts=self.args.prompts_per_generation,
            every=every,
            epoch=lambda: self.state.global_step // max(-(-len(sampler) // self.args.gradient_accumulation_steps), 1),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            shuffle=self.args.shuffle_dataset,
        )
        return prompt_loader(self.train_dataset, sampler)

    # Rollouts

    def collect(self, tasks: list[Task]) -> list[tuple[int, Group]]:
        """Sample, score and record one rollout. Returns this process's groups with their numbers in the whole rollout."""
        step = self.state.global_step
        groups = self._sample_and_score(tasks, step)
        if self.args.zero_signal_groups != "keep":
            groups = self._with_signal(groups, len(tasks), step)
        return groups

    def _sample_and_score(self, tasks: list[Task], step: int, attempt: int = 0) -> list[tuple[int, Group]]:
        """Every process samples whole groups: numbers rank, rank + world, ..."""
        numbers = range(self.args.process_index, len(tasks), self.args.world_size)
        mine = [tasks[number] for number in numbers]
        with self._scoring() as scoring:
            with self.metrics.timed("time/collect"):
                groups = self._play(mine, [self.prompt_ids[task.id] for task in mine], self.args.num_generations, step, scoring, attempt)
            with self.metrics.timed("time/reward"):  # what is left to wait for
                self._score(groups, scoring, self.metrics)
        self._note_groups(groups, self.metrics)
        return list(zip(numbers, groups, strict=True))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `BaseTrainer.train`. The processes that rewards ran in end with it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.rubric.close()

    def _scoring(self) -> Scoring:
        return self.rubric.scoring(trainer_state=self.state, default=self.args.reward_policy)

    def _play(self, tasks: list[Task], prompt_ids: list[list[int]], generations: int, step: int, scoring: Scoring, attempt: int = 0) -> list[Group]:
        if not tasks:
            return []
        with self.engine.serving(self.accelerator.unwrap_model(self.model_wrapped), version=step):
            return play(
                tasks,
                prompt_ids,
                self.engine,
                self.sampling,
                num_generations=generations,
                seed=self.args.seed + attempt * 1_000_003,
                step=step,
                decode=self._text,
                on_group=scoring.add,
                stage=self.stage,
            )

    def _text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=self.args.skip_special_tokens))

    def _score(self, groups: list[Group], scoring: Scoring, metrics: Metrics) -> None:
        try:
            report = self.rubric.fill(groups, scoring)
        except (RewardError, UserError) as error:
            self.recorder.note("reward", str(error))
            raise
        self._last_groups = groups
        self.reward_log.add(report, groups, metrics, self.args.device)

    def _note_groups(self, groups: list[Group], metrics: Metrics) -> None:
        note_groups(groups, metrics, self.rubric, in_environment=self.stage is not None)

    def _with_signal(self, groups: list[tuple[int, Group]], wanted: int, step: int) -> list[tuple[int, Group]]:
        """Keep groups whose rewards differ; with 'resample', draw new prompts until there are `wanted` over all processes."""
        kept = [group for _, group in groups if group.has_signal]
        total = sum(gather_json(len(kept), self.args.device))
        rounds = 0
        while self.args.zero_signal_groups == "resample" and total < wanted and rounds < self.args.max_resampling_rounds:
            rounds += 1
            rng = random.Random(f"{self.args.seed}/{step}/{rounds}")
            fresh = [self.train_dataset[i] for i in rng.sample(range(len(self.train_dataset)), min(wanted, len(self.train_dataset)))]
            kept += [group for _, group in self._sample_and_score(fresh, step, attempt=rounds) if group.has_signal]
            total = sum(gather_json(len(kept), self.args.device))
        self.metrics.note("resampling_rounds", rounds, 1)
        counts = gather_json(len(kept), self.args.device)
        before = sum(counts[: self.args.process_index])
        numbered = [(before + offset, group) for offset, group in enumerate(kept)]
        return [(number, group) for number, group in numbered if number < wanted]

    # From groups to updates

    def learn_from(self, groups: list[tuple[int, Group]]) -> GenerationBatch:
        """The algorithm: advantages, masks and whatever is frozen before the first update."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns")

    def row_weights(self, chosen: list[Slice]) -> list[tuple[Row, float]]:
        """Every row of this process that has trained tokens, with its weight in the update's sum. An algorithm may leave out rows without a gradient."""
        self.num_tokens = sum(part.num_tokens for part in chosen)
        self.metrics.note("num_tokens", self.num_tokens, 0.0)
        return weighted_rows(chosen, self.objective, max_completion_length=self.sampling.max_new_tokens)

    def window(self, micro_steps: list[list[Task]]) -> list[MicroBatch]:
        self.move_reference()
        chosen = []
        for tasks in micro_steps:
            if tasks:
                self.buffer = self.learn_from(self.collect(tasks))
            assert self.buffer is not None, "a window starts with prompts or with a pending rollout"
            chosen.append(self.buffer.next_slice())
        weighted = self.row_weights(chosen)
        return list(self.micro_batches([row for row, _ in weighted], [weight for _, weight in weighted]))

    def micro_batches(self, rows: list[Row], weights: list[float]) -> list[PolicyBatch]:
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return policy_batches(rows, weights, max_tokens=self.token_budget, device=self.args.device, dtype=dtype)

    def frozen_logps(self, rows: list[Row], forward: Callable[[nn.Module, PolicyBatch], torch.Tensor], model: nn.Module) -> list[list[float]]:
        """Per-token values of `forward`, (B, T), for every row, without a gradient."""
        values: dict[tuple[int, int], list[float]] = {}
        with self.frozen(model) as module:
            for batch in self.micro_batches(rows, [0.0] * len(rows)):
                for row, line in zip(batch.rows, forward(module, batch).tolist(), strict=True):
                    values[row.group, row.index] = line[: len(row.token_ids)]
        return [values[row.group, row.index] for row in rows]

    def policy_logps(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        """(B, T) at the temperature of sampling."""
        return self.logprobs(model, batch.stream, self.sampling.temperature).logps

    def terms(self, batch: PolicyBatch, logps: torch.Tensor, policy_mask: torch.Tensor | None = None) -> Terms:
        """The algorithm's objective at these log-probs, (B, T). policy_mask (B, T): tokens whose policy term counts (None: all)."""
        return policy_terms(
            logps,
            batch.old_logps,
            batch.advantages,
            batch.mask,
            objective=self.objective,
            options=self.options,
            ref_logps=batch.ref_logps,
            rollout_logps=batch.rollout_logps,
            policy_mask=policy_mask,
        )

    def share_of(self, batch: PolicyBatch, per_token: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the update's loss, from that of each token, (B, T); processes average their gradients."""
        return (per_token * batch.weights[:, None]).sum() * self.args.world_size

    def expected_policy_grad(self, batch: PolicyBatch) -> torch.Tensor | None:
        """`expected_grad` of the objective. None where log-probs are compared with frozen ones."""
        if batch.old_logps is not None:
            return None
        return self.expected_grad(batch.stream.shape, lambda logps: self.share_of(batch, self.terms(batch, logps).per_token))

    def freeze(self, rows: list[Row], *, old: bool) -> None:
        """The reference's log-probs if there is one, and with `old` the policy's own, before the first update."""
        if self.reference is not None:
            with self.reference.active() as reference:
                for row, logps in zip(rows, self.frozen_logps(rows, self.policy_logps, reference), strict=True):
                    row.ref_logps = logps
        if old:
            for row, logps in zip(rows, self.frozen_logps(rows, self.policy_logps, self.model_wrapped), strict=True):
                row.old_logps = logps

    # A reference that moves

    def use_reference(self, *, needed: bool) -> None:
        """Take the policy as it is now for reference: its adapters off, or a frozen copy."""
        if self.args.sync_ref_model and type(self.model).__module__.startswith("peft."):
            raise UserError(
                "sync_ref_model: with LoRA the reference is the model without its adapter, which cannot move; train without LoRA, or leave it out"
            )
        self.reference = reference_for(self.model, needed)

    def move_reference(self) -> None:
        """Once per optimizer step: a synced reference follows when it is due."""
        step = self.state.global_step
        if self.args.sync_ref_model and self.reference is not None and step and step % self.args.ref_model_sync_steps == 0:
            self.reference.sync(self.accelerator.unwrap_model(self.model_wrapped), self.args.ref_model_mixup_alpha)

    def save_tensors(self, directory: Path) -> None:
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.save(directory / "reference.safetensors")

    def load_tensors(self, directory: Path) -> None:
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.load(directory / "reference.safetensors")

    # Metrics

    def note_update(self, batch: PolicyBatch, logps: torch.Tensor, entropy: torch.Tensor, terms: Terms) -> None:
        """What an update saw of a micro-batch. logps, entropy (B, T)."""
        logps, entropy, count = logps.detach(), entropy.detach(), batch.mask.sum()
        self.metrics.note("entropy", (entropy * batch.mask).sum(), count)
        for name, tally in terms.metrics.items():
            self.metrics.note(_NAMES.get(name, name), tally.total, tally.count)
        if self.args.on_policy:  # the policy is still the one that sampled, so engine and trainer must agree on every log-prob
            gap = (logps - batch.rollout_logps).abs() * batch.mask
            self.metrics.note("sampling/logp_difference/mean", gap.sum(), count)
            self.metrics.note_extreme("sampling/logp_difference/max", "max", float(gap.max()) if gap.numel() else 0.0)
        self.record.tokens(self.state.global_step + 1, batch, logps, entropy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            shown = [(group, group.completions[:1]) for group in self._last_groups] if self.args.log_unique_prompts else []
            shown = shown or [(group, group.completions) for group in self._last_groups[:1]]
            left = self.args.num_completions_to_print or sum(len(completions) for _, completions in shown)
            for group, completions in shown:
                if left > 0:
                    self.view.samples(self._text(group.completions[0].prompt_ids), completions[:left])
                    left -= len(completions)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample num_generations_eval completions of every evaluation prompt and score them. Same sampling as in training."""
        datasets = self.eval_tasks if eval_dataset is None else {name: to_tasks(rows) for name, rows in named(eval_dataset).items()}
        logs: dict[str, float] = {}
        for name, tasks in datasets.items():
            ids = self.eval_prompt_ids[name] if eval_dataset is None else self._encode(tasks)
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            start, metrics = time.perf_counter(), Metrics()
            mine = range(self.args.process_index, len(tasks), self.args.world_size)
            generations = self.args.num_generations_eval or self.args.num_generations
            # a key that no training step uses: evaluation must not draw the random numbers of a rollout
            with self._scoring() as scoring:
                groups = self._play([tasks[i] for i in mine], [ids[i] for i in mine], generations, -1, scoring)
                self._score(groups, scoring, metrics)
            self._note_groups(groups, metrics)
            values = metrics.drain(self.args.device, steps=1)
            logs |= {prefix + key: value for key, value in values.items()} | {f"{prefix}runtime": time.perf_counter() - start}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # Resuming in the middle of a rollout that is still being trained on

    def state_to_resume(self) -> dict[str, Any]:
        pending = self.buffer is not None and self.buffer.used < self.buffer.slices * self.args.num_iterations
        return {"rollout": self.buffer.to_json() if pending and self.buffer is not None else None}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        self.buffer = GenerationBatch.from_json(state["rollout"]) if state["rollout"] else None

    def plan(self) -> str:
        args = self.args
        rollout = f"{args.prompts_per_generation} prompts x {args.num_generations} completions per rollout"
        updates = args.updates_per_rollout
        tokens = args.prompts_per_generation * (max(map(len, self.prompt_ids)) + args.num_generations * self.sampling.max_new_tokens)
        return (
            f"{rollout} = {args.generation_batch_size} · {updates:g} update{'s' if updates != 1 else ''} per rollout · "
            f"at most {tokens:,} tokens, {-(-tokens // args.token_budget)} micro-batches of {args.token_budget:,} · {self.state.max_steps or args.max_steps} steps · "
            f"reward {self.rubric.span()}"
        )
