"""A rubric: small rewards stacked with weights. It fills `completion.scores` (unweighted) and `completion.reward` (the
weighted total).

It knows nothing of advantages or losses. A completion that no reward could score has reward None, not 0. A reward with
weight 0 is a monitor: it is scored, but not added to the total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Union

from posttrain.errors import RewardError, UserError
from posttrain.rewards.execution.calls import LARGEST
from posttrain.rewards.failures import BASE, POLICY_KEYS, Failure, FailurePolicy
from posttrain.rewards.loading import load_reward, preset_names
from posttrain.rewards.reward import RewardFunction, as_reward, checked_weight
from posttrain.rewards.scoring import Executors, Report, Scoring
from posttrain.types import Completion, Group

Scorer = Union[Callable[..., Any], RewardFunction, "Rubric", str]


class Rubric:
    """`Rubric(has_number, (is_right, 2.0), another_rubric, "gsm8k", weights=None, name=None)`.

    A weight given here, in a pair or in `weights`, replaces a function's own and multiplies those of a nested rubric.
    Names are unique: a second `f` is called `f_2`; those of a rubric with a name are written `name/f`. policy: timeout,
    on_error, retries, workers of all rewards that do not say their own (see FailurePolicy).
    """

    def __init__(
        self, *rewards: Scorer | tuple[Scorer, float], weights: Sequence[float] | None = None, name: str | None = None, **policy: Any
    ) -> None:
        if not rewards:
            raise UserError("a rubric needs at least one reward")
        if weights is not None and len(weights) != len(rewards):
            raise UserError(f"the rubric has {len(rewards)} rewards but {len(weights)} weights; give one weight for each reward")
        self.name = name
        self._policy = FailurePolicy.of(policy)
        self._executors = Executors()
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
        """From a recipe: preset names, or {reward: "file.py:function" | a name of the library, weight: 2, further
        settings of the function}."""
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
        if reward.check is not None:
            reward.check()
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        policy = reward.policy.over(self._policy)
        if (policy.workers is not None or policy.memory_mb is not None) and reward.source is None:
            raise UserError(
                f"reward '{name}' asks for workers, but no other process can find it; put it into a file or module and name it file.py:function"
            )
        self.rewards.append(reward if policy == reward.policy else replace(reward, policy=policy))
        self.names.append(unique)
        self.weights.append(weight)

    @property
    def range(self) -> tuple[float, float] | None:
        """Lowest and highest total; None unless every reward declares its own range."""
        low = high = 0.0
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            ends = _weighted_range(reward, weight)
            if ends is None:
                return None
            low, high = low + ends[0], high + ends[1]
        return low, high

    def describe(self) -> str:
        """A table, one line a reward: name, weight, what it can add to the total, whether it decides right or wrong,
        the columns it reads."""
        rows = [
            (name, f"x {weight:g}", _span(_weighted_range(reward, weight)), _notes(reward))
            for reward, name, weight in zip(self.rewards, self.names, self.weights, strict=True)
        ]
        rows.append(("reward", "", self.span(), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows)

    def span(self) -> str:
        """The range of the total in words: "-4 to +4", or that it is not declared."""
        return _span(self.range)

    def columns_needed(self) -> list[str]:
        """Columns that some reward cannot do without."""
        return list(dict.fromkeys(column for reward in self.rewards for column in reward.required))

    def check_columns(self, available: Iterable[str]) -> None:
        """Raises UserError that names the reward, the column it asks for and the nearest one that exists."""
        known = list(available)
        for reward in self.rewards:
            reward.check_columns(known)

    def scoring(self, *, trainer_state: Any = None, default: FailurePolicy = BASE) -> Scoring:
        """For scoring groups while others are still made: `with rubric.scoring() as batch: batch.add(group) ...;
        rubric.fill(groups, batch)`.

        default: what counts for rewards whose policy leaves something open.
        """
        policies = [reward.policy.over(default).over(BASE) for reward in self.rewards]
        return Scoring(self.rewards, self.names, policies, self._executors, trainer_state)

    def score(self, groups: list[Group], *, trainer_state: Any = None) -> Report:
        """Scores every rollout in place. Raises RewardError when a reward is broken and its policy does not say
        otherwise."""
        with self.scoring(trainer_state=trainer_state) as batch:
            return self.fill(groups, batch)

    def fill(self, groups: list[Group], batch: Scoring) -> Report:
        """Waits for the scores and writes them into every rollout. If its environment or a reward (not a monitor) broke
        over it, its reward is None: a total without a part would be misleading."""
        scores, report = batch.finish(groups)  # [reward][N]
        completions = [completion for group in groups for completion in group.completions]
        for completion, *given in zip(completions, *scores, strict=True):
            completion.scores = {name: None if isinstance(score, Failure) else score for name, score in zip(self.names, given, strict=True)}
            parts = [score for score, weight in zip(given, self.weights, strict=True) if weight]
            how = [completion.broken] if completion.broken is not None else [score.message for score in parts if isinstance(score, Failure)]
            report.broken += how[:1]
            completion.reward = None if how else self.total(completion.scores)
        return report

    def close(self) -> None:
        """Ends the processes and threads that rewards ran in. Scoring again starts new ones."""
        self._executors.close()

    def total(self, scores: dict[str, float | None]) -> float | None:
        """The weighted sum of the scores that exist; None when none does. Monitors (weight 0) are no part of it."""
        parts = [weight * score for name, weight in zip(self.names, self.weights, strict=True) if weight and (score := scores[name]) is not None]
        total = sum(parts)
        if abs(total) > LARGEST:
            raise RewardError(f"weighted scores add up to {total:g}, which cannot be averaged and squared: {scores}. Use smaller weights or scores")
        return total if parts else None

    def can_decide(self) -> bool:
        return any(reward.decides for reward in self.rewards)

    def is_right(self, completion: Completion) -> bool | None:
        """Full marks from every reward that decides right or wrong; None when one of them could not score, the
        environment broke, or none decides."""
        marks = [
            (completion.scores[name], reward.range) for reward, name in zip(self.rewards, self.names, strict=True) if reward.decides and reward.range
        ]
        if not marks or completion.broken is not None or any(score is None for score, _ in marks):
            return None
        return all(score == top for score, (_, top) in marks)


def _weighted_range(reward: RewardFunction, weight: float) -> tuple[float, float] | None:
    if reward.range is None:
        return None
    if weight == 0:
        return 0.0, 0.0
    low, high = sorted(end * weight for end in reward.range)
    return low, high


def _span(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return "range not declared"
    low, high = (f"{end:+g}" if end else "0" for end in ends)
    return f"{low} to {high}"


def _notes(reward: RewardFunction) -> str:
    decides = ["decides right or wrong"] if reward.decides else []
    return ", ".join([*decides, *(f"reads '{column}'" for column in reward.required)])


def _rubric_or_reward(loaded: list[RewardFunction] | RewardFunction) -> Rubric | RewardFunction:
    return Rubric(*loaded) if isinstance(loaded, list) else loaded


def _from_entry(entry: Any, folder: str | None) -> Scorer | tuple[Scorer, float]:
    if isinstance(entry, str):
        return _rubric_or_reward(load_reward(entry, folder=folder))
    if not isinstance(entry, dict) or "reward" not in entry:
        raise UserError(f"an entry of the rubric is a name or {{reward: ..., weight: ...}}, not {entry!r}")
    policy = FailurePolicy(**{key: entry[key] for key in POLICY_KEYS if key in entry})
    settings = {key: value for key, value in entry.items() if key not in ("reward", "weight", *POLICY_KEYS)}
    loaded = load_reward(entry["reward"], settings, folder=folder)
    governed = [replace(reward, policy=policy.over(reward.policy)) for reward in (loaded if isinstance(loaded, list) else [loaded])]
    scorer = Rubric(*governed) if isinstance(loaded, list) else governed[0]
    return scorer if "weight" not in entry else (scorer, entry["weight"])
