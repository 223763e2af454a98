"""KTO: completions judged one by one, good or bad, instead of in pairs (Ethayarajh et al. 2024, arXiv:2402.01306). Pure
tensors, (n,) in, (n,) out.

n completions. A log-ratio is log pi(y|x) - log ref(y|x), summed over the completion. The mean over the update's
completions is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kto(ratios: Tensor, is_good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta (ratio - kl)) for a good completion, 1 - sigmoid(beta (kl - ratio)) for a bad one. Eq. 8, before
    the weights.

    `kl` () is the policy's estimated distance from its reference: what a completion gains or loses is measured against
    it.
    """
    gain = beta * (ratios - kl.detach())
    return torch.where(is_good, 1 - torch.sigmoid(gain), 1 - torch.sigmoid(-gain))


def apo_zero_unpaired(ratios: Tensor, is_good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Good completions up, bad ones down, measured against 0. APO, D'Oosterlinck et al. 2024, eq. 7, completion by
    completion."""
    chance = torch.sigmoid(beta * ratios)
    return torch.where(is_good, 1 - chance, chance)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def estimated_kl(total: float, count: int) -> float:
    """The mean log-ratio of mismatched completions, never below 0. Ethayarajh et al. 2024, section 4.1."""
    return max(0.0, total / max(count, 1))
