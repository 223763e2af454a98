"""From what a user says about environments (an Environment, tools, TRL's environment_factory) to the stage on which
episodes are played.

Everything that can be wrong is found here, before training: a template that rewrites history, tools without types, a
prompt without room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.turns import TurnTokens
from posttrain.envs.environment import Environment
from posttrain.envs.formats import find_parser
from posttrain.envs.methods import factory
from posttrain.envs.tools import tools as tool_environment
from posttrain.errors import UserError, at_row
from posttrain.event_loops import settled
from posttrain.rewards import Rubric
from posttrain.rewards.library.environment import environment as environment_reward
from posttrain.rollout.episodes import EpisodeStage, opened, unplayed
from posttrain.trainers.core.metrics import Metrics
from posttrain.types import Completion, Task


def as_environment(env: Any, tools: Sequence[Callable[..., Any]] | None = None, environment_factory: Any = None) -> Environment | None:
    """The one that was given; None where an episode is one question with one answer. `env`: an Environment, or what
    makes an Env of a task."""
    given = {"env": env, "tools": tools or None, "environment_factory": environment_factory}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} say two things; give one of them (an environment brings its own tools)")
    if tools:
        return tool_environment(tools)
    if environment_factory is not None:
        return factory(environment_factory)
    if env is None or isinstance(env, Environment):
        return env
    if not callable(env):
        raise UserError(f"env must be an Environment, or a class or function that makes one episode of a task, not {env!r}")
    return Environment(env)


def make_stage(
    environment: Environment,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    *,
    max_turns: int | None = None,
    max_turn_tokens: int | None = None,
    on_error: str = "stop",
    skip_special_tokens: bool = True,
    **chat_template_kwargs: Any,
) -> EpisodeStage:
    """Raises UserError for a chat template that cannot carry a conversation of several turns, or knows no tools."""
    parse = find_parser(tokenizer, environment.call_format) if environment.tools else None
    chat = TurnTokens(
        tokenizer, stop_token_ids, tools=environment.tools, parse=parse, skip_special_tokens=skip_special_tokens, **chat_template_kwargs
    )
    if tokenizer.chat_template:  # without one, the first prompt says so
        chat.check(environment.role)
    return EpisodeStage(environment.make, chat, max_turns, max_turn_tokens, on_error)


def stage_for(environment: Environment | None, tokenizer: Any, stop_token_ids: Sequence[int], args: Any) -> EpisodeStage | None:
    """The stage of an online trainer with these settings; None without an environment."""
    if environment is None:
        return None
    options: dict[str, Any] = {name: getattr(args, name) for name in ("max_turns", "max_turn_tokens", "skip_special_tokens")}
    return make_stage(environment, tokenizer, stop_token_ids, on_error=args.env_on_error, **options, **(args.chat_template_kwargs or {}))


def first_prompts(environment: Environment, stage: EpisodeStage, tasks: Sequence[Task]) -> list[list[int]]:
    """Prompt ids to be checked before training: all of them, or of the first task alone where only a made episode could
    say."""
    if environment.starts_with_prompt:
        return [_first_prompt(stage, task) for task in tasks]
    envs, ids = opened(tasks[0], stage, 1)
    for error in settled([envs[0].finish(unplayed())]):
        if isinstance(error, Exception):
            raise error
    return [ids] * len(tasks)


def _first_prompt(stage: EpisodeStage, task: Task) -> list[int]:
    with at_row(task.id):
        return stage.chat_of(task).encode(task.prompt if not isinstance(task.prompt, str) else [{"role": "user", "content": task.prompt}])


def with_environment_reward(rubric: Rubric | None) -> Rubric:
    """The rubric of an environment that gives a reward: that is one more reward, of weight 1, unless the rubric has it
    already."""
    if rubric is None:
        return Rubric(environment_reward)
    return rubric if any(reward.function is environment_reward.function for reward in rubric.rewards) else Rubric(rubric, environment_reward)


def note_episode(completion: Completion, metrics: Metrics) -> None:
    """Turns, TRL's figures for tools, and whatever else the environment reported."""
    metrics.note("env/turns", completion.turns)
    info = dict(completion.info)
    if {"tool_calls", "tool_failures"} <= info.keys():  # both are ToolEnv's; an environment of one's own may count calls too
        calls, failures = info.pop("tool_calls"), info.pop("tool_failures")
        metrics.note("tools/call_frequency", calls)
        metrics.note("tools/failure_frequency", failures / calls if calls else 0.0, float(calls > 0))
    for name, value in info.items():
        metrics.note(f"env/{name}", value)
