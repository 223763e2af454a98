"""Modules that are trained in float32 among frozen 16-bit ones: what goes in is cast to their weights, what comes out
back to the stream's dtype.

PEFT casts around LoRA's factors, but not around modules that are trained as a whole (modules_to_save).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.head import base_model


def bridge(model: nn.Module) -> None:
    """Let the modules of a PeftModel that are trained as a whole have another dtype than the rest. Where the dtypes are
    one, nothing is cast.

    Raises UserError for biases that are trained in another dtype than the frozen weights of their layers.
    """
    from peft.utils import ModulesToSaveWrapper

    _check_biases(model)
    base = base_model(model)
    heads = (base.get_output_embeddings(), base._modules.get("score"))  # nothing follows them: logits and scores stay in float32
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and _to_weights not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_to_weights, with_kwargs=True)
            if not any(module is head for head in heads):
                module.register_forward_hook(_to_stream)


def _check_biases(model: nn.Module) -> None:
    for name, module in model.named_modules():
        bias, weight = module._parameters.get("bias"), module._parameters.get("weight")
        if bias is None or weight is None or not weight.is_floating_point() or weight.requires_grad or not bias.requires_grad:
            continue
        if bias.dtype != weight.dtype:
            raise UserError(
                f"the bias of {name} is trained in {bias.dtype} beside frozen weights in {weight.dtype}, and a layer has one dtype: "
                "load the model in float32, or use bias='none'"
            )


def _to_weights(wrapper: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    is_off = wrapper.disable_adapters or not wrapper.active_adapters
    return _cast((inputs, keywords), _dtype(wrapper.original_module if is_off else wrapper.modules_to_save[wrapper.active_adapters[0]]))


def _to_stream(wrapper: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, _dtype(wrapper.original_module))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors in a value, in the tuples and dicts that layers hand to each other too; caches are left as
    they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(inner, dtype) for inner in value)
    if type(value) is dict:
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    return value


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
