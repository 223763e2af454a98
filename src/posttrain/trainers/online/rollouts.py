"""Trainers that learn from their own completions, as far as the rollout: prompts go in, scored groups come out
(`collect`), in training and in evaluation. What is learnt from them is in `trainer`.

Randomness is keyed by (seed, step, prompt, index), never by a global generator.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.chat import encode_task
from posttrain.data.given import named
from posttrain.data.prompts import to_tasks
from posttrain.envs import Environment
from posttrain.errors import RewardError, UserError
from posttrain.models.load import context_length, stop_token_ids
from posttrain.models.vocabulary import check_ids
from posttrain.rewards import Rubric, Scoring
from posttrain.rollout.engines import make_engine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.trainers.core.base import BaseTrainer
from posttrain.trainers.core.loader import PromptSampler, prompt_loader
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.environment import first_prompts, stage_for
from posttrain.trainers.online.inputs import as_rubric, check_trains, place_reward_models, rubric_fingerprint, sized
from posttrain.trainers.online.reward_log import RewardLog
from posttrain.trainers.online.rollout_log import note_groups
from posttrain.types import Group, Task

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class RolloutTrainer(BaseTrainer):
    """Prompts, the engine, environments and rewards."""

    args: OnlineConfig
    needs_scores: ClassVar[bool] = True  # whether the algorithm learns from rewards

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: OnlineConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        environment: Environment | None = None,
        reward_processing_classes: Any = None,
        **shared: Any,
    ) -> None:
        """shared: further keywords of BaseTrainer."""
        self.environment = environment
        self.rubric = self._rubric_of(reward_funcs, args, reward_processing_classes, processing_class)
        tasks = to_tasks(sized(train_dataset, "train_dataset"))
        self.eval_tasks = {name: to_tasks(sized(rows, "eval_dataset")) for name, rows in named(eval_dataset).items()}
        if self.rubric is not None:
            for rows in (tasks, *self.eval_tasks.values()):
                self.rubric.check_columns(rows[0].columns)
        super().__init__(
            model,
            args,
            train_dataset=tasks,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **shared,
        )
        if self.rubric is not None:
            self.input_fingerprints["rubric"] = rubric_fingerprint(self.rubric)
            place_reward_models(self.rubric, self.args.device)
        self.sampling = args.sampling(stop_token_ids(self.model, self.tokenizer))
        self.stage = stage_for(self.environment, self.tokenizer, self.sampling.stop_token_ids, args)
        self.prompt_ids = self._encode(tasks)
        self.eval_prompt_ids = {name: self._encode(eval_tasks) for name, eval_tasks in self.eval_tasks.items()}
        if len(tasks) < args.prompts_per_generation:
            raise UserError(
                f"the dataset has {len(tasks)} prompts, but one rollout takes {args.prompts_per_generation}; add rows or lower generation_batch_size"
            )
        self.reward_log = RewardLog(self.recorder)
        self._last_groups: list[Group] = []  # of the latest rollout, for printing

    def _rubric_of(self, reward_funcs: Any, args: OnlineConfig, tokenizers: Any, own: Any) -> Rubric | None:
        """None where nothing is scored, which only an algorithm may have that needs no scores."""
        gives_reward = self.environment is not None and self.environment.gives_reward
        if not self.needs_scores and reward_funcs in (None, []) and not gives_reward:
            if args.zero_signal_groups != "keep":
                raise UserError(f"zero_signal_groups={args.zero_signal_groups!r} compares rewards, and there is none; leave it at 'keep'")
            return None
        rubric = as_rubric(reward_funcs, args.reward_weights, self.environment, tokenizers, own)
        if self.needs_scores:
            check_trains(rubric)
        return rubric

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
        """Sample, score and record one rollout. Returns this process's groups with their numbers in the whole
        rollout."""
        step = self.state.global_step
        groups = self._sample_and_score(tasks, step)
        if self.args.zero_signal_groups != "keep":
            groups = self._with_signal(groups, len(tasks), step)
        return groups

    def _sample_and_score(self, tasks: list[Task], step: int, attempt: int = 0) -> list[tuple[int, Group]]:
        """Every process samples whole groups: numbers rank, rank + world, ..."""
        numbers = range(self.args.process_index, len(tasks), self.args.world_size)
        mine = [tasks[number] for number in numbers]
        prompts = [self.prompt_ids[task.id] for task in mine]
        with self._scoring() as scoring:
            with self.metrics.timed("time/collect"):
                groups = self._play(mine, prompts, self.args.num_generations, step, scoring, attempt)
            with self.metrics.timed("time/reward"):  # what is left to wait for
                self._score(groups, scoring, self.metrics)
        self._note_groups(groups, self.metrics)
        return list(zip(numbers, groups, strict=True))

    def close(self) -> None:
        """The processes that rewards ran in end with a training."""
        if self.rubric is not None:
            self.rubric.close()

    def _scoring(self) -> AbstractContextManager[Scoring | None]:
        if self.rubric is None:
            return nullcontext()
        return self.rubric.scoring(trainer_state=self.state, default=self.args.reward_policy)

    def _play(
        self, tasks: list[Task], prompt_ids: list[list[int]], generations: int, step: int, scoring: Scoring | None, attempt: int = 0
    ) -> list[Group]:
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
                on_group=None if scoring is None else scoring.add,
                stage=self.stage,
            )

    def _text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=self.args.skip_special_tokens))

    def _score(self, groups: list[Group], scoring: Scoring | None, metrics: Metrics) -> None:
        self._last_groups = groups
        if self.rubric is None or scoring is None:
            return
        try:
            report = self.rubric.fill(groups, scoring)
        except (RewardError, UserError) as error:
            self.recorder.note("reward", str(error))
            raise
        self.reward_log.add(report, groups, metrics, self.args.device)

    def _note_groups(self, groups: list[Group], metrics: Metrics) -> None:
        note_groups(groups, metrics, self.rubric, in_environment=self.stage is not None)

    def _with_signal(self, groups: list[tuple[int, Group]], wanted: int, step: int) -> list[tuple[int, Group]]:
        """Keep groups whose rewards differ; with 'resample', draw new prompts until there are `wanted` over all
        processes."""
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
        """Sample num_generations_eval completions of every evaluation prompt and score them. Same sampling as in
        training."""
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
