"""What users hand to an online trainer, in the form it works with: a rubric, rows with a length."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import torch

from posttrain.data.given import rows_of
from posttrain.envs.environment import Environment
from posttrain.errors import UserError
from posttrain.rewards import Rubric
from posttrain.secrets import redacted
from posttrain.trainers.core.fingerprint import Fingerprint
from posttrain.trainers.online.environment import with_environment_reward
from posttrain.trainers.online.reward_model import ModelReward, with_reward_models


def as_rubric(reward_funcs: Any, weights: list[float] | None, environment: Environment | None, tokenizers: Any = None, own: Any = None) -> Rubric:
    """One rubric of all rewards. tokenizers: of the reward models among them, one for each reward function; own: the
    policy's."""
    if not isinstance(reward_funcs, Rubric) and reward_funcs not in (None, []):
        functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        reward_funcs = with_reward_models(functions, tokenizers, own)
    if environment is None or not environment.gives_reward:
        return _own_rubric(reward_funcs, weights)
    return with_environment_reward(None if reward_funcs in (None, []) else _own_rubric(reward_funcs, weights))


def check_trains(rubric: Rubric) -> None:
    """Raises UserError for a rubric of monitors, which an evaluation may have."""
    if not any(rubric.weights):
        raise UserError(f"every reward has weight 0 ({', '.join(rubric.names)}), so that nothing would be trained; give one of them another weight")


def rubric_fingerprint(rubric: Rubric) -> Fingerprint:
    """Each reward's weight, and the place and settings of its function as far as they can be named, for a resumed run
    to be compared with.

    A function may be mended and the run go on, so its text is not part of it; nor is the folder of its file.
    """
    told: dict[str, Any] = {}
    for name, reward, weight in zip(rubric.names, rubric.rewards, rubric.weights, strict=True):
        source = reward.source if reward.source is not None and reward.source.folder is not None else None  # what a recipe names
        told[name] = [weight, None if source is None else PurePath(source.name).name, None if source is None else redacted(source.settings)]
    return Fingerprint(json.dumps(told, sort_keys=True, default=str), "")


def _own_rubric(reward_funcs: Any, weights: list[float] | None) -> Rubric:
    if isinstance(reward_funcs, Rubric):
        if weights is None:
            return reward_funcs
        return Rubric(*reward_funcs.rewards, weights=weights)
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not functions or functions == [None]:
        raise UserError("reward_funcs is empty: give a function, a list of functions or a Rubric")
    return Rubric(*functions, weights=weights)


def place_reward_models(rubric: Rubric, device: torch.device) -> None:
    for reward in rubric.rewards:
        if isinstance(reward.function, ModelReward):
            reward.function.to(device)


def sized(dataset: Any, name: str) -> Any:
    if dataset is None:
        raise UserError(f"{name} is missing: give rows with a column 'prompt'")
    dataset = rows_of(dataset, name)
    if not hasattr(dataset, "__len__"):
        raise UserError(f"{name} is a stream of unknown length, which is not built yet; pass a list of its rows, e.g. list(dataset.take(10_000))")
    return dataset
