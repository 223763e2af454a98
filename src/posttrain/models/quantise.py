"""Linears in 4 bits, and which of them are worth keeping in 16.

These are ranked by what NF4 does to them: the squared error of the weights as a share of their squared norm. The worst
are kept until a budget of bytes is spent. Weights are read one by one from the safetensors files; the model is never
whole in memory for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.io import read_json

HALF, PACKED = 2.0, 0.5 + 1 / 64  # bytes of a weight in 16 bits, and in NF4 with double quantisation
_NEVER = ("embed_tokens", "lm_head", "wte", "wpe", "embed_out", "norm")  # parts of the names of what is not quantised anyway


def in_4bit(name: str, *, has_adapters: bool, keep_in_16bit: int | Sequence[str] | None = None) -> dict[str, Any]:
    """What `from_pretrained` is told to load model `name` for QLoRA (Dettmers et al. 2023): NF4, doubly quantised,
    computed in bf16.

    keep_in_16bit: names of linears that are not quantised, or bytes to spend on those that lose most. Raises UserError
    where it cannot work.
    """
    if not has_adapters:
        raise UserError("load_in_4bit needs lora=peft.LoraConfig(...): 4-bit weights cannot be trained, only adapters beside them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: install it with `pip install posttrain[gpu]`")
    from transformers import BitsAndBytesConfig

    kept = names_to_keep(name, keep_in_16bit)
    skipped = {"llm_int8_skip_modules": ["lm_head", *kept]} if kept else {}  # a list of ours replaces the one that spares the head
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True, **skipped
    )
    return {"quantization_config": quantised}


def keep_packing(model: nn.Module) -> None:
    """Keep 4-bit weights as they were packed when they were loaded. On a CPU with AVX512 bitsandbytes packs them anew
    at the first evaluation, and back when they are saved, and rounds their scales each time: a run would depend on when
    it was saved, and a resumed one would be another."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def worst_in_4bit(directory: str | Path, budget: int) -> list[str]:
    """Names of the linears that lose most, most first, whose further bytes in 16 bits are at most `budget` together.

    `directory`: of a model with safetensors. Raises UserError where there is none.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("keep_in_16bit needs bitsandbytes: install it with `pip install posttrain[gpu]`")
    losses = sorted(((_relative_error(weight), weight.numel(), name) for name, weight in _linears(Path(directory))), reverse=True)
    kept, left = [], budget
    for _, weights, name in losses:
        further = int(weights * (HALF - PACKED))
        if further <= left:
            kept.append(name)
            left -= further
    return kept


def names_to_keep(directory: str, keep_in_16bit: int | Sequence[str] | None) -> list[str]:
    """A budget of bytes as names; names as they are."""
    if keep_in_16bit is None:
        return []
    if not isinstance(keep_in_16bit, int):
        return list(keep_in_16bit)
    if keep_in_16bit < 0:
        raise UserError(f"keep_in_16bit={keep_in_16bit}: give a budget in bytes, or names of linears")
    return worst_in_4bit(_local(directory), keep_in_16bit) if keep_in_16bit else []


def _local(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def _relative_error(weight: torch.Tensor) -> float:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight.float()
    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    error = dequantize_4bit(packed, state).view_as(weight) - weight
    return float(error.square().sum() / weight.square().sum().clamp_min(torch.finfo(torch.float32).tiny))


def _linears(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight (out, in) of every linear but the head, one at a time."""
    from safetensors import safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"keep_in_16bit: there are no safetensors in {directory} to be judged")
    config = directory / "config.json"
    if config.is_file() and "quantization_config" in read_json(config):
        raise UserError(f"keep_in_16bit: {directory} is quantised already; take the model that it was made from")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                name = key.removesuffix(".weight")
                if name != key and not any(part in name for part in _NEVER):
                    weight = opened.get_tensor(key)
                    if weight.ndim == 2:
                        yield name, weight
