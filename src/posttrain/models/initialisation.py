"""Initialisations of adapters that change the model beside them, or that need data: which of them can be loaded again.

PEFT computes the change anew when it loads such adapters. For PiSSA and OLoRA that is a decomposition of the weights,
the same every time; for the others it depends on random numbers or on data that nobody saves, and the loaded model
would silently be another one.
"""

from __future__ import annotations

from typing import Any

from posttrain.errors import UserError

CHANGE_THE_BASE = ("pissa", "olora")  # and can be computed again
_REFUSED = {
    "pissa_niter_": "it changes the weights beside the adapters at random; use init_lora_weights='pissa', which decomposes them exactly",
    "corda": "it changes the weights beside the adapters by data that are not saved; use 'pissa' or 'olora'",
    "lora_ga": "it changes the weights beside the adapters by gradients that are not saved; use 'pissa' or 'olora'",
    "loftq": "it quantises the weights beside the adapters anew; use load_in_4bit, which quantises them once, with the default initialisation",
    "eva": "it needs activations on data, which a trainer does not collect: make the adapters with peft.get_peft_model and "
    "peft.initialize_lora_eva_weights, and give that model without peft_config",
}  # fmt: skip


def check_initialisation(given: Any, who: str, *, has_data: bool = True) -> None:
    """Raises UserError for adapters that could not be loaded again. has_data: EVA's weights are there already, and are
    weights like others."""
    for name, why in _REFUSED.items():
        if isinstance(given, str) and given.lower().startswith(name) and not (name == "eva" and has_data):
            raise UserError(f"{who} init_lora_weights={given!r}: {why}")


def changes_the_base(given: Any) -> bool:
    """Whether making such adapters changes the weights beside them."""
    return isinstance(given, str) and given.lower() in CHANGE_THE_BASE
