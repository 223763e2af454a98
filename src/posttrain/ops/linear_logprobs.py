"""Log-probs without logits: hidden states and the LM head in, one log-prob and one entropy per row out.

Tiles over rows and vocabulary, so no tensor grows with N x V. Not a loss: every loss is arithmetic on what this
returns. Log-probs and entropies have true gradients, once (no double backward). How often a tile of logits is made
depends on what has to be differentiated:

- a frozen head, log-probs alone: once. The forward keeps the direction (N, D) in which each row's log-prob grows; backward multiplies.
- a trained head: once where the caller foresees the gradient of the log-probs (`known_grad`), else again in backward.
- the entropy differentiated too: again in backward.
"""

# N rows (target tokens), D hidden, V vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.ops._linear_logprobs_torch import Gradients, Head, Incoming, Inputs, Statistics, backward, fits_one_pass, forward, in_one_pass


class LogProbs(NamedTuple):
    """Float32 (float64 for float64 inputs). `logps` carries gradients, `entropy` too unless that was declined; None:
    not asked for."""

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
    entropy_grad: bool = True,
    known_grad: Tensor | None = None,
) -> LogProbs:
    """hidden (N, D), weight (V, D), targets (N,), bias (V,) -> log-prob and entropy of each row under
    softmax(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature); without `softcap` no tanh.

    entropy_grad: False makes the entropy a constant, which saves passes over the vocabulary. known_grad (N,), with
    entropy_grad=False only: the gradient that backward will bring to `logps`, up to one factor for all rows. It is a
    forecast and no promise: where another comes, the gradients are computed from that one. It helps a head that is
    trained in float32 or float64 outside of autocast, and takes a tile of 512 rows and the whole vocabulary, or of more
    rows where the vocabulary is small, and a slice of it (three with a softcap).

    Inside autocast the matmuls take autocast's dtype, otherwise that of the inputs. On a CPU without bf16 instructions
    the operands are rounded to bf16 and multiplied in float32: faster there, and not less exact. A head that does not
    require grad costs no weight gradient. A target outside 0..V-1 gives NaN. Raises ValueError when shapes or dtypes do
    not fit, or temperature is not positive.
    """
    _check(hidden, weight, targets, bias, temperature, softcap)
    if known_grad is not None and known_grad.shape != targets.shape:
        raise ValueError(f"known_grad goes with the targets, (N,); got {tuple(known_grad.shape)} for targets {tuple(targets.shape)}")
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states are {hidden.dtype} and the head is {weight.dtype}: cast one of them, or call inside torch.autocast")
    inputs = Inputs(hidden, weight, bias, targets, Head.of(hidden, temperature, softcap, scale))
    wants = Wants(want_argmax, want_sum_p2, entropy_grad)
    only_logps = torch.is_grad_enabled() and not entropy_grad
    if only_logps and not weight.requires_grad and not (bias is not None and bias.requires_grad):
        columns = _FrozenHead.apply(hidden, inputs, wants)  # type: ignore[no-untyped-call]
    else:
        columns = _TrainedHead.apply(hidden, weight, bias, inputs, wants, known_grad if only_logps else None)  # type: ignore[no-untyped-call]
    return LogProbs(*columns)


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


class Wants(NamedTuple):
    argmax: bool
    sum_p2: bool
    entropy_grad: bool


def _outputs(ctx: Any, stats: Statistics, wants: Wants) -> tuple[Tensor | None, ...]:
    columns = stats.logps, stats.entropy, stats.argmax, stats.sum_p2
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[x for x in columns[2 if wants.entropy_grad else 1 :] if x is not None])
    return columns


class _FrozenHead(torch.autograd.Function):
    """Log-probs that only hidden states are to be differentiated for: d logp / d hidden is known when the forward
    ends."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, inputs: Inputs, wants: Wants) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            stats = forward(inputs, want_argmax=wants.argmax, want_sum_p2=wants.sum_p2, want_direction=ctx.needs_input_grad[0])
        ctx.unit = inputs.head.scale / inputs.head.temperature
        if stats.direction is not None:
            ctx.save_for_backward(stats.direction)
        return _outputs(ctx, stats, wants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g_logps is None:
            return None, None, None
        (direction,) = ctx.saved_tensors
        return (direction * (g_logps * ctx.unit)[:, None]).to(direction.dtype), None, None  # rounded once: the factor is in float32


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, wants: Wants, expected: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        head = inputs.head
        wanted = ctx.needs_input_grad[:3]
        ctx.made = None
        with torch.autocast(hidden.device.type, enabled=False):
            if expected is not None and any(wanted) and fits_one_pass(inputs):
                expected = expected.to(head.stats)
                unit = head.scale / head.temperature
                stats, made = in_one_pass(inputs, expected * unit, wanted, want_argmax=wants.argmax, want_sum_p2=wants.sum_p2)
                ctx.made = expected, made
            else:
                stats = forward(inputs, want_argmax=wants.argmax, want_sum_p2=wants.sum_p2)
        ctx.head = head  # dtypes included: backward runs outside autocast
        columns = _outputs(ctx, stats, wants)
        ctx.save_for_backward(hidden, weight, bias, inputs.targets, stats.lse, columns[1])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logps: Tensor | None, g_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        head, unit = ctx.head, ctx.head.scale / ctx.head.temperature
        d = None if g_logps is None or ctx.made is None else _as_known(g_logps.to(head.stats), *ctx.made)
        ctx.made = None  # a gradient that was handed on may be added to in place; a second backward makes its own
        if d is None:
            g_logps = torch.zeros_like(lse) if g_logps is None else g_logps.to(head.stats) * unit
            g_entropy = None if g_entropy is None else g_entropy.to(head.stats) * unit
            with torch.autocast(hidden.device.type, enabled=False):
                d = backward(Inputs(hidden, weight, bias, targets, head), Incoming(lse, entropy, g_logps, g_entropy), ctx.needs_input_grad[:3])
        d_hidden = None if d.hidden is None else d.hidden.to(hidden.dtype)
        d_bias = None if d.bias is None else d.bias.to(bias.dtype)
        return d_hidden, d.weight, d_bias, None, None, None


def _as_known(g: Tensor, expected: Tensor, made: Gradients) -> Gradients | None:
    """The gradients that were made for `expected`, times the factor between it and `g`. None: there is no such
    factor."""
    if not g.numel():
        return None
    largest = expected.abs().argmax()
    factor = g[largest] / expected[largest]
    rounding = 4 * torch.finfo(g.dtype).eps
    if not bool(((g - expected * factor).abs() <= rounding * g.abs()).all()):
        return None
    if float(factor) != 1:
        for gradient in (made.hidden, made.weight, made.bias):
            if gradient is not None:
                gradient.mul_(factor)
    return made
