"""CPO (Xu et al. 2024, arXiv:2401.08417) and its relatives: preferences without a reference, by log-probs themselves.

    loss = -log sigmoid(beta * (log p(chosen) - log p(rejected))) + cpo_alpha * NLL(chosen)

SimPO (Meng et al. 2024, arXiv:2405.14734) compares means over tokens, which must differ by gamma / beta:
CPOConfig(loss_type="simpo", cpo_alpha=0.0). AlphaPO shapes SimPO's rewards. The NLL is the mean over the chosen
completions' tokens of the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from posttrain.errors import UserError
from posttrain.losses.reference_free import CPO_LOSSES, OF_MEANS, CPOOptions, shaped_rewards
from posttrain.trainers.core.config import setting, settings
from posttrain.trainers.offline.config import OfflineConfig, check_choice
from posttrain.trainers.offline.reference_free import ReferenceFreeTrainer

__all__ = ["CPOConfig", "CPOTrainer"]


@settings
@dataclass
class CPOConfig(OfflineConfig):
    """Names and defaults are TRL's."""

    learns_from_pairs: ClassVar[bool] = True

    beta: float = setting(0.1, "How much a difference of log-probs counts. SimPO's are means over tokens: 2.0 to 2.5 is usual there.")
    loss_type: str = setting("sigmoid", f"{', '.join(CPO_LOSSES)}, or alphapo: simpo with alpha and without the NLL.")
    label_smoothing: float = setting(0.0, "The fraction of labels that are thought to be wrong; for sigmoid and simpo.")
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
            raise UserError(f"label_smoothing={self.label_smoothing}: a fraction of wrong labels, from 0 to less than 0.5")


class CPOTrainer(ReferenceFreeTrainer):
    """`CPOTrainer(model, args=CPOConfig(...), train_dataset=rows).train()`. Rows have chosen and rejected, with or
    without prompt."""

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
