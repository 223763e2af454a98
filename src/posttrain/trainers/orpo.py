"""ORPO (Hong et al. 2024, arXiv:2403.07691): fine-tuning and preference in one loss, without a reference.

    loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)),   odds(y) = p / (1 - p),   log p the mean over y's tokens

The NLL is the mean over the chosen completions' tokens of the update; a prompt is never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from posttrain.losses.reference_free import log_odds_ratio, orpo
from posttrain.trainers.core.config import setting, settings
from posttrain.trainers.offline.config import OfflineConfig
from posttrain.trainers.offline.reference_free import ReferenceFreeTrainer

__all__ = ["ORPOConfig", "ORPOTrainer"]


@settings
@dataclass
class ORPOConfig(OfflineConfig):
    """Names and defaults are TRL's."""

    learns_from_pairs: ClassVar[bool] = True

    beta: float = setting(0.1, "Weight of the odds ratio beside the NLL (lambda in the paper).")


class ORPOTrainer(ReferenceFreeTrainer):
    """`ORPOTrainer(model, args=ORPOConfig(...), train_dataset=rows).train()`. Rows have chosen and rejected, with or
    without prompt."""

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
