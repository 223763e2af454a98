"""Preference learning without a reference: ORPO, and as its neighbours CPO, SimPO and AlphaPO.

ORPO (Hong et al. 2024, arXiv:2403.07691) is fine-tuning and preference in one loss:

    loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)),   odds(y) = p / (1 - p),   log p the mean over y's tokens

CPO (Xu et al. 2024, arXiv:2401.08417) compares log-probs themselves: loss = -log sigmoid(beta * (log p(chosen) - log p(rejected))) + cpo_alpha * NLL(chosen).
SimPO (Meng et al. 2024, arXiv:2405.14734) compares means over tokens, which must differ by gamma / beta: CPOConfig(loss_type="simpo", cpo_alpha=0.0).

An NLL is the mean over the chosen completions' tokens of the update; a prompt is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.stream import PackItem
from posttrain.errors import UserError
from posttrain.losses.reference_free import CPO_LOSSES, OF_MEANS, CPOOptions, log_odds_ratio, orpo, shaped_rewards
from posttrain.trainers.core.config import as_config, setting, settings
from posttrain.trainers.offline.config import OfflineConfig, check_choice
from posttrain.trainers.offline.pairs import FORMATS, PairBatch, encode_pairs, note_pairs, pair_parts
from posttrain.trainers.offline.trainer import Example, OfflineTrainer

__all__ = ["CPOConfig", "CPOTrainer", "ORPOConfig", "ORPOTrainer"]


@settings
@dataclass
class ORPOConfig(OfflineConfig):
    """Names and defaults are TRL's."""

    learns_from_pairs: ClassVar[bool] = True

    beta: float = setting(0.1, "Weight of the odds ratio beside the NLL (lambda in the paper).")


@settings
@dataclass
class CPOConfig(OfflineConfig):
    """Names and defaults are TRL's."""

    learns_from_pairs: ClassVar[bool] = True

    beta: float = setting(0.1, "How much a difference of log-probs counts. SimPO's are means over tokens: 2.0 to 2.5 is usual there.")
    loss_type: str = setting("sigmoid", f"{', '.join(CPO_LOSSES)}, or alphapo: simpo with alpha and without the NLL.")
    label_smoothing: float = setting(0.0, "The share of labels that are thought to be wrong; for sigmoid and simpo.")
    cpo_alpha: float = setting(1.0, "Weight of the chosen completions' NLL.")
    simpo_gamma: float = setting(0.5, "The margin that simpo asks for.")
    alpha: float = setting(0.0, "Shape of AlphaPO's reward, (1 - p^-alpha) / alpha. 0 is log p.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        check_choice("loss_type", self.loss_type, [*CPO_LOSSES, "alphapo"])
        self.check_read([self.loss_type], {"label_smoothing": ("sigmoid", "simpo"), "simpo_gamma": ("simpo",)})
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing}: a share of wrong labels, from 0 to less than 0.5")


class FreeBatch(PairBatch):
    """Pairs; `share` is 1 / pairs of the update, `token_share` 1 / chosen tokens of it, both times the number of processes."""

    def __init__(self, items: list[PackItem], device: torch.device, share: float, token_share: float) -> None:
        super().__init__(items, device)
        self.share, self.token_share = share, token_share

    def of(self, items: list[PackItem]) -> FreeBatch:
        return FreeBatch(items, self.stream.device, self.share, self.token_share)


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

    def encode(self, rows: list[Any]) -> list[Example]:
        return encode_pairs(self, rows)

    def batches(self, mine: list[Example], everyone: list[Example]) -> Iterator[FreeBatch]:
        world, tokens = self.args.world_size, sum(len(example.completions[0]) for example in everyone)
        for items in pair_parts(mine, self.token_budget):
            yield FreeBatch(items, self.args.device, world / len(everyone), world / tokens)

    def loss(self, model: nn.Module, batch: FreeBatch) -> torch.Tensor:
        answer = self.logprobs(model, batch.stream, want_argmax=True)  # (2n, T)
        sums = self.row_sums(answer.logps, batch.stream).view(-1, 2)  # (n, 2)
        logps = sums / batch.lengths if self.of_means else sums
        per_pair, rewards = self.compare(logps)
        nll = -sums[:, 0].sum()
        self.note_tokens(answer, batch.stream)
        note_pairs(self.metrics, rewards, logps)
        self.metrics.note("nll_loss", nll.detach(), batch.lengths[:, 0].sum())
        return per_pair.sum() * batch.share + self.nll_weight * nll * batch.token_share


class ORPOTrainer(ReferenceFreeTrainer):
    """`ORPOTrainer(model, args=ORPOConfig(...), train_dataset=rows).train()`. Rows have chosen and rejected, with or without prompt."""

    title = "ORPO"
    config_class = ORPOConfig
    nll_weight = 1.0
    of_means = True

    def compare(self, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = logps.unbind(dim=1)
        losses = orpo(chosen, rejected)
        self.metrics.note("log_odds_ratio", -losses.detach().sum(), len(losses))  # its name in TRL, though it is the log sigmoid of that
        self.metrics.note("log_odds_chosen", log_odds_ratio(chosen, rejected).detach().sum(), len(losses))
        return self.args.beta * losses, self.args.beta * logps


class CPOTrainer(ReferenceFreeTrainer):
    """`CPOTrainer(model, args=CPOConfig(...), train_dataset=rows).train()`. Rows have chosen and rejected, with or without prompt."""

    title = "CPO"
    config_class = CPOConfig
    args: CPOConfig

    @property
    def nll_weight(self) -> float:  # type: ignore[override]
        return self.args.cpo_alpha

    @property
    def of_means(self) -> bool:  # type: ignore[override]
        return self.args.loss_type in OF_MEANS

    def compare(self, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args = self.args
        options = CPOOptions(beta=args.beta, label_smoothing=args.label_smoothing, simpo_gamma=args.simpo_gamma)
        rewards = shaped_rewards(logps, args.alpha)  # (n, 2)
        return CPO_LOSSES[args.loss_type](rewards[:, 0] - rewards[:, 1], options), args.beta * rewards
