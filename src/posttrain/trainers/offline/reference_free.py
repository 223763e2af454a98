"""What trainers on pairs without a reference share: an NLL of the chosen completions beside a loss of each pair (ORPO,
CPO and its relatives)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.stream import PackItem
from posttrain.trainers.core.config import as_config
from posttrain.trainers.offline.config import OfflineConfig
from posttrain.trainers.offline.pairs import FORMATS, PairBatch, encode_pairs, note_pairs, pair_parts
from posttrain.trainers.offline.rows import EncodedRow
from posttrain.trainers.offline.trainer import OfflineTrainer


class ReferenceFreeBatch(PairBatch):
    """Pairs. per_pair is 1 / pairs of the update, per_token 1 / chosen tokens of it, both times the number of
    processes."""

    def __init__(self, items: list[PackItem], device: torch.device, per_pair: float, per_token: float) -> None:
        super().__init__(items, device)
        self.per_pair, self.per_token = per_pair, per_token

    def of(self, items: list[PackItem]) -> ReferenceFreeBatch:
        return ReferenceFreeBatch(items, self.stream.device, self.per_pair, self.per_token)


class ReferenceFreeTrainer(OfflineTrainer):
    """A weighted NLL of the chosen completions and a loss of each pair, which `compare` says."""

    formats = FORMATS
    config_class: ClassVar[type[OfflineConfig]]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OfflineConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        compute_metrics: Any = None,
    ) -> None:
        super().__init__(
            model,
            as_config(args, self.config_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            refused={"data_collator": data_collator, "compute_metrics": compute_metrics},
        )

    nll_weight: float
    of_means: bool  # completions are compared by the mean log-prob of their tokens, otherwise by the sum

    @property
    def learns_from_chosen(self) -> bool:
        return self.nll_weight != 0

    def compare(self, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (n,) and rewards (n, 2) of n pairs, from the log-probs (n, 2) of chosen and rejected."""
        raise AssertionError(f"{type(self).__name__} does not say how it compares")

    def encode(self, rows: list[Any]) -> list[EncodedRow]:
        return encode_pairs(self, rows)

    def batches(self, mine: list[EncodedRow], everyone: list[EncodedRow]) -> Iterator[ReferenceFreeBatch]:
        world, tokens = self.args.world_size, sum(len(example.completions[0]) for example in everyone)
        for items in pair_parts(mine, self.token_budget):
            yield ReferenceFreeBatch(items, self.args.device, world / len(everyone), world / tokens)

    def loss(self, model: nn.Module, batch: ReferenceFreeBatch) -> torch.Tensor:
        answer = self.logprobs(model, batch.stream, want_argmax=True)  # (2n, T)
        sums = self.row_sums(answer.logps, batch.stream).view(-1, 2)  # (n, 2)
        logps = sums / batch.lengths if self.of_means else sums
        losses, rewards = self.compare(logps)
        nll = -sums[:, 0].sum()
        self.note_tokens(answer, batch.stream)
        note_pairs(self.metrics, rewards, logps)
        self.metrics.note("nll_loss", nll.detach(), batch.lengths[:, 0].sum())
        return losses.sum() * batch.per_pair + self.nll_weight * nll * batch.per_token
