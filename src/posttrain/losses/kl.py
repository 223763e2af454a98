"""How a policy is held near its reference: three estimators of KL(policy || reference), and which optimum each really
leads to.

The value of an estimator and the gradient of its use as a loss are different things (arXiv:2510.01555). Maximising E[r]
against beta * KL:

- k1 = log pi - log ref. As a loss its expected gradient is zero: no constraint at all. So it is only offered *in the reward*
  (`k1_penalty`), where it gives the reverse KL of whole completions. Optimum: ref * exp(r / beta) / Z.
- k2 = k1^2 / 2 as a loss has the gradient k1 * grad log pi: the reverse KL of each token's choice (it does not see how an early token
  changes later ones; for one-token completions it equals k1 in the reward). Optimum: ref * exp(r / beta) / Z.
- k3 = exp(-k1) - 1 + k1 as a loss has the gradient (1 - ref / pi) * grad log pi: the *forward* KL(ref || pi). Optimum: beta * ref / (c - r).
  It pulls harder: four arms, reward 1 for one of them, beta 0.5: probability .683 of that arm where the reverse KL's is .711.
- k3 times the ratio (`use_bias_correction_kl`, the default) has, before the first update, k2's gradient exactly: the reverse KL again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.losses.ratio import Ratio


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(B, T) -> (B, T). Unbiased, may be negative."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(B, T) -> (B, T). Biased as a value, right as a gradient."""
    return 0.5 * (logps - ref_logps) ** 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(B, T) -> (B, T). Unbiased as a value, never negative."""
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def corrected_k2(kl: Tensor, weight: Tensor) -> Tensor:
    """The weight is a constant here: k2's gradient is right under the current policy already and only its sampling
    needs correcting."""
    return kl * weight.detach()


def corrected_k3(kl: Tensor, weight: Tensor) -> Tensor:
    """The weight carries a gradient: that is what turns the forward KL into the reverse one."""
    return kl * weight


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
LOSS_CORRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": corrected_k2, "k3": corrected_k3}  # an estimator not named here is no loss


def kl_term(ratio: Ratio, ref_logps: Tensor, estimator: str, *, corrected: bool) -> Tensor:
    """(B, T): the estimator at each token, 0 where masked out; `corrected` multiplies by the ratio (k1: never, it is
    only measured)."""
    ref_logps = torch.where(ratio.mask, ref_logps.detach(), 0.0)
    kl = KL_ESTIMATORS[estimator](ratio.logps, ref_logps)
    if corrected and estimator in LOSS_CORRECTIONS:
        kl = LOSS_CORRECTIONS[estimator](kl, ratio.weight)
    return kl


def k1_penalty(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """(B,): sum of k1 over each completion, under the policy that sampled it. Reward becomes reward - beta * penalty,
    *before* the group's baseline.

    Together with scale_rewards "none" this maximises E[r] - beta * KL(policy || reference) of whole completions; a
    division by the group's standard deviation rescales reward and penalty alike.
    """
    difference = torch.where(mask.bool(), logps.detach() - ref_logps.detach(), 0.0)
    return difference.sum(dim=1)
