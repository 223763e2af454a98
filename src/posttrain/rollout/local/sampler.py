"""From logits to tokens: temperature, then top-k, top-p and min-p, then the inverse of the cumulative distribution.

A rows, V vocabulary. The random number of a token depends on (request key, position) alone, never on the batch around
it. Truncation is a floor on logits, so equal logits stay or go together.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from posttrain.types import Sampling

_BLOCK = 256  # vocabulary entries summed in float32; sums of blocks are accumulated in float64
_CANDIDATES = 1024  # how far top-p looks before it falls back to sorting the whole vocabulary
_PER_DIGEST = 8  # 64-bit numbers in one blake2b digest


class Drawn(NamedTuple):
    token_ids: torch.Tensor  # (A,) int64
    logps: torch.Tensor  # (A,) float32, full softmax at the temperature (at temperature 0: at 1)
    sampled_logps: torch.Tensor  # (A,) float32, of the distribution drawn from (at temperature 0: 0, a certainty)


class Uniforms:
    """Counter-based random numbers of one completion, uniform in [0, 1): number i is a hash of (key, i), so there is no
    state to save or to share."""

    def __init__(self, key: tuple[int, ...]):
        self._key = ",".join(map(str, key)).encode()
        self._numbers: tuple[int, ...] = ()
        self._block = -1

    def __getitem__(self, position: int) -> float:
        """A float64 in [0, 1) with 53 random bits."""
        block, offset = divmod(position, _PER_DIGEST)
        if block != self._block:
            self._numbers = struct.unpack(f"<{_PER_DIGEST}Q", hashlib.blake2b(self._key + b"/%d" % block).digest())
            self._block = block
        return (self._numbers[offset] >> 11) * 2.0**-53


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Drawn:
    """One token for each row of logits (A, V), each by its own Sampling and its own uniform number."""
    scaled = _at_temperature(logits.float(), samplings)  # (A, V)
    probs = scaled.softmax(-1)  # (A, V)
    greedy = [sampling.temperature == 0 for sampling in samplings]
    kept, kept_mass = probs, None
    if any(_truncates(sampling) for sampling in samplings):
        kept = probs.masked_fill(scaled < _floor(scaled, probs, samplings), 0.0)
        kept_mass = kept.sum(-1, dtype=torch.float64)  # (A,)

    if all(greedy):
        token_ids = scaled.argmax(-1)
    else:
        token_ids = inverse_cdf(kept, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
        if any(greedy):
            token_ids = torch.where(torch.tensor(greedy, device=logits.device), scaled.argmax(-1), token_ids)

    logps = probs.gather(1, token_ids[:, None])[:, 0].log()  # (A,)
    sampled = logps if kept_mass is None else (logps - kept_mass.log()).float()
    if any(greedy):
        sampled = sampled.masked_fill(torch.tensor(greedy, device=logits.device), 0.0)
    return Drawn(token_ids, logps, sampled)


def _truncates(sampling: Sampling) -> bool:
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or bool(sampling.min_p))


def _at_temperature(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    temperatures = [sampling.temperature or 1.0 for sampling in samplings]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / torch.tensor(temperatures, device=logits.device)[:, None]


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative sum of non-negative weights (A, V) passes uniform * total: (A,). Never one of
    weight 0.

    Two levels, so that a vocabulary of 150,000 costs one float32 pass while the cumulative sums are float64.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // _BLOCK * _BLOCK
    blocks = weights[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(-1)  # (A, V // _BLOCK)
    if whole < vocabulary:
        blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    blocks = blocks.double()
    edges = blocks.cumsum(-1)
    target = _below(uniforms[:, None] * edges[:, -1:], edges[:, -1:])  # (A, 1)
    block = torch.searchsorted(edges, target, right=True)  # (A, 1) the first edge above the target: a block of weight > 0

    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)  # (A, _BLOCK)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).double().masked_fill(columns >= vocabulary, 0.0)
    inner = inside.cumsum(-1)
    size = blocks.gather(1, block)
    rest = (target - (edges.gather(1, block) - size)) / size * inner[:, -1:]  # float32 and float64 sums of a block differ in the last bits
    offset = torch.searchsorted(inner, _below(rest.clamp(min=0.0), inner[:, -1:]), right=True)
    return (block * _BLOCK + offset)[:, 0]


def _below(value: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Rounding may carry a number that is less than the bound onto it."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))


def _floor(logits: torch.Tensor, probs: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """(A, 1): the smallest logit that each row keeps. Each filter sees what the one before it left, renormalised."""
    vocabulary = logits.shape[1]
    device = logits.device
    top_k = [min(sampling.top_k, vocabulary) if _truncates(sampling) else 0 for sampling in samplings]
    top_p = [sampling.top_p if _truncates(sampling) else 1.0 for sampling in samplings]
    min_p = [(sampling.min_p or 0.0) if _truncates(sampling) else 0.0 for sampling in samplings]
    nucleus = any(p < 1 for p in top_p)
    open_nucleus = any(p < 1 and k == 0 for p, k in zip(top_p, top_k, strict=True))  # may reach any rank

    width = min(vocabulary, max(1, _CANDIDATES if open_nucleus else 1, *top_k))
    top = logits.topk(width, dim=-1).values  # (A, width) descending
    floor = torch.full_like(top[:, :1], -math.inf)
    if any(top_k):
        k = torch.tensor(top_k, device=device)[:, None]
        floor = torch.where(k > 0, top.gather(1, (k - 1).clamp(min=0)), floor)
    if nucleus:
        mass = (
            probs.masked_fill(logits < floor, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
            * torch.tensor(top_p, device=device, dtype=torch.float64)[:, None]
        )
        floor = torch.maximum(floor, _nucleus_floor(logits, top, probs, floor, mass, torch.tensor(top_p, device=device)[:, None] < 1))
    ratios = torch.tensor([math.log(ratio) if ratio else -math.inf for ratio in min_p], device=device)[:, None]
    return torch.maximum(floor, top[:, :1] + ratios)


def _nucleus_floor(
    logits: torch.Tensor, top: torch.Tensor, probs: torch.Tensor, floor: torch.Tensor, mass: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """(A, 1): the logit of the last token needed to gather `mass` from the top, -inf for rows where it is not
    `wanted`."""
    peak = probs.amax(-1, keepdim=True).double()
    weights = ((top - top[:, :1]).double().exp() * peak).masked_fill(top < floor, 0.0)  # (A, width)
    before = weights.cumsum(-1) - weights  # the mass of the tokens above each one
    reached = before[:, -1:] + weights[:, -1:] >= mass
    exhausted = top[:, -1:] <= floor  # all that top-k left has been seen
    if top.shape[1] < logits.shape[1] and not bool((reached | exhausted | ~wanted).all()):
        return _nucleus_floor(logits, logits.sort(-1, descending=True).values, probs, floor, mass, wanted)
    count = (before < mass).sum(-1, keepdim=True).clamp(min=1)
    return top.gather(1, count - 1).masked_fill(~wanted, -math.inf)
