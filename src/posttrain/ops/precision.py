"""What a device computes itself, and what it only emulates. The one place that asks the processor."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def multiplies_natively(dtype: torch.dtype, device_type: str) -> bool:
    """Whether matmuls of `dtype` are the device's own and not emulated. An emulated bf16 matmul takes 3 to 5 times as long as the
    float32 one of the same (rounded) numbers, whose answer is at least as exact: a product of two bf16 numbers fits in a float32."""
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        instructions = {torch.bfloat16: torch.cpu._is_avx512_bf16_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
        return bool(instructions[dtype]())
    return dtype is torch.bfloat16 and platform.system() == "Linux" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
