"""The importance ratio pi / pi_old of each token, or of each completion.

B rows, T the longest. Masked positions are zeroed on entry, so that whatever stands there (padding, tokens that a tool
wrote, even NaN) reaches neither a value nor a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1), the mean over each row's masked-in tokens; 0 for a row without any."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Ratio:
    """pi / pi_old where `mask`. `weight` is what objectives clip; `log_tokens` keeps every token's own log-ratio."""

    logps: Tensor  # (B, T) 0 where masked out
    log_tokens: Tensor  # (B, T) log pi - log pi_old, 0 where masked out
    weight: Tensor  # (B, T) at token level, (B, 1) at sequence level
    mask: Tensor  # (B, T) bool

    @classmethod
    def between(cls, logps: Tensor, old_logps: Tensor | None, mask: Tensor, *, per_sequence: bool, whole: bool = False) -> Ratio:
        """`old_logps` None: the rollout is from this very policy, so the ratio is exactly 1 and still carries the
        gradient.

        A sequence's ratio is the geometric mean over its tokens (GSPO, arXiv:2507.18071), or their product where it is
        taken `whole` (RLOO).
        """
        mask = mask.bool()
        logps = torch.where(mask, logps, 0.0)
        old_logps = logps.detach() if old_logps is None else torch.where(mask, old_logps.detach(), 0.0)
        log_tokens = logps - old_logps  # (B, T)
        log_sequence = log_tokens.sum(dim=1, keepdim=True) if whole else masked_mean(log_tokens, mask)  # (B, 1)
        log_weight = log_sequence if per_sequence else log_tokens
        return cls(logps=logps, log_tokens=log_tokens, weight=log_weight.exp(), mask=mask)
