"""What the policy's entropy is used for: a bonus, a coefficient that adapts, and a mask that trains only high-entropy
tokens.

Entropies are those of the full softmax at the sampling temperature, (B, T). The mask is defined on a whole optimizer
step: its threshold is computed once from all trained tokens (of all ranks, gathered by the caller), then applied to
each micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def entropy_bonus(entropy: Tensor, mask: Tensor, *, coef: float, num_tokens: float | Tensor) -> Tensor:
    """(): -coef * the sum of masked-in entropies / num_tokens, to be added to the loss. `num_tokens` counts the mask
    over the whole step.

    It is a mean over tokens for every objective. The bonus needs entropies with a gradient; a metric does not.
    """
    return -coef * torch.where(mask.bool(), entropy, 0.0).sum() / torch.as_tensor(num_tokens).clamp(min=1)


def entropy_threshold(entropies: Tensor, top_quantile: float) -> Tensor:
    """(): the entropy that the fraction `top_quantile` of tokens with the highest entropy reaches; linear between
    neighbours. 1.0: all tokens reach it.

    `entropies` (N,) are those of the trained tokens only. Sorted by hand: torch.quantile refuses more than 2^24 values.
    N = 0: +inf.
    """
    if not 0 < top_quantile <= 1:
        raise ValueError(f"top_entropy_quantile is {top_quantile}; it is the fraction of tokens to train on, above 0 and at most 1")
    if not entropies.numel():
        return entropies.new_tensor(torch.inf)
    ordered = entropies.detach().flatten().sort().values
    position = (1 - top_quantile) * (ordered.numel() - 1)
    below = int(position)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def high_entropy_mask(entropy: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """(B, T) bool: trained tokens with at least the threshold's entropy. Wang et al. 2025, arXiv:2506.01939."""
    return mask.bool() & (entropy.detach() >= threshold)


@dataclass
class EntropyController:
    """The bonus' coefficient. Adaptive: rises while entropy is at or below its target, falls above it; Skywork-OR1,
    arXiv:2505.22312.

    `see` is told every micro-batch's entropies of the tokens that the policy term trains, `step` once an optimizer step.
    """

    coef: float = 0.0
    adaptive: bool = False
    minimum: float = 0.0
    maximum: float = 1.0
    delta: float = 0.005
    target: float = 0.2
    last_entropy: float | None = None  # None: no step was measured yet
    seen: tuple[float, float] = (0.0, 0.0)  # entropy and number of this process's tokens since the last step

    @property
    def current(self) -> float:
        """What to multiply this step's bonus with: while adaptive, 0 unless the last step's entropy was at or below the
        target."""
        if not self.adaptive:
            return self.coef
        return self.coef if self.last_entropy is not None and self.last_entropy <= self.target else 0.0

    def see(self, entropy: Tensor, mask: Tensor) -> None:
        """Entropies (B, T) of a micro-batch, of the tokens in the mask."""
        total, count = self.seen
        self.seen = (total + float((entropy.detach() * mask).sum()), count + float(mask.sum()))

    def step(self, seen: Sequence[Sequence[float]]) -> None:
        """Move once for an optimizer step, by what all processes have seen."""
        total, count = (sum(part[i] for part in seen) for i in (0, 1))
        self.seen = (0.0, 0.0)
        if count:
            self.update(total / count)

    def update(self, entropy: float) -> None:
        self.last_entropy = entropy
        if self.adaptive:
            moved = self.coef + (self.delta if entropy <= self.target else -self.delta)
            self.coef = min(max(moved, self.minimum), self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the settings come back from the run's config, not from here."""
        return {"coef": self.coef, "last_entropy": self.last_entropy, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef, self.last_entropy = state["coef"], state["last_entropy"]
        total, count = state.get("seen", (0.0, 0.0))
        self.seen = (total, count)
