"""A module applied to tiles of its rows, forward and backward: only its input is kept, and one tile's intermediate
values exist at a time.

For modules that treat every row alike: MLPs, norms, linears, adapters included. Nothing is checkpointed inside:
backward computes a tile, differentiates it and forgets it. Inside a checkpointed layer the last module is not even
computed in the recompute, because its input is saved before its output is made, and there a recompute ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class TiledRows(nn.Module):
    """`module` on (B, L, ...) in tiles of at most `rows` of its B * L rows, ceil(B * L / rows) of them. The result is
    that of `module`, up to rounding; where dropout draws, it draws other numbers."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows
        self._answers: dict[tuple[Any, ...], tuple[torch.Size, torch.dtype]] = {}  # what the module makes of such inputs: (...), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (B, L, ...)"""
        if x.shape[0] * x.shape[1] <= self.rows:
            whole: torch.Tensor = self.module(x)
            return whole
        flat = x.flatten(0, 1)  # (B * L, ...)
        how = _How.now(x.device)
        tail, dtype = self._answer(flat, how)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        out: torch.Tensor = _SavedBefore.apply(flat, self, how, (flat.shape[0], *tail), dtype, *trained)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for tile in self.tiles(flat.shape[0]):
                out[tile] = self.module(flat[tile][None])[0]
        rows: torch.Tensor = out.unflatten(0, x.shape[:2])
        return rows

    def tiles(self, length: int) -> list[slice]:
        return [slice(start, min(start + self.rows, length)) for start in range(0, length, self.rows)]

    def _answer(self, flat: torch.Tensor, how: _How) -> tuple[torch.Size, torch.dtype]:
        key = (flat.shape[1:], flat.dtype, how.autocast)
        if key not in self._answers:
            with torch.no_grad(), torch.random.fork_rng(how.devices):
                row = self.module(flat[:1][None])[0]
            self._answers[key] = row.shape[1:], row.dtype
        return self._answers[key]


class _How(NamedTuple):
    """The state of torch that a module computes under."""

    autocast: torch.dtype | None  # None: no autocast
    cache: bool  # of autocast
    devices: list[int]  # whose random numbers are drawn, beside the CPU's

    @classmethod
    def now(cls, device: torch.device) -> _How:
        enabled = torch.is_autocast_enabled(device.type)
        devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        return cls(torch.get_autocast_dtype(device.type) if enabled else None, torch.is_autocast_cache_enabled(), devices)


class _SavedBefore(torch.autograd.Function):
    """Makes an output that is not computed yet; the caller fills it. Backward computes it again, tile by tile."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, tiled: TiledRows, how: _How, shape: tuple[int, ...], dtype: torch.dtype, *trained: Any) -> torch.Tensor:
        ctx.save_for_backward(flat)
        ctx.tiled, ctx.how, ctx.trained = tiled, how, trained
        ctx.random = _random_state(how) if _draws(tiled.module) else None
        return flat.new_empty(shape, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        how: _How = ctx.how
        d_flat = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.trained)
        with torch.random.fork_rng(how.devices, enabled=ctx.random is not None):
            if ctx.random is not None:
                _set_random_state(ctx.random, how)
            with torch.enable_grad(), torch.autocast(flat.device.type, how.autocast, enabled=how.autocast is not None, cache_enabled=how.cache):
                for tile in ctx.tiled.tiles(flat.shape[0]):
                    part = flat[tile].detach()[None].requires_grad_(d_flat is not None)
                    wanted = ([] if d_flat is None else [part]) + list(ctx.trained)
                    shares = list(_differentiated(ctx.tiled.module, part, wanted, grad[tile][None]))
                    if d_flat is not None:
                        d_flat[tile] = shares.pop(0)[0]
                    sums = [_added(total, share) for total, share in zip(sums, shares, strict=True)]
        d_trained = [None if total is None else total.to(parameter.dtype) for total, parameter in zip(sums, ctx.trained, strict=True)]
        return (d_flat, None, None, None, None, *d_trained)


def _differentiated(module: nn.Module, part: torch.Tensor, wanted: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    answer = module(part)
    with torch.autocast(part.device.type, enabled=False):
        return torch.autograd.grad(answer, wanted, grad, allow_unused=True)


def _added(total: torch.Tensor | None, share: torch.Tensor | None) -> torch.Tensor | None:
    """Sums over tiles are kept in float32 at least: there may be many."""
    if share is None:
        return total
    if total is None:
        return share.to(torch.promote_types(share.dtype, torch.float32))
    return total.add_(share)


def _draws(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in module.modules())


def _random_state(how: _How) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in how.devices)]


def _set_random_state(states: list[torch.Tensor], how: _How) -> None:
    torch.set_rng_state(states[0])
    for state, device in zip(states[1:], how.devices, strict=True):
        torch.cuda.set_rng_state(state, device)
