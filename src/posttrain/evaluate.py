"""An evaluation: a model answers held-out prompts and a rubric says which answers are right. Greedy and once, unless
told otherwise.

The statistics of the result stand in evaluation.py; this sits between models, engine and rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.chat import encode_task
from posttrain.envs import Environment
from posttrain.evaluation import Proportion, wilson
from posttrain.models.load import stop_token_ids
from posttrain.rewards import Rubric
from posttrain.rewards.failures import BASE, FailurePolicy
from posttrain.rewards.scoring import Report
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.trainers.online.environment import make_stage
from posttrain.types import Completion, Engine, Group, Sampling, Task

EVAL_STEP, PROBE_STEP = -2, -3  # keys of random numbers that neither a training step (0, 1, ...) nor its evaluation (-1) uses


@dataclass(frozen=True)
class EvalResult:
    """One answer per task, and which of them are right."""

    tasks: list[Task]
    completions: list[Completion]
    right: list[bool | None]  # None: could not be judged

    @property
    def accuracy(self) -> Proportion:
        """Of the answers that could be judged. Raises ValueError where none could."""
        judged = [right for right in self.right if right is not None]
        return wilson(sum(judged), len(judged))

    @property
    def truncated(self) -> float:
        return sum(completion.is_truncated for completion in self.completions) / len(self.completions)


def evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[Task], rubric: Rubric, *, max_new_tokens: int, temperature: float = 0.0, **asked: Any
) -> EvalResult:
    """One completion per task, greedy at temperature 0. With an environment it is a whole episode, of at most
    `max_new_tokens` in all.

    asked: what `answers` takes besides: seed, engine, environment and its limits, on_report, keywords of the chat
    template.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop_token_ids=stop_token_ids(model, tokenizer))
    completions = [group.completions[0] for group in answers(model, tokenizer, tasks, rubric, sampling, **asked)]
    return EvalResult(list(tasks), completions, [rubric.is_right(completion) for completion in completions])


def answers(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    rubric: Rubric,
    sampling: Sampling,
    *,
    num_generations: int = 1,
    seed: int = 0,
    step: int = EVAL_STEP,
    engine: Engine | None = None,
    environment: Environment | None = None,
    max_turns: int | None = None,
    max_turn_tokens: int | None = None,
    reward_policy: FailurePolicy = BASE,
    env_on_error: str = "stop",
    skip_special_tokens: bool = True,
    on_report: Callable[[Report], None] | None = None,
    **chat_template_kwargs: Any,
) -> list[Group]:
    """`num_generations` completions of each task, scored while others are still drawn: what a rollout of training is,
    without training.

    reward_policy: what happens when a reward breaks that does not say so itself. env_on_error: "drop" leaves episodes
    of a broken environment unscored. on_report: called with what the rewards logged and how they broke.
    """
    engine = engine or LocalEngine(tokenizer)
    stage, prompt_ids = None, []
    if environment is None:
        prompt_ids = [encode_task(tokenizer, task, chat_template_kwargs) for task in tasks]
    else:
        limits: dict[str, Any] = {"max_turns": max_turns, "max_turn_tokens": max_turn_tokens, "on_error": env_on_error}
        limits["skip_special_tokens"] = skip_special_tokens
        stage = make_stage(environment, tokenizer, sampling.stop_token_ids, **limits, **chat_template_kwargs)
    with rubric.scoring(default=reward_policy) as scoring:
        with engine.serving(model, version=0):
            groups = play(
                list(tasks),
                prompt_ids,
                engine,
                sampling,
                num_generations=num_generations,
                seed=seed,
                step=step,
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens),
                on_group=scoring.add,
                stage=stage,
            )
        report = rubric.fill(groups, scoring)
    if on_report is not None:
        on_report(report)
    return groups
