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

from posttrain.ops._linear_logprobs_torch import Head, Incoming, Inputs, backward, forward


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
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states are {hidden.dtype} and the head is {weight.dtype}: cast one of them, or call inside torch.autocast")
    head = Head.of(hidden, temperature, softcap, scale)
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
            stats = forward(Inputs(hidden, weight, bias, targets, head), want_argmax=want_argmax, want_sum_p2=want_sum_p2)
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
        head, unit = ctx.head, ctx.head.scale / ctx.head.temperature
        g_logps = torch.zeros_like(lse) if g_logps is None else g_logps.to(head.stats) * unit
        g_entropy = None if g_entropy is None else g_entropy.to(head.stats) * unit
        with torch.autocast(hidden.device.type, enabled=False):
            d = backward(Inputs(hidden, weight, bias, targets, head), Incoming(lse, entropy, g_logps, g_entropy), ctx.needs_input_grad[:3])
        d_hidden = None if d.hidden is None else d.hidden.to(hidden.dtype)
        d_bias = None if d.bias is None else d.bias.to(bias.dtype)
        return d_hidden, d.weight, d_bias, None, None, None, None
