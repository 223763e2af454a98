"""What PPO adds to a policy objective: rewards of tokens, generalised advantages, whitening and the value loss. Pure
tensors.

B rows, T the longest completion, mask (B, T) true where the policy drew the token. The state before such a token has a
value; tokens that others wrote are skipped, so the state after one drawn token is the state before the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8  # added to a variance before its root is divided by


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """scores (B,), kl (B, T) -> (B, T): -kl_coef * kl at every drawn token, and the completion's score at its last
    one."""
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    T = mask.shape[1]
    is_last = mask & (torch.arange(T, device=mask.device) == _last(mask)[:, None])
    return rewards + torch.where(is_last, scores[:, None], 0.0)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, final_values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (B, T) each; 0 where not drawn. GAE, Schulman et al. 2016, eq. 16: A_t = sum_k (gamma
    lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t.

    `values` (B, T) of the states before each token. `final_values` (B,) of the state after the last: 0 where the
    completion ended, the value of what would have come where it was cut.
    """
    mask = mask.bool()
    advantage, after = torch.zeros_like(final_values), final_values
    columns = []
    for t in reversed(range(values.shape[1])):
        drawn = mask[:, t]
        delta = rewards[:, t] + gamma * after - values[:, t]
        advantage = torch.where(drawn, delta + gamma * lam * advantage, advantage)
        after = torch.where(drawn, values[:, t], after)
        columns.append(torch.where(drawn, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values)
    return advantages, torch.where(mask, advantages + values, 0.0)


@dataclass(frozen=True)
class Moments:
    """Of all drawn tokens of a rollout, on all processes. Variance over n - 1."""

    mean: float
    variance: float

    @classmethod
    def of(cls, parts: list[list[float]]) -> Moments:
        """From every process's [count, sum, sum of squares]."""
        count, total, squares = (sum(part[i] for part in parts) for i in range(3))
        if count < 2:
            return cls(total / count if count else 0.0, 0.0)
        return cls(total / count, max(squares - total * total / count, 0.0) / (count - 1))


def sums(values: Tensor, mask: Tensor) -> list[float]:
    """This process's part for `Moments.of`."""
    drawn = values[mask.bool()]
    return [float(drawn.numel()), float(drawn.sum()), float(drawn.square().sum())]


def whitened(values: Tensor, mask: Tensor, moments: Moments, *, shift_mean: bool = True) -> Tensor:
    """(B, T): values of variance 1, and of mean 0 unless their own mean is kept; 0 where not drawn."""
    scaled = (values - moments.mean) / (moments.variance + EPSILON) ** 0.5
    return torch.where(mask.bool(), scaled if shift_mean else scaled + moments.mean, 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange: float) -> tuple[Tensor, Tensor]:
    """(B, T) half the squared error to the returns, the larger of that of the values and of the values held within
    `cliprange` of the old ones (Schulman et al. 2017's code); and where holding them decided, bool. Exactly 0 where not
    drawn."""
    mask = mask.bool()
    values = torch.where(mask, values, 0.0)
    old_values, returns = (torch.where(mask, given.detach(), 0.0) for given in (old_values, returns))
    held = old_values + (values - old_values).clamp(-cliprange, cliprange)
    free_error, held_error = (values - returns).square(), (held - returns).square()
    return 0.5 * torch.maximum(free_error, held_error), (held_error > free_error) & mask


def _last(mask: Tensor) -> Tensor:
    """(B,) place of the last true entry; -1 in a row without any."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, places, -1).amax(dim=1) if mask.shape[1] else places.new_full((len(mask),), -1)
