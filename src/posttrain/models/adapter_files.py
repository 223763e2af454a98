"""Directories of adapters, as PEFT saves them: which model they belong to, and putting them on it. Only safetensors are
read.

A directory of adapters stands wherever a model's directory may. Adapters that were trained beside resized embeddings
resize their model first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.io import read_json
from posttrain.models.initialisation import check_initialisation
from posttrain.models.mixed import bridge
from posttrain.models.seeding import seeded
from posttrain.models.vocabulary import vocabulary_of

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORES = "SEQ_CLS"  # PEFT's word for the adapters of a classifier


def is_adapter(name: str | Path) -> bool:
    """Whether `name` is a directory of adapters."""
    return (Path(name) / ADAPTER).is_file()


def settings_of(name: str | Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises UserError where it cannot be read."""
    return read_json(Path(name) / ADAPTER)


def base_of(name: str | Path) -> str:
    """The name of the model that the adapters in a directory belong to. Raises UserError where they do not say."""
    base = settings_of(name).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{name} holds adapters, but not the name of the model they belong to; set base_model_name_or_path in {ADAPTER}")
    return str(base)


def is_scorer(name: str | Path) -> bool:
    """Whether the adapters in a directory are those of a reward model."""
    return is_adapter(name) and settings_of(name).get("task_type") == SCORES


def put_adapters(base: PreTrainedModel, name: str, *, is_trainable: bool, seed: int = 0) -> nn.Module:
    """`base` (changed in place) inside a PeftModel with the adapters of directory `name`. Raises UserError for what is
    not theirs."""
    from peft import PeftModel

    if not (Path(name) / WEIGHTS).is_file():
        raise UserError(f"{name} holds adapters without {WEIGHTS}; other formats may carry code and are not read")
    check_initialisation(settings_of(name).get("init_lora_weights"), f"the adapters in {name} were made with")
    try:
        with seeded(seed):
            _resize(base, name)
            adapted: nn.Module = PeftModel.from_pretrained(base, name, is_trainable=is_trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # of PEFT and safetensors: shapes, names, unknown settings, damaged files
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the adapters in {name} do not go onto '{base.config._name_or_path}': {said}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # masters, as `add_lora` makes them
    bridge(adapted)
    return adapted


def _resize(base: PreTrainedModel, name: str) -> None:
    """Give the embeddings as many rows as the adapters were trained with."""
    rows = _rows_of_embeddings(base, name)
    if rows is not None and rows != vocabulary_of(base):
        base.resize_token_embeddings(rows, mean_resizing=False)


def _rows_of_embeddings(base: PreTrainedModel, name: str) -> int | None:
    """The size of the vocabulary that the adapters' tensors show; None: they do not touch embeddings or head."""
    from safetensors import SafetensorError, safe_open

    names = {module: path for path, module in base.named_modules()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    axes = {".weight": 0, ".lora_embedding_A": 1}
    found = {f"{names[embedding]}{end}": axis for end, axis in axes.items()}
    if head is not None:
        found |= {f"{names[head]}.weight": 0, f"{names[head]}.lora_B.weight": 0}
    try:
        with safe_open(Path(name) / WEIGHTS, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                axis = found.get(key.removeprefix("base_model.model."))
                if axis is not None:
                    return int(opened.get_slice(key).get_shape()[axis])
    except SafetensorError as error:
        raise UserError(f"{Path(name) / WEIGHTS} cannot be read: {error}; save the adapters again") from error
    return None
