"""Of which dtype weights are: what is trained is float32, what stands frozen beside adapters keeps the checkpoint's 16
bits where it can.

Adam's updates are about the learning rate in size. bfloat16 has 8 bits, so an update below 1/256 of a weight rounds
away; and in float16 Adam's eps is 0. So 16-bit weights do not learn at the rates of post-training, and float16 ones
break.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.adapter_files import base_of, is_adapter, settings_of
from posttrain.models.head import base_model
from posttrain.models.initialisation import changes_the_base
from posttrain.models.mixed import bridge

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)


def beside_adapters(name: str, computes_in: torch.dtype | None, peft_config: Any = None) -> torch.dtype:
    """Of the frozen weights of model `name`, or of the one that the adapters there belong to: the checkpoint's 16 bits
    where a run computes in these (`computes_in`: its autocast), else float32. peft_config: of new adapters.

    So no weight is rounded, none is cast again in every forward, and a run that computes in float32 is as fast as ever.
    """
    if is_adapter(name):
        settings, name = settings_of(name), base_of(name)
        initialisation, biases = settings.get("init_lora_weights"), settings.get("bias", "none")
    else:  # the defaults: not LoRA, which is refused later
        initialisation, biases = getattr(peft_config, "init_lora_weights", None), getattr(peft_config, "bias", "none")
    if biases != "none":  # trained, in float32, and a layer has one dtype
        return torch.float32
    if computes_in not in HALVES or changes_the_base(initialisation):  # what is taken out of the weights is in the adapters, to the last bit
        return torch.float32
    return computes_in if stored_dtype(name) == computes_in else torch.float32


def dtype_named(name: torch.dtype | str) -> torch.dtype:
    """Raises UserError for what is no floating dtype."""
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype={name!r} is no floating dtype; use float32, bfloat16 or float16")
    return dtype


def default_autocast() -> torch.dtype | None:
    """What trainers compute in unless they are told."""
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else None


def stored_dtype(name: str) -> torch.dtype | None:
    """Of a checkpoint's weights, from its config or else from its first floating tensor; None: neither says."""
    from transformers import AutoConfig

    try:
        said = AutoConfig.from_pretrained(name).dtype
    except (OSError, ValueError):  # loading the model will say what is wrong, in a sentence
        return None
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    return _dtype_of_files(Path(name))


def _dtype_of_files(directory: Path) -> torch.dtype | None:
    """Of the first floating tensor, from the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    if (dtype := opened.get_slice(key).get_dtype()) in names:
                        return names[dtype]
        except SafetensorError:  # as above
            return None
    return None


def make_trainable(model: nn.Module, *, keeps: Any = None) -> None:
    """Give what is trained the precision that it needs, and say so. keeps: a dtype that somebody asked for by name,
    which stays.

    A model that is trained whole becomes float32; frozen weights beside adapters stay. Raises UserError for float16
    weights that would be trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    halves = {parameter.dtype for parameter in trained} & set(HALVES)
    if torch.float16 in halves:
        raise UserError(
            "float16 weights cannot be trained: Adam's eps is 0 in float16, so updates are of any size and then NaN. "
            "Use float32 weights (leave dtype out, or model.float()) with fp16=True to compute in float16"
        )
    if not halves:
        return
    is_adapted = type(model).__module__.startswith("peft.")
    if is_adapted and not any(
        "lora_" in name and parameter.dtype in HALVES for name, parameter in model.named_parameters() if parameter.requires_grad
    ):
        for parameter in trained:  # PEFT leaves modules_to_save in the dtype of the model, its own factors it makes float32
            parameter.data = parameter.data.float()
        bridge(model)
        return
    count = sum(parameter.numel() for parameter in trained if parameter.dtype is torch.bfloat16)
    if is_adapted or keeps in (torch.bfloat16, "bfloat16"):
        logger.warning(
            "%s trained weights stay bfloat16, as asked: updates smaller than 1/256 of a weight round away. At the learning rates of post-training that is "
            "most of them; %s",
            f"{count:,}", "adapter_dtype='float32' keeps them" if is_adapted else "leave dtype out for float32 weights, or raise learning_rate",
        )  # fmt: skip
        return
    base_model(model).float()
    logger.warning(
        "the model came in bfloat16, where updates smaller than 1/256 of a weight round away: it is trained in float32, which takes %.2g GiB more. "
        "model_init_kwargs={'dtype': 'bfloat16'} keeps 16 bits",
        2 * sum(parameter.numel() for parameter in model.parameters()) / 2**30,
    )
