"""An exam: a model answers held-out prompts and a rubric says which answers are right. Greedy unless told otherwise.

The statistics of the result stand in evaluation.py; this sits between models, engine and rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.chat import encode_prompt
from posttrain.envs import Environment
from posttrain.evaluation import Proportion, wilson
from posttrain.models.load import stop_token_ids
from posttrain.rewards import Rubric
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.trainers.stage import make_stage
from posttrain.types import Engine, Rollout, Sampling, Task


@dataclass(frozen=True)
class Paper:
    """An exam handed in: one answer per task."""

    tasks: list[Task]
    rollouts: list[Rollout]
    right: list[bool]  # an answer that could not be judged is not right

    @property
    def accuracy(self) -> Proportion:
        return wilson(sum(self.right), len(self.right))

    @property
    def truncated(self) -> float:
        return sum(rollout.is_truncated for rollout in self.rollouts) / len(self.rollouts)


def sit_exam(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    rubric: Rubric,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    engine: Engine | None = None,
    environment: Environment | None = None,
    max_turns: int | None = None,
    max_turn_tokens: int | None = None,
    **chat_template_kwargs: Any,
) -> Paper:
    """One completion per task, greedy at temperature 0. With an environment it is a whole episode, of at most `max_new_tokens` in all."""
    engine = engine or LocalEngine(tokenizer)
    stops = stop_token_ids(model, tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop_token_ids=stops)
    stage, prompt_ids = None, []
    if environment is None:
        prompt_ids = [encode_prompt(tokenizer, task.prompt, **chat_template_kwargs) for task in tasks]
    else:
        limits = {"max_turns": max_turns, "max_turn_tokens": max_turn_tokens}
        stage = make_stage(environment, tokenizer, stops, **limits, **chat_template_kwargs)
    with engine.serving(model, version=0):
        groups = play(
            list(tasks),
            prompt_ids,
            engine,
            sampling,
            num_generations=1,
            seed=seed,
            step=-2,  # a key of its own: neither a training step's nor evaluation's
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            stage=stage,
        )
    rubric.score(groups)
    rollouts = [group.rollouts[0] for group in groups]
    return Paper(list(tasks), rollouts, [rubric.is_right(rollout) is True for rollout in rollouts])
