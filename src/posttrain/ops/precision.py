"""What a device computes itself, and what it only emulates. The one place that asks the processor, or that a simulation
answers for it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch


class _StandIn(NamedTuple):
    kind: str
    has_fused_attention: bool


_stand_in: ContextVar[_StandIn | None] = ContextVar("_stand_in", default=None)  # None: a CPU tensor is a CPU tensor


@contextmanager
def standing_for(device_type: str, *, has_fused_attention: bool) -> Iterator[None]:
    """Inside, tensors on the CPU are treated as if they lay on a device of that type: for simulations, whose tensors
    hold nothing."""
    token = _stand_in.set(_StandIn(device_type, has_fused_attention))
    try:
        yield
    finally:
        _stand_in.reset(token)


def kind_of(device: torch.device) -> str:
    """The type of a device, or what the CPU stands for in a simulation."""
    stand_in = _stand_in.get()
    return device.type if stand_in is None or device.type != "cpu" else stand_in.kind


def has_fused_attention(device: torch.device) -> bool:
    """Whether attention that tells its log-sum-exp is one kernel there, forward and backward."""
    stand_in = _stand_in.get()
    return device.type == "cpu" and (stand_in is None or stand_in.has_fused_attention)


def multiplies_natively(dtype: torch.dtype, device_type: str) -> bool:
    """Whether matmuls of `dtype` are the device's own and not emulated. An emulated bf16 matmul takes 3 to 5 times as
    long as the float32 one of the same (rounded) numbers, whose answer is at least as exact: a product of two bf16
    numbers fits in a float32."""
    stand_in = _stand_in.get()
    return (stand_in is not None and stand_in.kind != "cpu") or _native(dtype, device_type)


@functools.cache
def _native(dtype: torch.dtype, device_type: str) -> bool:
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        instructions = {torch.bfloat16: torch.cpu._is_avx512_bf16_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
        return bool(instructions[dtype]())
    return dtype is torch.bfloat16 and platform.system() == "Linux" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
