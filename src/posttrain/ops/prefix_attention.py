"""Shared-prefix attention: every segment attends causally to itself, and each completion also to the whole of its
prompt. Exact.

On a CPU it is ordinary attention of two kinds, merged by their logsumexp: (a) all segments, causal, batched by length;
(b) all completions of a prompt, as one long query, against its K and V. (For tiny groups one masked call does both.) No
(S, S) mask is made and no prompt is copied per completion; q, k, v, out and lse are all that is kept for backward.
Elsewhere, and under a window that bites, `prefix_plain` takes over.

S stream tokens, H query heads, Hkv key/value heads, d head size; n runs of at most L tokens in a tile.
"""

from __future__ import annotations

from typing import Any

import torch

from posttrain.ops.precision import has_fused_attention, multiplies_natively
from posttrain.ops.prefix_plain import prefix_attention_plain
from posttrain.ops.prefix_plan import AttentionPart, PrefixPlan, Tile

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefixPlan, *, scaling: float, window: int | None = None
) -> torch.Tensor:
    """q (S, H, d), k and v (S, Hkv, d), in any mixture of dtypes -> (S, H, d). A query sees at most `window` latest
    positions, itself included."""
    dtype = _common_dtype(q, k, v)
    if has_fused_attention(q.device) and not plan.is_cut_by(window):
        out: torch.Tensor = _SharedPrefix.apply(q, k, v, plan, scaling, dtype)  # type: ignore[no-untyped-call]
        return out
    return prefix_attention_plain(q.to(dtype), k.to(dtype), v.to(dtype), plan.chunks(window), scaling=scaling)


class _SharedPrefix(torch.autograd.Function):
    """The CPU path. Each part's flash backward, given the *merged* out and logsumexp, yields its share of the exact
    gradients."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PrefixPlan, scaling: float, dtype: torch.dtype) -> torch.Tensor:
        work = _work_dtype(dtype)
        q_work, k_work, v_work = (x.to(work) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=work)  # (S, H, d)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(work, torch.float32))  # (S, H)
        for part in plan.own:
            part_out, part_lse = _attend(part, q_work, k_work, v_work, scaling)
            _write(out, part.queries, part_out)
            _write(lse, part.queries, part_lse)
        for part in plan.bridges:
            _merge(out, lse, part.queries, *_attend(part, q_work, k_work, v_work, scaling))
        out = out.to(dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scaling, ctx.work = plan, scaling, work
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        work = ctx.work
        q_work, k_work, v_work, out, grad = (x.to(work) for x in (q, k, v, out, grad))
        grads = tuple(torch.zeros(x.shape, dtype=work) for x in (q, k, v))  # (S, H, d), (S, Hkv, d) twice
        for part in (*ctx.plan.own, *ctx.plan.bridges):
            part_grad = _heads(part.queries, grad)
            if part.queries.is_ragged:  # surplus queries had no part in the result
                part_grad = part_grad * part.queries.valid[:, None, :, None]
            shares = _flash_backward(
                part_grad,
                _heads(part.queries, q_work),
                _heads(part.keys, k_work),
                _heads(part.keys, v_work),
                _heads(part.queries, out),
                _heads(part.queries, lse),
                0.0,
                part.causal,
                attn_mask=part.mask(work),
                scale=ctx.scaling,
            )
            for total, tile, share in zip(grads, (part.queries, part.keys, part.keys), shares, strict=True):
                _add(total, tile, share)
        return *(share.to(x.dtype) for share, x in zip(grads, (q, k, v), strict=True)), None, None, None


def _heads(tile: Tile, x: torch.Tensor) -> torch.Tensor:
    """(S, H, ...) -> (n, H, L, ...)"""
    return tile.take(x).transpose(1, 2)


def _attend(part: AttentionPart, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (n, H, L, d), lse (n, H, L). The kernel maps query heads to kv heads itself."""
    q, k, v = _heads(part.queries, q), _heads(part.keys, k), _heads(part.keys, v)
    out, lse = _flash(q, k, v, 0.0, part.causal, attn_mask=part.mask(q.dtype), scale=scaling)
    return out, lse


def _write(total: torch.Tensor, tile: Tile, part: torch.Tensor) -> None:
    """Put (n, H, L, ...) where the tile's tokens stand in (S, H, ...)."""
    if tile.start is not None:
        tile.take(total).copy_(part.transpose(1, 2))
    else:
        total.index_copy_(0, tile.places, tile.real(part.transpose(1, 2)).to(total.dtype))


def _add(total: torch.Tensor, tile: Tile, part: torch.Tensor) -> None:
    if tile.start is not None:
        tile.take(total).add_(part.transpose(1, 2))
    else:
        total.index_add_(0, tile.places, tile.real(part.transpose(1, 2)))


def _merge(out: torch.Tensor, lse: torch.Tensor, tile: Tile, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Fold attention over further keys into `out`: softmax over the union is the average of both, weighted by
    exp(lse)."""
    ours, our_lse = _heads(tile, out), _heads(tile, lse)  # (n, H, L, d), (n, H, L)
    share = torch.sigmoid(part_lse - our_lse)[..., None]  # of the further keys
    _write(out, tile, torch.lerp(ours.to(share.dtype), part.to(share.dtype), share))
    _write(lse, tile, torch.logaddexp(our_lse, part_lse))


def _common_dtype(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.dtype:
    """What sdpa would compute in: autocast's dtype inside autocast, else the widest of the three (RoPE in float32
    widens q and k only)."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision runs in float32 on a CPU without bfloat16 instructions: the kernel's backward is 2.5 to 3 times
    faster so."""
    if dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and multiplies_natively(dtype, "cpu")):
        return dtype
    return torch.float32
