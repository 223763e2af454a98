"""Who is compared with whom in AOT: values of equal rank in two sorted lists, over the whole update, so that no
micro-batch changes a match.

N pairs of an update. The matches are found before the first backward and are constants of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transport:
    """For each pair, the values it is compared with. Detached."""

    ref_margin: Tensor  # the reference's margin that ranks as this pair's does under the policy
    rejected_ratio: Tensor  # the rejected log-ratio that ranks as this pair's chosen one does
    chosen_ratio: Tensor  # the chosen log-ratio that ranks as this pair's rejected one does

    @classmethod
    def between(cls, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Transport:
        """The matches of all N pairs of an update, from their log-probs, (N,) each."""
        chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
        return cls(
            ref_margin=_of_same_rank(chosen - rejected, ref_chosen - ref_rejected),
            rejected_ratio=_of_same_rank(chosen_ratio, rejected_ratio),
            chosen_ratio=_of_same_rank(rejected_ratio, chosen_ratio),
        )

    def of(self, places: Tensor) -> Transport:
        """The matches of some of the pairs."""
        return Transport(self.ref_margin[places], self.rejected_ratio[places], self.chosen_ratio[places])

    def to(self, like: Tensor | torch.device) -> Transport:
        """On a device; in the precision of a tensor, too."""
        return Transport(self.ref_margin.to(like), self.rejected_ratio.to(like), self.chosen_ratio.to(like))


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` the one of `others` with its rank; equal values rank in order."""
    ranks = torch.argsort(torch.argsort(values.detach(), stable=True))
    return others.detach().sort(stable=True).values[ranks]
