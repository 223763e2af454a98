"""The engine that a recipe or a config names: one of ours, or one that another package adds.

A package adds an engine by an entry point of the group "posttrain.engines", `NAME = "module:make"`; `make(tokenizer,
autocast_dtype=...)` returns it.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch

from posttrain.errors import UserError, did_you_mean
from posttrain.rollout.hf import HFEngine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Engine

GROUP = "posttrain.engines"


def check_engine(name: str) -> None:
    """Raises UserError, which lists the engines there are, for another name."""
    known = ["local", "hf", *entry_points(group=GROUP).names]
    if name not in known:
        listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise UserError(f"engine={name!r}: use {listed}.{did_you_mean(str(name), known)}")


def make_engine(kind: str, tokenizer: Any, *, autocast_dtype: torch.dtype | None = None, **settings: Any) -> Engine:
    """kind: as `check_engine` accepts it. `settings`: those of "local", which mean nothing to others. autocast_dtype:
    the precision to compute in."""
    if kind == "local":
        return LocalEngine(tokenizer, autocast_dtype=autocast_dtype, **settings)
    if kind == "hf":
        return HFEngine(tokenizer, autocast_dtype=autocast_dtype)
    engine: Engine = entry_points(group=GROUP)[kind].load()(tokenizer, autocast_dtype=autocast_dtype)
    return engine
