"""What every setting must be, whoever gives it: text of a command line becomes its value, a number is finite and in its
range.

`transformers.HfArgumentParser` reads scripts' command lines by the annotations of a config. It knows one type and None,
so a setting that may also be a switch or a mapping is told to it as text, and read here.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from posttrain.errors import UserError
from posttrain.io import mapping

_INSIDE_MAPPING = re.compile(r"\bdict\[[^\]]*\]")
_KINDS = re.compile(r"\b(str|int|float|bool|dict|list|None|Any)\b")
_INFINITE = ("max_grad_norm",)  # no clipping
_TOO_LARGE = 2**63  # what torch and transformers count with ends there

# (least, most), both included; None: any. Of whatever config has the setting.
RANGES: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("learning_rate", "value_learning_rate", "weight_decay"), (0, 100)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 2**-53)),
    **dict.fromkeys(("adam_epsilon", "warmup_ratio", "ref_model_mixup_alpha"), (0, 1)),
    **dict.fromkeys(("max_grad_norm", "num_train_epochs", "warmup_steps", "logging_steps", "save_steps", "eval_steps", "eval_delay"), (0, None)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), (1, None)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("dataloader_num_workers", "reward_retries"), (0, None)),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), (0, None)),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos", "discopop_tau"), (1e-6, None)),
    **dict.fromkeys(("off_policy_mask_threshold", "entropy_coef_delta", "entropy_target"), (0, None)),
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "cpo_alpha", "center_rewards_coefficient"), (0, None)),
    "max_steps": (-1, None),
}  # fmt: skip


def kinds_of(cls: Any) -> dict[str, frozenset[str]]:
    """Setting -> the kinds that its annotation names, {"float", "None"} of `float | None`; what is inside a list
    too."""
    return {field.name: frozenset(_KINDS.findall(_INSIDE_MAPPING.sub("dict", str(field.type)))) for field in fields(cls) if field.init}


def as_text_for_parsers(cls: Any) -> None:
    """Tell HfArgumentParser in its own terms what a class's own settings may be."""
    for field in fields(cls):
        kinds = _KINDS.findall(str(field.type))
        if field.name not in cls.__annotations__ or not field.init:
            continue
        if "str" in kinds and {*kinds} & {"bool", "int", "float"}:
            cls.__annotations__[field.name] = "str | None"
        if "bool" in kinds and {*kinds} & {"str", "None"}:
            field.metadata = MappingProxyType({**field.metadata, "nargs": "?", "const": True})  # also as a bare --name
        if {"list", "str", "None"} <= {*kinds}:
            cls.__annotations__[field.name] = "list[str] | None"
        if kinds[:1] in (["dict"], ["Any"]):
            cls.__annotations__[field.name] = "str | None"


def checked(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of settings as they are meant. Raises UserError, which names the setting, for those that no training
    can have."""
    lists = {field.name: field.default for field in fields(cls) if "list" in cls.kinds.get(field.name, ())}
    given = {name: lists.get(name) if value is None else value for name, value in values.items()}  # HfArgumentParser forgets the defaults of lists
    needed = {field.name for field in fields(cls) if field.init and isinstance(field.default, int | float) and "None" not in cls.kinds[field.name]}
    for name, value in given.items():
        if value is None and name in needed:
            raise UserError(f"{name}=None: it must be a number; leave it out for the default")
    return {name: _checked(name, value, cls.kinds.get(name, frozenset())) for name, value in given.items()}


def _checked(name: str, value: Any, kinds: frozenset[str]) -> Any:
    if isinstance(value, str):
        value = _read(name, value, kinds)
    if not kinds & {"int", "float"} or isinstance(value, str | dict):
        return value
    if isinstance(value, bool) and not kinds & {"bool", "Any"}:
        raise UserError(f"{name}={value}: it must be a number")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_number(name, one, kinds) for one in value]
    return _number(name, value, kinds)


def _read(name: str, text: str, kinds: frozenset[str]) -> Any:
    """What a text stands for where the setting is more than text."""
    if kinds & {"bool", "Any"} and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "dict" in kinds and (not kinds & {"str", "int"} or text.startswith("{")):
        try:
            return mapping(text)
        except ValueError as error:
            raise UserError(f'{name}={text!r:.60} is no mapping; give JSON, such as {{"key": 1}}') from error
    if "None" in kinds and kinds & {"int", "float"} and text.lower() in ("none", "null"):
        return None
    if "int" in kinds and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if kinds & {"int", "float"} and "str" not in kinds:
        try:
            return float(text)
        except ValueError as error:
            raise UserError(f"{name}={text!r:.60} is not a number") from error
    return text


def _number(name: str, value: Any, kinds: frozenset[str]) -> Any:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return value  # what it may be is its config's to say
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        raise UserError(f"{name} must lie between -2^63 and 2^63")
    value = float(value) if not isinstance(value, int) else value
    if not math.isfinite(value) and not (name in _INFINITE and value > 0):
        raise UserError(f"{name}={value}: it must be a finite number")
    if "float" not in kinds and value != int(value):
        raise UserError(f"{name}={value}: it must be a whole number")
    low, high = RANGES.get(name, (None, None))
    if (low is not None and value < low) or (high is not None and value > high):
        above = f"{low:g} or more" if high is None else f"from {low:g} to {high:.10g}"
        raise UserError(f"{name}={value}: it must be {above}")
    return value if "float" in kinds else int(value)
