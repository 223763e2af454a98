"""What fake tensors cannot go through, replaced by modules with the same bytes: 4-bit linears and 8-bit Adam of
bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from posttrain.sizes import NF4_BLOCK, nf4_bytes

ADAM_BLOCK, ADAM_SMALLEST = 256, 4096  # elements that share a scale; smaller parameters keep their state in 32 bits


class FourBitLinear(nn.Linear):
    """A linear whose weights are packed; they are unpacked for every product, forward and backward."""

    def __init__(self, like: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = like.in_features, like.out_features, dtype
        self.register_parameter("bias", like.bias)
        device = like.weight.device
        self.weight = nn.Parameter(torch.empty(nf4_bytes(like.weight.numel()), dtype=torch.uint8, device=device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Product.apply(x, self)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.clone()  # as PEFT does with what a 4-bit linear answers

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in); on the way there the scales, in 32 bits."""
        scales = self.weight.new_empty(self.out_features * self.in_features // NF4_BLOCK, dtype=torch.float32)
        weight = self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)
        del scales
        return weight.to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FourBitLinear) -> torch.Tensor:
        ctx.linear, ctx.dtype = linear, x.dtype
        return F.linear(x.to(linear.dtype), linear.unpacked(linear.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad @ ctx.linear.unpacked(grad.dtype)).to(ctx.dtype), None


def put_in_4bit(model: nn.Module, dtype: torch.dtype, skip: Iterable[nn.Module]) -> None:
    """Every linear of `model` but `skip` becomes its 4-bit stand-in."""
    kept = set(skip)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child not in kept:
                setattr(module, name, FourBitLinear(child, dtype))


class EightBitAdam:
    """The state of bitsandbytes' AdamW8bit: two bytes a weight and a scale for every block of them.

    in_32_bits: parameters whose state is not quantised; transformers says so of embeddings.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], in_32_bits: Iterable[torch.Tensor] = ()) -> None:
        whole = {id(parameter) for parameter in in_32_bits}
        self.state = [moment for parameter in parameters for moment in self._moments(parameter, id(parameter) in whole)]

    @staticmethod
    def _moments(parameter: torch.Tensor, is_whole: bool) -> list[torch.Tensor]:
        n = parameter.numel()
        if n < ADAM_SMALLEST or is_whole:
            return [parameter.new_empty(n, dtype=torch.float32) for _ in range(2)]
        return [parameter.new_empty(n + 4 * -(-n // ADAM_BLOCK), dtype=torch.uint8) for _ in range(2)]
