"""Supervised fine-tuning's objectives. Pure tensors: (B, T) in, a sum out. Dividing by the step's trained tokens is the
caller's job."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nll(logps: Tensor, mask: Tensor) -> Tensor:
    """(): the summed negative log-likelihood of the tokens in `mask`; connected to `logps` even if there are none."""
    return -torch.where(mask.bool(), logps, 0.0).sum()


def dft(logps: Tensor, mask: Tensor) -> Tensor:
    """(): each token's negative log-likelihood times its own probability, which is held fixed. Dynamic fine-tuning, Wu
    et al. 2025."""
    return -torch.where(mask.bool(), logps.detach().exp() * logps, 0.0).sum()


def smoothed_nll(logps: Tensor, mean_logps: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """(): `nll` of targets that share `smoothing` of their probability evenly with the whole vocabulary (Szegedy et al.
    2016, section 7).

    mean_logps (B, T): the mean log-prob over the vocabulary at each place.
    """
    return (1 - smoothing) * nll(logps, mask) + smoothing * nll(mean_logps, mask)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"nll": nll, "chunked_nll": nll, "dft": dft}  # chunked: as every loss here is
