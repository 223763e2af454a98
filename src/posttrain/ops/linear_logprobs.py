"""Log-probs without logits: hidden states and the LM head in, one log-prob and one entropy per row out.

Tiles over rows and vocabulary and recomputes the tiles in backward, so no (N, V) tensor ever exists. Not a loss: every loss is
arithmetic on what this returns. Both outputs have true gradients, once (no double backward).
"""

# N rows (target tokens), D hidden, V vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.ops._linear_logprobs_torch import Head, backward, forward, multiplies_natively


class LogProbs(NamedTuple):
    """Float32 (float64 for float64 inputs). `logps` and `entropy` carry gradients, `argmax` and `sum_p2` do not; None: not asked for."""

    logps: Tensor  # (N,) log softmax(logits)[target]
    entropy: Tensor  # (N,) of softmax(logits), in nats
    argmax: Tensor | None  # (N,) the greedy token
    sum_p2: Tensor | None  # (N,) sum of the squared probabilities


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    want_argmax: bool = False,
    want_sum_p2: bool = False,
) -> LogProbs:
    """hidden (N, D), weight (V, D), targets (N,), bias (V,) -> log-prob and entropy of each row under
    softmax(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature); without `softcap` no tanh.

    Inside autocast the matmuls take autocast's dtype, otherwise that of the inputs. On a CPU without bf16 instructions the operands are
    rounded to bf16 and multiplied in float32: faster there, and not less exact. A head that does not require grad costs no weight
    gradient. A target outside 0..V-1 gives NaN. Raises ValueError when shapes or dtypes do not fit, or temperature is not positive.
    """
    _check(hidden, weight, targets, bias, temperature, softcap)
    head = _head(hidden, temperature, softcap, scale)
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states are {hidden.dtype} and the head is {weight.dtype}: cast one of them, or call inside torch.autocast")
    return LogProbs(*_LinearLogprobs.apply(hidden, weight, bias, targets, head, want_argmax, want_sum_p2))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"linear_logprobs takes hidden (N, D), weight (V, D) and targets (N,); got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprobs takes bias (V,); got {tuple(bias.shape)} with weight {tuple(weight.shape)}")
    if targets.is_floating_point():
        raise ValueError(f"targets are token ids, but their dtype is {targets.dtype}")
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"temperature and softcap must be positive; got temperature={temperature}, softcap={softcap}")


def _head(hidden: Tensor, temperature: float, softcap: float | None, scale: float) -> Head:
    kind = hidden.device.type
    if hidden.dtype is torch.float64:  # autocast leaves float64 alone
        rounding = stats = torch.float64
    else:
        rounding, stats = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype, torch.float32
    return Head(temperature, softcap, scale, rounding, rounding if multiplies_natively(rounding, kind) else stats, stats)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        want_argmax: bool,
        want_sum_p2: bool,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            stats = forward(hidden, weight, bias, targets, head, want_argmax, want_sum_p2)
        log_sum = stats.sum_e.log()
        logps = stats.target - stats.maximum - log_sum
        entropy = log_sum - stats.sum_ez / stats.sum_e
        sum_p2 = None if stats.sum_e2 is None else stats.sum_e2 / stats.sum_e.square()

        ctx.head = head  # dtypes included: backward runs outside autocast
        ctx.save_for_backward(hidden, weight, bias, targets, stats.maximum + log_sum, entropy)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in (stats.argmax, sum_p2) if x is not None])
        return logps, entropy, stats.argmax, sum_p2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        if g_logps is None:
            g_logps = torch.zeros_like(lse)
        with torch.autocast(hidden.device.type, enabled=False):
            d = backward(hidden, weight, bias, targets, lse, entropy, g_logps, g_entropy, ctx.head, ctx.needs_input_grad[:3])
        return d.hidden, d.weight, d.bias, None, None, None, None
