"""The model that a trainer starts with: loaded by name or as it was given, with its adapters, in the precision that
what is trained needs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.models.adapter_files import is_adapter
from posttrain.models.adapters import add_lora
from posttrain.models.initialisation import check_initialisation
from posttrain.models.load import prepare_model, without_dropout
from posttrain.models.merge import load_trainable
from posttrain.models.precision import make_trainable
from posttrain.trainers.core.config import ADAPTER_DTYPES, BaseConfig


def starting_model(model: str | PreTrainedModel, args: BaseConfig, peft_config: Any = None, quantization_config: Any = None) -> PreTrainedModel:
    """Ready to be trained; a model that was given is changed in place. Raises UserError for what cannot be loaded,
    adapted or trained."""
    started: Any = model  # a PeftModel is not a PreTrainedModel, and used like one
    packed = packing(model, peft_config, quantization_config)
    if isinstance(model, str):
        started = load_trainable(model, **args.loading(model, peft_config) | packed)
    else:
        prepare_model(model)
        for config in getattr(model, "peft_config", {}).values():  # of a PeftModel
            check_initialisation(getattr(config, "init_lora_weights", None), "the model's adapters have")  # None: they are no LoRA
    if peft_config is not None:
        started = add_lora(started, peft_config, dtype=ADAPTER_DTYPES[args.adapter_dtype], seed=args.seed)
    make_trainable(started, keeps=(args.model_init_kwargs or {}).get("dtype"))
    if args.disable_dropout:
        without_dropout(started)
    return started


def packing(model: str | PreTrainedModel, peft_config: Any, quantization_config: Any) -> dict[str, Any]:
    """What `from_pretrained` is told to pack frozen weights. Raises UserError where they would have to be trained, or
    are loaded already."""
    if quantization_config is None:
        return {}
    if not isinstance(model, str):
        raise UserError("quantization_config says how a model is loaded, and this one is loaded already; load it so, or give its name")
    if peft_config is None and not is_adapter(model):
        raise UserError("quantization_config needs peft_config=LoraConfig(...): packed weights cannot be trained, only adapters beside them")
    return {"quantization_config": quantization_config}
