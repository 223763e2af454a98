"""LoRA adapters, and the reference policy: the same model with its adapters off, or a frozen copy.

Adapters are float32 masters by default whatever the base model's dtype, as optimizers want them; bf16 halves their memory where it is tight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from posttrain.errors import UserError
from posttrain.models.head import base_model


def add_lora(model: nn.Module, peft_config: Any, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model` inside a PeftModel whose trainable weights have `dtype`. Raises UserError for anything but one LoraConfig."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise UserError("the model already has adapters: give either an adapted model or peft_config, not both")
    if not isinstance(peft_config, LoraConfig):
        raise UserError(f"peft_config is a {type(peft_config).__name__}; only LoRA is built in: use peft.LoraConfig(r=..., target_modules=...)")
    adapted = get_peft_model(model, peft_config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


class Reference:
    """The policy that the KL is measured against. Modes and gradients are the caller's: run it in eval and under no_grad."""

    def __init__(self, adapted: nn.Module | None, frozen: nn.Module | None) -> None:
        self._adapted = adapted  # None: the reference is a copy
        self.frozen = frozen  # None: the reference is the model without its adapters

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The module to call for reference log-probs; adapters (modules_to_save too) come back on exit, also after an exception."""
        if self.frozen is not None:
            yield self.frozen
            return
        assert self._adapted is not None
        with self._adapted.disable_adapter():  # type: ignore[operator]
            yield self._adapted

    @torch.no_grad()
    def sync(self, model: nn.Module, alpha: float) -> None:
        """Move a frozen copy towards the policy: ref <- alpha * policy + (1 - alpha) * ref (TR-DPO, Gorbatovski et al. 2024, eq. 5)."""
        if self.frozen is None:
            raise UserError("sync_ref_model needs a frozen copy of the model, but with LoRA the reference is the model without adapters: turn it off")
        for ours, theirs in zip(self.frozen.parameters(), base_model(model).parameters(), strict=True):
            ours.lerp_(theirs.to(ours), alpha)

    def save(self, path: Path) -> None:
        """The copy's weights, as safetensors. Only a copy that moved has any worth keeping."""
        assert self.frozen is not None
        save_model(self.frozen, str(path))

    def load(self, path: Path) -> None:
        assert self.frozen is not None
        load_model(self.frozen, str(path))


def reference_for(model: nn.Module, needed: bool) -> Reference | None:
    """The reference of `model` as it is now; None if none is needed. `model` is unwrapped (PEFT or plain)."""
    if not needed:
        return None
    if type(model).__module__.startswith("peft."):
        return Reference(model, None)
    frozen = copy.deepcopy(base_model(model))
    return Reference(None, frozen.eval().requires_grad_(False))
