"""Preference losses without a reference: ORPO, CPO, SimPO, AlphaPO. Pure tensors, one value a pair; taking the mean is
the caller's job.

n pairs. Which log-prob of a completion goes in, its sum or its mean over tokens, is told with each loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(n,): log of odds(chosen) / odds(rejected), odds(y) = p / (1 - p), from mean log-probs (n,). ORPO, Hong et al.
    2024, eq. 4."""
    return chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012); x = 0, a certain completion, is kept off by one
    rounding step."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    safe = torch.where(near, x, -1.0)  # each branch sees only what it is good for: the other's gradient would be NaN
    return torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(n,): -log sigmoid(log odds ratio) of mean log-probs. Eq. 7; the caller adds the chosen's NLL and weighs this by
    beta (lambda there)."""
    return -F.logsigmoid(log_odds_ratio(chosen, rejected))


@dataclass(frozen=True)
class CPOOptions:
    """Settings of the CPO family."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


def shaped_rewards(logps: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha, which is log p at alpha = 0. AlphaPO, Gupta et al. 2025, arXiv:2501.03884."""
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def _logistic(margin: Tensor, options: CPOOptions) -> Tensor:
    wrong = options.label_smoothing
    return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)


def sigmoid(margin: Tensor, options: CPOOptions) -> Tensor:
    """-log sigmoid(beta margin) of summed log-probs. CPO, Xu et al. 2024, eq. 3."""
    return _logistic(options.beta * margin, options)


def hinge(margin: Tensor, options: CPOOptions) -> Tensor:
    """max(0, 1 - beta margin) of summed log-probs."""
    return torch.relu(1 - options.beta * margin)


def ipo(margin: Tensor, options: CPOOptions) -> Tensor:
    """(margin - 1 / (2 beta))^2 of mean log-probs."""
    return (margin - 1 / (2 * options.beta)).square()


def simpo(margin: Tensor, options: CPOOptions) -> Tensor:
    """-log sigmoid(beta margin - gamma) of mean log-probs. SimPO, Meng et al. 2024, eq. 6."""
    return _logistic(options.beta * margin - options.simpo_gamma, options)


CPO_LOSSES: dict[str, Callable[[Tensor, CPOOptions], Tensor]] = {loss.__name__: loss for loss in (sigmoid, hinge, ipo, simpo)}
OF_MEANS = ("ipo", "simpo")  # these compare mean log-probs, the others sums
