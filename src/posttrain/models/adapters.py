"""LoRA adapters, and the reference policy: the same model with new adapters off or with older ones as they were, or a
frozen copy.

Adapters are float32 masters by default whatever the base model's dtype, as optimizers want them; bf16 halves their
memory where it is tight.
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
from posttrain.models.initialisation import check_initialisation
from posttrain.models.mixed import bridge
from posttrain.models.seeding import seeded
from posttrain.models.targets import check_targets


def add_lora(model: nn.Module, peft_config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """`model` inside a PeftModel whose trainable weights have `dtype` and are drawn from `seed`. Raises UserError for
    anything but one LoraConfig."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise UserError("the model already has adapters: give either an adapted model or peft_config, not both")
    if not isinstance(peft_config, LoraConfig):
        raise UserError(f"peft_config is a {type(peft_config).__name__}; only LoRA is built in: use peft.LoraConfig(r=..., target_modules=...)")
    check_initialisation(peft_config.init_lora_weights, "peft_config has", has_data=False)
    check_targets(model, peft_config)
    try:
        with seeded(seed):
            adapted = get_peft_model(model, peft_config)
    except (
        ValueError,
        TypeError,
        RuntimeError,
        NotImplementedError,
        ImportError,
    ) as error:  # PEFT's: ranks, patterns, layers that LoRA does not know
        raise UserError(f"peft_config does not go onto this model: {' '.join(str(error).split())[:300]}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    bridge(adapted)
    return adapted


Weights = list[tuple[nn.Parameter, torch.Tensor]]


class Reference:
    """The policy that the KL is measured against. Modes and gradients are the caller's: run it in eval and under
    no_grad."""

    def __init__(self, adapted: nn.Module | None, frozen: nn.Module | None, start: Weights | None = None) -> None:
        self._adapted = adapted  # None: the reference is a copy
        self.frozen = frozen  # None: the reference is the model itself, its adapters off or as they were
        self._start = start  # of adapters that had learned something before. None: they had not, so the reference is the model without them

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The module to call for reference log-probs; adapters (modules_to_save too) come back on exit, also after an
        exception."""
        if self.frozen is not None:
            yield self.frozen
            return
        assert self._adapted is not None
        with self._adapted.disable_adapter() if self._start is None else _holding(self._start):  # type: ignore[operator]
            yield self._adapted

    @torch.no_grad()
    def sync(self, model: nn.Module, alpha: float) -> None:
        """Move a frozen copy towards the policy: ref <- alpha * policy + (1 - alpha) * ref (TR-DPO, Gorbatovski et al.
        2024, eq. 5)."""
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
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Reference(model, None, None if _are_new(model) else [(parameter, parameter.detach().clone()) for parameter in trained])
    frozen = copy.deepcopy(base_model(model))
    return Reference(None, frozen.eval().requires_grad_(False))


def _are_new(model: nn.Module) -> bool:
    """Whether the model without its adapters is the one that training starts from, and stays so: a factor of each
    product is 0, whole modules equal their originals, and nothing else is trained."""
    from peft.utils import ModulesToSaveWrapper

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            other = trained[name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A.", ".lora_embedding_B.")]
            if parameter.any() and other.any():
                return False
        elif ".lora_" not in name and ".modules_to_save." not in name:
            return False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            ours = module.modules_to_save[module.active_adapters[0]]
            if not all(torch.equal(was.to(now), now) for was, now in zip(module.original_module.parameters(), ours.parameters(), strict=True)):
                return False
    return True


@contextmanager
def _holding(weights: Weights) -> Iterator[None]:
    """Parameters have these values inside. What autocast remembers of the others is forgotten, on entry and on exit."""
    held = [(parameter, parameter.data) for parameter, _ in weights]
    try:
        for parameter, value in weights:
            parameter.data = value
        torch.clear_autocast_cache()
        yield
    finally:
        for parameter, value in held:
            parameter.data = value
        torch.clear_autocast_cache()
