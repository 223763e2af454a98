"""A rubric: small rewards stacked with weights. It fills `rollout.scores` (unweighted) and `rollout.reward` (the weighted total).

It knows nothing of advantages or losses. A completion that no reward could score has reward None, not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Union

from posttrain.errors import UserError
from posttrain.rewards.loading import load_reward, preset_names
from posttrain.rewards.reward import RewardFunction, as_reward, checked_weight
from posttrain.rewards.scoring import Notes, score_all
from posttrain.types import Group, Rollout

Scorer = Union[Callable[..., Any], RewardFunction, "Rubric", str]


class Rubric:
    """`Rubric(has_number, (is_right, 2.0), another_rubric, "gsm8k", weights=None, name=None)`.

    A weight given here, in a pair or in `weights`, replaces a function's own and multiplies those of a nested rubric. Names are
    unique: a second `f` is called `f_2`; those of a rubric with a name are written `name/f`.
    """

    def __init__(self, *rewards: Scorer | tuple[Scorer, float], weights: Sequence[float] | None = None, name: str | None = None) -> None:
        if not rewards:
            raise UserError("a rubric needs at least one reward")
        if weights is not None and len(weights) != len(rewards):
            raise UserError(f"the rubric has {len(rewards)} rewards but {len(weights)} weights; give one weight for each reward")
        self.name = name
        self.rewards: list[RewardFunction] = []
        self.names: list[str] = []
        self.weights: list[float] = []
        for index, item in enumerate(rewards):
            scorer, weight = item if isinstance(item, tuple) else (item, None)
            if weights is not None:
                if weight is not None:
                    raise UserError("give a reward's weight once: in the pair or in `weights`")
                weight = weights[index]
            self._add(scorer, weight)

    @classmethod
    def from_config(cls, entries: Sequence[Any], *, folder: str | None = None) -> Rubric:
        """From a recipe: preset names, or {reward: "file.py:function" | a name of the library, weight: 2, further settings of the function}."""
        if isinstance(entries, (str, dict)):
            entries = [entries]
        if not isinstance(entries, Sequence) or not entries:
            raise UserError(f"rubric must be a list of rewards, such as [{preset_names()[0]}], not {entries!r}")
        return cls(*(_from_entry(entry, folder) for entry in entries))

    def _add(self, scorer: Scorer, weight: float | None) -> None:
        if isinstance(scorer, str):
            scorer = _rubric_or_reward(load_reward(scorer))
        if isinstance(scorer, Rubric):
            factor = 1.0 if weight is None else checked_weight(weight, scorer.name or "rubric")
            prefix = f"{scorer.name}/" if scorer.name else ""
            for reward, name, own in zip(scorer.rewards, scorer.names, scorer.weights, strict=True):
                self._append(reward, prefix + name, own * factor)
        else:
            reward = as_reward(scorer)
            self._append(reward, reward.name, reward.weight if weight is None else checked_weight(weight, reward.name))

    def _append(self, reward: RewardFunction, name: str, weight: float) -> None:
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.rewards.append(reward)
        self.names.append(unique)
        self.weights.append(weight)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest total; None unless every reward declares its own range."""
        low = high = 0.0
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            if reward.range is None:
                return None
            ends = sorted(end * weight for end in reward.range)
            low, high = low + ends[0], high + ends[1]
        return low, high

    def columns_needed(self) -> list[str]:
        """Columns that some reward cannot do without."""
        return list(dict.fromkeys(column for reward in self.rewards for column in reward.required))

    def check_columns(self, available: Iterable[str]) -> None:
        """Raises UserError that names the reward, the column it asks for and the nearest one that exists."""
        known = list(available)
        for reward in self.rewards:
            reward.check_columns(known)

    def score(self, groups: list[Group], *, trainer_state: Any = None) -> Notes:
        """Scores every rollout in place; returns what the rewards logged. Raises RewardError when one is broken."""
        notes = Notes()
        scores = score_all(self.rewards, groups, trainer_state, notes)  # [reward][N]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for index, rollout in enumerate(rollouts):
            rollout.scores = {name: scores[k][index] for k, name in enumerate(self.names)}
            rollout.reward = self.total(rollout.scores)
        return notes

    def total(self, scores: dict[str, float | None]) -> float | None:
        """The weighted sum of the scores that exist; None when none does."""
        parts = [weight * score for name, weight in zip(self.names, self.weights, strict=True) if (score := scores[name]) is not None]
        return sum(parts) if parts else None

    def can_decide(self) -> bool:
        return any(reward.decides for reward in self.rewards)

    def is_right(self, rollout: Rollout) -> bool | None:
        """Full marks from every reward that decides right or wrong; None when one of them could not score, or none decides."""
        marks = [
            (rollout.scores[name], reward.range) for reward, name in zip(self.rewards, self.names, strict=True) if reward.decides and reward.range
        ]
        if not marks or any(score is None for score, _ in marks):
            return None
        return all(score == top for score, (_, top) in marks)


def _rubric_or_reward(loaded: list[RewardFunction] | RewardFunction) -> Rubric | RewardFunction:
    return Rubric(*loaded) if isinstance(loaded, list) else loaded


def _from_entry(entry: Any, folder: str | None) -> Scorer | tuple[Scorer, float]:
    if isinstance(entry, str):
        return _rubric_or_reward(load_reward(entry, folder=folder))
    if not isinstance(entry, dict) or "reward" not in entry:
        raise UserError(f"an entry of the rubric is a name or {{reward: ..., weight: ...}}, not {entry!r}")
    settings = {key: value for key, value in entry.items() if key not in ("reward", "weight")}
    scorer = _rubric_or_reward(load_reward(entry["reward"], settings, folder=folder))
    return scorer if "weight" not in entry else (scorer, entry["weight"])
