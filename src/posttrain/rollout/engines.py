"""The engine that a recipe or a config names."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.rollout.hf import HFEngine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Engine


def make_engine(kind: str, tokenizer: Any, *, autocast_dtype: torch.dtype | None = None, **settings: Any) -> Engine:
    """kind: "hf", or "local", whose `settings` mean nothing to the other. autocast_dtype: the precision to compute in."""
    if kind == "hf":
        return HFEngine(tokenizer, autocast_dtype=autocast_dtype)
    return LocalEngine(tokenizer, autocast_dtype=autocast_dtype, **settings)
