"""Adapters in and out of a model: loading them to be trained on, folding them into the weights, and saving what plain transformers loads.

Folding is exact up to rounding: W + (alpha / r) B A. A base that was quantised is dequantised first, because the adapters learned against
the quantised weights; it is never quantised again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.models.head import base_model
from posttrain.models.load import load_model, prepare_model, stop_token_ids
from posttrain.models.seeding import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"


def is_adapter(name: str | Path) -> bool:
    """Whether `name` is a directory of adapters, as PEFT saves them."""
    return (Path(name) / ADAPTER).is_file()


def base_of(name: str | Path) -> str:
    """The name of the model that the adapters in a directory belong to. Raises UserError where they do not say."""
    base = json.loads((Path(name) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{name} holds adapters, but not the name of the model they belong to; set base_model_name_or_path in {ADAPTER}")
    return str(base)


def load_trainable(name: str, *, trust_remote_code: bool = False, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """As `load_model`; from a directory of adapters the model they belong to, with the adapters on it and ready to be trained on."""
    if not is_adapter(name):
        return load_model(name, trust_remote_code=trust_remote_code, seed=seed, **kwargs)
    from peft import PeftModel

    if not (Path(name) / "adapter_model.safetensors").is_file():
        raise UserError(f"{name} holds adapters without adapter_model.safetensors; other formats may carry code and are not read")
    base = load_model(base_of(name), trust_remote_code=trust_remote_code, seed=seed, **kwargs)
    with seeded(seed):
        adapted: Any = PeftModel.from_pretrained(base, name, is_trainable=True)  # not a PreTrainedModel, and used like one
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)  # masters, as `add_lora` makes them
    return adapted


def load_merged(name: str, *, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A model without adapters: plain ones as they are, adapters folded into theirs. A quantised base (keyword `quantization_config`) is dequantised."""
    if not is_adapter(name):
        return load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    from peft import PeftModel

    base = load_model(base_of(name), dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    if "quantization_config" in kwargs:
        base = base.dequantize()
    with seeded(0):  # initialisations that change the base are made again
        adapted = PeftModel.from_pretrained(base, name)
    return merge_adapters(adapted)


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, the adapters folded into its weights. Raises UserError where folding gives no finite weights."""
    try:
        merged = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:  # PEFT's, for NaN
        raise UserError(f"the adapters cannot be merged: {error}") from error
    _untie_what_differs(merged)
    prepare_model(merged)
    return merged


def save_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """A directory that transformers, vLLM and llama.cpp's converter read: safetensors, config, tokenizer with its chat template, and every stop
    token in generation_config.json. `dtype`: of the saved weights; the model is cast. None: as they are."""
    base = base_model(model)
    if dtype is not None:
        base = base.to(dtype)  # type: ignore[arg-type]
    stops = list(stop_token_ids(base, tokenizer))
    base.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if base.generation_config.pad_token_id is None:
        base.generation_config.pad_token_id = tokenizer.pad_token_id
    base.config.eos_token_id, base.config.pad_token_id = tokenizer.eos_token_id, base.generation_config.pad_token_id  # a single one, for converters
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _untie_what_differs(model: PreTrainedModel) -> None:
    """A head that was trained apart from the embedding it used to be tied to must be saved by itself."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.tie_word_embeddings and head is not None and not torch.equal(head.weight, embedding.weight):  # type: ignore[arg-type]
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
