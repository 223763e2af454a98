"""How the training module lends its weights to a rollout: no second model, at most one image of the weights, gone on exit.

- Under autocast each weight is cast once for the whole rollout, not once per call. Autocast keeps a cast only of a weight that requires grad
  and only while some autocast is open, so both are seen to here.
- On a CPU without native bfloat16, bfloat16 matmuls are emulated several times slower than float32: there a rollout runs in float32.
- A float32 `Linear` reads its weight fastest with the input dimension outermost when rows are few: the image is that transposed copy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_SMALL = 1 << 16  # weights of fewer elements stay in the processor's cache in any order


def rollout_dtype(requested: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The autocast dtype to sample in: the requested one, or None (as stored) where the processor would only emulate it."""
    emulated = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()
    return None if requested is torch.bfloat16 and emulated else requested


@contextmanager
def lent(model: torch.nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Within: weights are fast to call, casts are kept between `compute` blocks. On exit every tensor and flag is as it was."""
    frozen = [] if dtype is None else [p for p in model.parameters() if p.dtype is torch.float32 and not p.requires_grad]
    wide = _transposable(model) if dtype is None and device.type == "cpu" else []
    originals = [weight.data for weight in wide]
    torch.clear_autocast_cache()  # an enclosing autocast may hold images from before the last optimizer step
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)  # nothing is differentiated in here: it only lets autocast keep the cast
        for weight in wide:
            weight.data = weight.data.t().contiguous().t()  # same shape and values, columns contiguous
        with torch.autocast(device.type, enabled=False):  # computes nothing: while it is open, the casts live
            yield
    finally:
        torch.clear_autocast_cache()  # images made without grad must not reach training
        for weight, original in zip(wide, originals, strict=True):
            weight.data = original
        for parameter in frozen:
            parameter.requires_grad_(False)


def compute(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """The autocast of one forward pass."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _transposable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    linears = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
    unique = {id(weight): weight for weight in linears if type(weight) is torch.nn.Parameter}  # quantized weights are subclasses
    return [weight for weight in unique.values() if weight.dtype is torch.float32 and weight.numel() >= _SMALL and weight.data.is_contiguous()]
