"""Preference pairs as DPO, ORPO and CPO see them: a group of two, chosen and rejected, behind one prompt.

n pairs of a micro-batch; rows 2i and 2i + 1 of its stream are chosen and rejected of its i-th pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from posttrain.data.chat import encode_preference
from posttrain.data.formats import IMPLICIT_PREFERENCE, PREFERENCE
from posttrain.data.stream import PackItem, split
from posttrain.errors import at_row
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.offline.rows import EncodedRow
from posttrain.trainers.offline.trainer import OfflineTrainer

if TYPE_CHECKING:
    from posttrain.trainers.core.metrics import Metrics

FORMATS = (PREFERENCE, IMPLICIT_PREFERENCE)  # without a prompt it is what chosen and rejected begin with


class PairBatch(MicroBatch):
    """A stream of n pairs. `places` (n,): which of this process's pairs they are."""

    keeps_groups = True

    def __init__(self, items: list[PackItem], device: torch.device) -> None:
        super().__init__(items, device)
        self.places = self.stream.row_ids[::2] // 2
        self.lengths = torch.tensor([[len(completion) for completion in item.completions] for item in items], device=device)  # (n, 2)

    @property
    def mask(self) -> torch.Tensor:
        """(2n, T) true where a token is trained."""
        return torch.arange(self.stream.shape[1], device=self.lengths.device) < self.lengths.view(-1, 1)


def encode_pairs(trainer: OfflineTrainer, rows: list[Mapping[str, Any]]) -> list[EncodedRow]:
    examples = []
    for number, row in enumerate(rows):
        with at_row(number):
            prompt_ids, *pair = encode_preference(trainer.tokenizer, row["prompt"], row["chosen"], row["rejected"], **trainer.template_options(row))
        room = trainer.room(prompt_ids, number)
        examples.append(EncodedRow(prompt_ids, [completion[:room] for completion in pair]))
    return trainer.to_compare(examples)


def pair_parts(examples: list[EncodedRow], max_tokens: int) -> list[list[PackItem]]:
    """The pairs of each micro-batch; none is split."""
    return split([PackItem(example.prompt_ids, example.completions) for example in examples], max_tokens, whole=True)


def note_pairs(metrics: Metrics, rewards: torch.Tensor, logps: torch.Tensor) -> None:
    """Implicit rewards and log-probs of n pairs, (n, 2) each: chosen, rejected."""
    n, rewards, logps = len(rewards), rewards.detach(), logps.detach()
    for column, name in enumerate(("chosen", "rejected")):
        metrics.note(f"rewards/{name}", rewards[:, column].sum(), n)
        metrics.note(f"logps/{name}", logps[:, column].sum(), n)
    metrics.note("rewards/accuracies", (rewards[:, 0] > rewards[:, 1]).sum(), n)
    metrics.note("rewards/margins", (rewards[:, 0] - rewards[:, 1]).sum(), n)
