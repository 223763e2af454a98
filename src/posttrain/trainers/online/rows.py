"""From scored groups to micro-batches: rows, slices of a rollout, and the counts an update is normalised by.

A rollout (GenerationBatch) may feed several optimizer steps (`steps_per_generation`, `num_iterations`): it is cut into
slices of whole rows in group order. Every process knows all counts, holds its own rows, and the group stays the unit of
packing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from posttrain.data.stream import PackItem, split
from posttrain.losses.policy import Objective
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.core.ranks import gather_json
from posttrain.types import Completion, Group

_OLD_NAMES = {"sampler_logps": "rollout_logps"}  # of the fields of rows in older checkpoints


@dataclass
class Row:
    """One completion on its way to an update. Per-token lists have the length of `token_ids`."""

    group: int  # index of its group within the rollout, over all processes
    index: int  # of the completion within its group
    prompt_ids: list[int]
    token_ids: list[int]
    trained: list[bool]  # sampled by the policy, and not masked for having been cut
    rollout_logps: list[float]  # of the policy that sampled, as the engine computed them
    advantage: float
    old_logps: list[float] | None = None  # frozen before the first update; None: the new ones, detached
    ref_logps: list[float] | None = None
    token_advantages: list[float] | None = None  # where every token has its own (PPO); None: `advantage` holds for all of them
    returns: list[float] | None = None  # what the values of the states before each token are trained towards; None: there are no values
    old_values: list[float] | None = None  # frozen before the first update; None: there are no values
    last_value: float = 0.0  # of the state after the last token
    recorded_at: int = 0  # the step of the record that it was collected for,
    recorded_group: int = 0  # and the number of its group there

    @property
    def length(self) -> int:
        """Trained tokens."""
        return sum(self.trained)

    @classmethod
    def of(cls, number: int, index: int, completion: Completion, *, is_trained: bool) -> Row:
        """A completion before its advantage is known. Not trained: none of its tokens is."""
        return cls(
            group=number,
            index=index,
            prompt_ids=completion.prompt_ids,
            token_ids=completion.token_ids,
            trained=completion.sampled if is_trained else [False] * len(completion.sampled),
            rollout_logps=completion.logps,
            advantage=0.0,
        )


@dataclass
class GenerationBatch:
    """One rollout: this process's rows, and every process's counts, handed out in `slices` slices, and again in every
    further iteration."""

    rows: list[Row]  # this process's, in group order
    lengths: list[list[int]]  # [groups][rows] trained tokens of every completion, over all processes
    slices: int  # steps_per_generation
    used: int = 0  # slices handed out so far, over all iterations

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def next_slice(self) -> Slice:
        """The rows of the next micro-step; starts again after the last slice (num_iterations)."""
        order = places(self.lengths)
        at = self.used % self.slices
        self.used += 1
        chosen = order[at * len(order) // self.slices : (at + 1) * len(order) // self.slices]
        wanted = set(chosen)
        return Slice(
            rows=[row for row in self.rows if (row.group, row.index) in wanted],
            num_rows=len(chosen),
            num_tokens=sum(self.lengths[group][index] for group, index in chosen),
            tokens_per_slice=self.num_tokens / self.slices,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> GenerationBatch:
        return cls(**(state | {"rows": [Row(**{_OLD_NAMES.get(name, name): value for name, value in row.items()}) for row in state["rows"]]}))


@dataclass(frozen=True)
class Slice:
    """What one micro-step contributes to an update."""

    rows: list[Row]  # this process's
    num_rows: int  # over all processes
    num_tokens: int  # over all processes
    tokens_per_slice: float  # the rollout's tokens over its slices: what DAPO's normaliser expects of this one


def rows_of(groups: list[tuple[int, Group]], is_trained: Callable[[Completion], bool]) -> list[Row]:
    """The completions of numbered groups, in order. Those that are not trained stay in the counts of rows, not of
    tokens."""
    return [
        Row.of(number, index, completion, is_trained=is_trained(completion))
        for number, group in groups
        for index, completion in enumerate(group.completions)
    ]


def gathered(rows: list[Row], values: list[Any], device: torch.device) -> tuple[list[Any], list[list[int]]]:
    """One value (JSON) for each row of this process -> those of all rows of all processes in order, and the trained
    lengths of each group. Collective: every process calls it."""
    mine = [[row.group, row.index, row.length, value] for row, value in zip(rows, values, strict=True)]
    everyone = sorted((entry for part in gather_json(mine, device) for entry in part), key=lambda entry: entry[:2])
    lengths: dict[int, list[int]] = {}
    for number, _, length, _ in everyone:
        lengths.setdefault(number, []).append(length)
    assert list(lengths) == list(range(len(lengths))), "groups are numbered without gaps"
    return [entry[3] for entry in everyone], list(lengths.values())


def places(lengths: list[list[int]]) -> list[tuple[int, int]]:
    """(group, index within it) of every completion, in order."""
    return [(group, index) for group, rows in enumerate(lengths) for index in range(len(rows))]


def weighted_rows(chosen: list[Slice], objective: Objective, *, max_completion_length: int) -> list[tuple[Row, float]]:
    """This process's rows with trained tokens, each with its weight in the sum of an update that consists of the slices
    `chosen`."""
    num_rows = sum(part.num_rows for part in chosen)
    num_tokens = sum(part.num_tokens for part in chosen)
    weighted = []
    for part in chosen:
        tokens = part.tokens_per_slice * len(chosen) if objective.tokens_of == "generation" else num_tokens
        lengths = torch.tensor([row.length for row in part.rows], dtype=torch.float64)
        weights = objective.row_weights(lengths, num_rows=num_rows, num_tokens=tokens, max_completion_length=max_completion_length)
        weighted += [(row, weight) for row, weight in zip(part.rows, weights.tolist(), strict=True) if row.length]
    return weighted


@dataclass(frozen=True)
class PolicyUpdate:
    """What the micro-batches of one update have in common, over all processes."""

    num_tokens: int  # trained tokens
    entropy_threshold: torch.Tensor | None = None  # the policy term counts for tokens of at least this entropy; None: for all
    num_policy_tokens: int = 0  # tokens for which it counts


class PolicyBatch(MicroBatch):
    """A stream of rows with what a policy objective needs. B rows, T longest completion; B and T are the stream's.

    Log-probs and advantages are float32 (`dtype`), or float64 for a model that is.
    """

    def __init__(
        self,
        parts: list[PackItem],
        rows: list[Row],
        weights: list[float],
        device: torch.device,
        dtype: torch.dtype,
        update: PolicyUpdate | None = None,
    ) -> None:
        super().__init__(parts, device)
        self._of = lambda items: PolicyBatch(items, rows, weights, device, dtype, update)
        self.update = update  # None: of no update, only evaluated
        ids = self.stream.row_ids.tolist()
        self.rows = [rows[i] for i in ids]  # in the stream's order
        T = self.stream.shape[1]
        self.mask = _padded([row.trained for row in self.rows], T, torch.bool, device)  # (B, T)
        by_token = self._optional([row.token_advantages for row in self.rows], T, dtype, device)  # (B, T) or None
        by_row = torch.tensor([row.advantage for row in self.rows], dtype=dtype, device=device)  # (B,)
        self.advantages = by_row if by_token is None else by_token
        self.weights = torch.tensor([weights[i] for i in ids], dtype=dtype, device=device)  # (B,)
        self.rollout_logps = _padded([row.rollout_logps for row in self.rows], T, dtype, device)  # (B, T)
        self.old_logps = self._optional([row.old_logps for row in self.rows], T, dtype, device)  # (B, T) or None
        self.ref_logps = self._optional([row.ref_logps for row in self.rows], T, dtype, device)  # (B, T) or None
        self.returns = self._optional([row.returns for row in self.rows], T, dtype, device)  # (B, T) or None
        self.old_values = self._optional([row.old_values for row in self.rows], T, dtype, device)  # (B, T) or None

    def of(self, items: list[PackItem]) -> PolicyBatch:
        return self._of(items)

    @staticmethod
    def _optional(lists: list[list[float] | None], T: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        given = [values for values in lists if values is not None]
        return _padded(given, T, dtype, device) if len(given) == len(lists) else None


def policy_batches(
    rows: list[Row],
    weights: list[float],
    *,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    update: PolicyUpdate | None = None,
) -> list[PolicyBatch]:
    """Rows (with a weight each) packed by group into streams of at most `max_tokens`, or one completion where that
    alone is longer."""
    return [PolicyBatch(part, rows, weights, device, dtype, update) for part in split(_items(rows), max_tokens)]


def _items(rows: list[Row]) -> list[PackItem]:
    """Neighbouring rows of one group share their prompt."""
    items = []
    for _, numbered in itertools.groupby(enumerate(rows), key=lambda pair: pair[1].group):
        ids, members = zip(*numbered, strict=True)
        items.append(PackItem(members[0].prompt_ids, [row.token_ids for row in members], [row.trained for row in members], ids))
    return items


def _padded(lists: Sequence[Sequence[Any]], T: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, T), zero behind each row's end."""
    out = torch.zeros(len(lists), T, dtype=dtype)
    for i, values in enumerate(lists):
        out[i, : len(values)] = torch.tensor(values, dtype=dtype)
    return out.to(device)
