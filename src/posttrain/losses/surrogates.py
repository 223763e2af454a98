"""What each policy objective takes the gradient of, per token: the loss before masks, KL and weights.

Every surrogate is `(ratio, advantages (B, 1), options) -> Surrogate` and differs from its neighbours only in how far it
trusts a ratio away from 1. At ratio 1 all have the same gradient, -advantage * grad log pi (cispo if its cap is at
least 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.losses.options import PolicyOptions
from posttrain.losses.ratio import Ratio

LOG_TOKEN_BOUND = 20.0  # vespo: no token's log-ratio counts for more than this
LOG_SEQUENCE_FLOOR = math.log(1e-8)  # vespo: smallest log-ratio of a whole completion


@dataclass(frozen=True)
class Surrogate:
    """A loss and what there is to say about it."""

    loss: Tensor  # (B, T), or (B, 1) when one value holds for the whole completion
    notes: dict[str, Tensor]  # metric -> (B, T) or (B, 1), to be averaged


def clipped(ratio: Ratio, advantages: Tensor, options: PolicyOptions) -> Surrogate:
    """-min(w A, clip(w) A). PPO, Schulman et al. 2017, eq. 7, with an upper bound of its own (DAPO) and delta for A < 0 (INTELLECT-2).

    A clip is counted only where it stops the gradient: below for A < 0, above for A > 0.
    """
    low, high = 1 - options.epsilon, 1 + options.cap
    weight = ratio.weight if options.delta is None else ratio.weight.clamp(max=options.delta)
    loss = -torch.minimum(weight * advantages, ratio.weight.clamp(low, high) * advantages)
    below = (ratio.weight < low) & (advantages < 0)
    above = (ratio.weight > high) & (advantages > 0)
    return Surrogate(loss, {"clip_ratio/low": below, "clip_ratio/high": above, "clip_ratio/region": below | above})


def capped(ratio: Ratio, advantages: Tensor, options: PolicyOptions) -> Surrogate:
    """-sg(min(w, cap)) A log pi: every token keeps its gradient, only its weight is bounded. CISPO, arXiv:2506.13585."""
    weight = ratio.weight.detach()
    loss = -weight.clamp(max=options.cap) * advantages * ratio.logps
    return Surrogate(loss, {"cispo_clip_ratio": (weight > options.cap) & (advantages != 0)})


def soft_gated(ratio: Ratio, advantages: Tensor, options: PolicyOptions) -> Surrogate:
    """-(4 / tau) sigmoid(tau (w - 1)) A: a clip that fades instead of cutting. SAPO, arXiv:2511.20347."""
    temperature = by_sign(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, ratio.logps)  # (B, 1)
    gate = torch.sigmoid(temperature * (ratio.weight - 1)) * 4 / temperature
    return Surrogate(-gate * advantages, {})


def variational(ratio: Ratio, advantages: Tensor, options: PolicyOptions) -> Surrogate:
    """-sg(phi(w)) A log pi, phi(w) = w^k exp(lambda (1 - w)) of the whole completion's ratio w (not length-normalised). VESPO, arXiv:2602.10693."""
    good = advantages >= 0  # (B, 1)
    k = by_sign(good, options.vespo_k_pos, options.vespo_k_neg, ratio.logps)  # (B, 1)
    lam = by_sign(good, options.vespo_lambda_pos, options.vespo_lambda_neg, ratio.logps)
    log_weight = ratio.log_tokens.detach().clamp(-LOG_TOKEN_BOUND, LOG_TOKEN_BOUND).sum(dim=1, keepdim=True)  # (B, 1)
    log_weight = log_weight.clamp(LOG_SEQUENCE_FLOOR, LOG_TOKEN_BOUND)
    phi = torch.exp(lam + k * log_weight - lam * log_weight.exp())
    return Surrogate(-phi * advantages * ratio.logps, {"vespo/phi": phi})


def by_sign(good: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    """(B, 1) one of two constants per row, in the precision of `like`: torch.where of two Python floats would be
    float32."""
    return torch.where(good, like.new_full((), positive), like.new_full((), negative))
