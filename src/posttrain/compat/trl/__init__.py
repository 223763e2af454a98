"""What `import trl` gives to scripts: configs, trainers, the parser of flat YAML files and command lines, and the
functions around them.

Names are loaded when they are first used. Those that are not here are not TRL's public ones, or have no counterpart
(docs/migration.md).
"""

from __future__ import annotations

import importlib
from typing import Any

_ARGUMENTS = "posttrain.compat.trl.arguments"
_HOME = {
    "DatasetConfig": _ARGUMENTS,
    "DatasetMixtureConfig": _ARGUMENTS,
    "ModelConfig": _ARGUMENTS,
    "ScriptArguments": _ARGUMENTS,
    "get_dataset": _ARGUMENTS,
    "get_kbit_device_map": _ARGUMENTS,
    "get_peft_config": _ARGUMENTS,
    "get_quantization_config": _ARGUMENTS,
    "init_zero_verbose": _ARGUMENTS,
    "is_conversational_from_value": "posttrain.compat.trl.data",
    "TrlParser": "posttrain.compat.trl.parser",
}
# Part of the library under the same name.
_SHARED = (
    *(f"{method}{part}" for method in ("CPO", "DPO", "GRPO", "KTO", "ORPO", "PPO", "RLOO", "Reward", "SFT") for part in ("Config", "Trainer")),
    "apply_chat_template",
    "extract_prompt",
    "is_conversational",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "unpair_preference_dataset",
)


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _SHARED:
        raise AttributeError(f"module 'posttrain.compat.trl' has no attribute '{name}'; it has: {', '.join(__dir__())}")
    value = getattr(importlib.import_module(_HOME.get(name, "posttrain")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, *_SHARED])
