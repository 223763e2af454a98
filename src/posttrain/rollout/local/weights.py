"""How the training module lends its weights to a rollout: no second model, no copy but autocast's, nothing left behind.

- Under autocast each weight is cast once for the whole rollout, not once per call. Autocast keeps a cast only of a weight that requires grad
  and only while some autocast is open, so both are seen to here.
- On a CPU without native bfloat16, bfloat16 matmuls are emulated, several times slower than float32: there a rollout computes in float32.
- With few rows, MKL multiplies weight @ x.T about 1.5 to 2 times faster than x @ weight.T, and it pays to keep rows innermost in memory throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from posttrain.ops.precision import multiplies_natively

_FEW_ROWS = 32
_BLOCK = 256  # outputs
_GLIBC_MMAP_LIMIT = 1 << 25  # bytes, DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits
_LARGE = 1 << 15  # elements; smaller weights stay in the processor's cache and gain nothing


def rollout_dtype(requested: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The autocast dtype to sample in: the requested one, or None (as stored) where the processor would only emulate
    it."""
    return requested if requested is None or multiplies_natively(requested, device.type) else None


@contextmanager
def lent(model: torch.nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Within: casts are kept between `compute` blocks and products are fast. On exit every flag and method is as it
    was."""
    if device.type == "cpu":
        _keep_heap()
    torch.clear_autocast_cache()  # an enclosing autocast may hold casts from before the last optimizer step
    with ExitStack() as on_exit:
        on_exit.callback(torch.clear_autocast_cache)  # casts made without grad must not reach training
        on_exit.callback(_make_trainable, model)
        if "_original_forward" in model.__dict__:  # accelerate wraps `forward` in an autocast of its own; the rollout's precision is ours
            _swap_forward(model, model.__dict__["_original_forward"], on_exit)
        if dtype is None and device.type == "cpu" and torch.backends.mkl.is_available():
            for module in model.modules():
                faster = _FASTER.get(type(module))
                if faster is not None and module.weight.dtype is torch.float32 and module.weight.numel() >= _LARGE:
                    _swap_forward(module, faster(module), on_exit)
        if dtype is not None:
            for parameter in model.parameters():
                if parameter.dtype is torch.float32 and not parameter.requires_grad:
                    parameter.requires_grad_(True)  # nothing is differentiated in here: it only lets autocast keep the cast
                    on_exit.callback(parameter.requires_grad_, False)
        with torch.autocast(device.type, enabled=False):  # computes nothing: while it is open, the casts live
            yield


@contextmanager
def compute(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """The precision of one forward pass, without gradients. Inference mode spares every operator what it notes down for
    autograd, a fourteenth of a decode step of the model in benchmarks/decode.py; but autocast would keep no casts in
    it."""
    if dtype is None:
        with torch.inference_mode():
            yield
    else:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
            yield


def _make_trainable(model: torch.nn.Module) -> None:
    """What modules made while sampling and keep (a table of positions, a cast of a bias) was made in inference mode:
    autograd would refuse it, or leave a parameter without a gradient. Copies are plain. Found as parameters, buffers
    and attributes, and in lists and dicts that are attributes."""
    for module in model.modules():
        attributes = module.__dict__
        containers: list[Any] = [attributes, *(value for value in attributes.values() if isinstance(value, dict | list))]
        for kept in containers:
            for name, value in kept.items() if isinstance(kept, dict) else enumerate(kept):
                if not (isinstance(value, torch.Tensor) and value.is_inference()):
                    continue
                if isinstance(value, torch.nn.Parameter):
                    value.data = value.data.clone()  # the optimizer holds the parameter itself
                else:
                    kept[name] = value.clone()


def _keep_heap() -> None:
    """Take and free one large block (untouched, so it costs nothing): glibc learns from it not to hand blocks up to
    that size back at once.

    Else each step's logits are fresh zeroed pages: about 1,500 page faults, a sixth of a step of the model in
    benchmarks/decode.py.
    """
    torch.empty(_GLIBC_MMAP_LIMIT - (1 << 16), dtype=torch.uint8)


def _swap_forward(module: torch.nn.Module, forward: Callable[..., Any], on_exit: ExitStack) -> None:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    on_exit.callback(module.__dict__.pop, "forward") if before is None else on_exit.callback(module.__dict__.__setitem__, "forward", before)


def _weight_first(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`linear.forward` as weight @ x.T for a stream (1, rows, features) of few rows; it answers with rows innermost in
    memory."""
    weight, bias = linear.weight, linear.bias

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[0] != 1 or x.shape[1] > _FEW_ROWS:
            return F.linear(x, weight, bias)
        product = _by_blocks(weight, x[0]).t()[None]
        return product if bias is None else product + bias

    return forward


def _by_blocks(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (N, K) @ x.T, x (rows, K); a vocabulary's worth of weights in blocks that a core's cache holds."""
    outputs, inner = weight.shape
    if outputs % _BLOCK or outputs < 16 * _BLOCK:
        return F.linear(weight, x)
    blocks = outputs // _BLOCK
    return torch.bmm(weight.view(blocks, _BLOCK, inner), x.t().contiguous().expand(blocks, -1, -1)).view(outputs, -1)


def _rows_innermost(embedding: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`embedding.forward` in the memory order that weight-first products like; residuals, norms and activations hand it
    on."""
    plain = type(embedding).forward

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = plain(embedding, token_ids)
        return embedded if token_ids.numel() > _FEW_ROWS else embedded.transpose(-1, -2).contiguous().transpose(-1, -2)

    return forward


_FASTER: dict[type, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {torch.nn.Linear: _weight_first, torch.nn.Embedding: _rows_innermost}
