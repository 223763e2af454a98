"""Layers that a LoraConfig names: each must exist. PEFT skips a name without a match as long as another one has a
match."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from posttrain.errors import UserError, did_you_mean

_SHORTHAND = "all-linear"  # PEFT's word for every linear layer but the head


def check_targets(model: nn.Module, peft_config: Any) -> None:
    """Raises UserError for a name among target_modules, modules_to_save or exclude_modules that no module of `model`
    has, with the nearest one."""
    names = [name for name, _ in model.named_modules() if name]
    for setting in ("target_modules", "modules_to_save", "exclude_modules"):
        given = getattr(peft_config, setting)
        if given is None or given == _SHORTHAND:
            continue
        if isinstance(given, str):
            _check_pattern(setting, given, names)
        else:
            for wanted in given:
                if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                    raise UserError(f"{setting}: the model has no module '{wanted}'.{_near(wanted, names)}")
    for parameter in peft_config.target_parameters or ():
        known = [name for name, _ in model.named_parameters()]
        if not any(name == parameter or name.endswith(f".{parameter}") for name in known):
            raise UserError(f"target_parameters: the model has no parameter '{parameter}'.{_near(parameter, known)}")


def _check_pattern(setting: str, pattern: str, names: list[str]) -> None:
    """Text is a regular expression for whole paths, so the name of a layer alone matches nothing."""
    try:
        matches = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UserError(f"{setting}={pattern!r} is not a regular expression: {error}; give a list of names instead") from error
    if matches:
        return
    if any(name.endswith(f".{pattern}") for name in names):
        raise UserError(f"{setting}={pattern!r} is text, so it must match a module's whole path; give a list: [{pattern}]")
    raise UserError(f"{setting}={pattern!r} matches no module of the model.{_near(pattern, names)} Or use {_SHORTHAND!r}")


def _near(wanted: str, names: Iterable[str]) -> str:
    """The nearest name, as long as the one that was given."""
    depth = wanted.count(".") + 1
    return did_you_mean(wanted, sorted({".".join(name.split(".")[-depth:]) for name in names if not name.split(".")[-1].isdigit()}))
