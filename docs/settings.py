"""The tables of settings in the pages of this folder, made from the configs' fields: name, default and help stand once, in the source.

`python docs/settings.py` rewrites what stands between the markers; tests/test_docs.py fails while it is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import marked
from transformers import TrainingArguments

from posttrain.losses.policy import OBJECTIVES
from posttrain.losses.preference import LOSSES
from posttrain.memory import TrainingJob, find_shape
from posttrain.memory.cards import GB
from posttrain.memory.choice import AUTOMATIC, Choice, choose
from posttrain.trainers.core.config import BaseConfig
from posttrain.trainers.cpo import CPOConfig
from posttrain.trainers.dpo import DPOConfig
from posttrain.trainers.grpo import GRPOConfig
from posttrain.trainers.kto import KTOConfig
from posttrain.trainers.offline.config import OfflineConfig, ReferenceConfig
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.orpo import ORPOConfig
from posttrain.trainers.ppo import PPOConfig
from posttrain.trainers.reward import RewardConfig
from posttrain.trainers.rloo import RLOOConfig
from posttrain.trainers.sft import SFTConfig

FOLDER = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora_r": 32, "dtype": "bfloat16"},
    "QLoRA": {"lora_r": 32, "dtype": "bfloat16", "load_in_4bit": True},
}


def settings_of(cls: type) -> str:
    """The fields that this class itself declares; what it inherits stands in another table."""
    own = [field for field in fields(cls) if field.name in cls.__annotations__ and field.init]
    rows = [f"| `{field.name}` | `{_short(field.default)}` | {_cell(field.metadata['help'])} |" for field in own]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def refused(cls: Any, parent: Any = BaseConfig) -> str:
    """Names that `parent` does not refuse too, grouped by their reason, each with the value that is let through."""
    by_reason: dict[str, list[str]] = {}
    for name, (harmless, why) in cls.refused.items():
        if name in parent.refused:
            continue
        by_reason.setdefault(why, []).append(f"`{name}` ({_short(harmless)})")
    rows = [f"| {', '.join(names)} | {_cell(why)} |" for why, names in by_reason.items()]
    return "\n".join(["| name (the value that changes nothing) | why, and what to use |", "|---|---|", *rows])


def unused(cls: Any, parent: Any = BaseConfig) -> str:
    """Names that are accepted and change nothing, which `parent` does not have too, grouped by their reason."""
    by_reason: dict[str, list[str]] = {}
    for name, (_, instead) in cls.unused.items():
        if cls is parent or name not in parent.unused:
            by_reason.setdefault(instead, []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {_cell(instead)} |" for instead, names in by_reason.items()]
    return "\n".join(["| name | what is done instead |", "|---|---|", *rows])


def objectives() -> str:
    rows = [
        f"| `{name}` | {objective.surrogate.__name__} | {'completion' if objective.per_sequence else 'token'} | {objective.reduction.__name__} | "
        f"{objective.tokens_of if objective.reduction.__name__ == 'token_mean' else ''} |"
        for name, objective in OBJECTIVES.items()
    ]
    return "\n".join(["| loss_type | surrogate | ratio of a | row weight | tokens counted over |", "|---|---|---|---|---|", *rows])


def preference_losses() -> str:
    rows = [f"| `{name}` | {_cell(' '.join((loss.__doc__ or '').split()))} |" for name, loss in LOSSES.items()]
    return "\n".join(["| loss_type | loss of a pair |", "|---|---|", *rows])


TRL = json.loads((FOLDER / "trl_settings.json").read_text(encoding="utf-8"))  # names and defaults of TRL's configs
CONFIGS: dict[str, Any] = {
    cls.__name__: cls for cls in (SFTConfig, DPOConfig, KTOConfig, RewardConfig, ORPOConfig, CPOConfig, GRPOConfig, RLOOConfig)
}


def beside_trl(name: str) -> str:
    """TRL's settings that differ from transformers', and what became of each: the same, another default, or refused with the reason."""
    ours, rows, same = CONFIGS[name], [], []
    known = {field.name: field for field in fields(ours)}
    transformers_own = {field.name for field in fields(TrainingArguments)} - BaseConfig.__annotations__.keys()  # these follow its version
    for setting, theirs in TRL["configs"][name].items():
        if setting in ours.unused:
            rows.append(f"| `{setting}` | `{_short(theirs)}` | accepted, changes nothing | {_cell(ours.unused[setting][1])} |")
            continue
        if setting not in known:
            harmless, why = ours.refused.get(setting, (None, "not a setting here"))
            rows.append(f"| `{setting}` | `{_short(theirs)}` | refused, unless it is `{_short(harmless)}` | {_cell(why)} |")
            continue
        if setting in transformers_own:
            continue
        field = known[setting]
        default = field.default if field.default is not MISSING else field.default_factory()
        if default == theirs:
            same.append(f"`{setting}`")
        else:
            rows.append(f"| `{setting}` | `{_short(theirs)}` | `{_short(default)}` | {_cell(field.metadata.get('help', ''))} |")
    table = ["| setting | TRL | here | meaning, or why |", "|---|---|---|---|", *rows]
    return "\n".join([f"The same name and default: {', '.join(same)}.", "", *table])


CARDS = (8, 16, 24, 40, 80)  # GB
CASES = [(model, method, tokens) for model in ("qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.1-8b") for method in METHODS for tokens in (1024, 8192)]
LETTERS = dict(zip(AUTOMATIC, "COTMR", strict=True))


def choices() -> str:
    """Which memory switches are chosen on which card, and how much longer an update takes."""
    head = f"| model | method | tokens | {' | '.join(f'{size} GB' for size in CARDS)} |"
    rows = []
    for model, method, tokens in CASES:
        job = TrainingJob(find_shape(model), 512, tokens - 512, **METHODS[method])
        cells = [_chosen(choose(job, AUTOMATIC, size * GB)) for size in CARDS]
        rows.append(f"| {model} | {method} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join([head, "|---|---|---:" + "|---" * len(CARDS) + "|", *rows])


def _chosen(choice: Choice) -> str:
    if not choice.fits:
        return "x"
    letters = "".join(LETTERS[name] for name in choice.settings) or "-"
    return letters + (f" ({choice.update_time:.1f}x)" if choice.update_time > 1.005 else "")


# Page -> marker -> table.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "grpo.md": {
        "objectives": objectives,
        "objective-settings": lambda: settings_of(GRPOConfig),
        "rollout-settings": lambda: settings_of(OnlineConfig),
        "run-settings": lambda: settings_of(BaseConfig),
        "refused": lambda: refused(GRPOConfig),
        "unused": lambda: unused(GRPOConfig),
    },
    "dpo.md": {
        "losses": preference_losses,
        "dpo-settings": lambda: settings_of(DPOConfig),
        "reference-settings": lambda: settings_of(ReferenceConfig),
        "data-settings": lambda: settings_of(OfflineConfig),
        "refused": lambda: refused(DPOConfig),
        "unused": lambda: unused(DPOConfig),
    },
    "sft.md": {"sft-settings": lambda: settings_of(SFTConfig), "refused": lambda: refused(SFTConfig)},
    "migration.md": {"unused": lambda: unused(BaseConfig)} | {name: partial(beside_trl, name) for name in CONFIGS},
    "reward-model.md": {"reward-settings": lambda: settings_of(RewardConfig), "refused": lambda: refused(RewardConfig)},
    "ppo.md": {"ppo-settings": lambda: settings_of(PPOConfig), "refused": lambda: refused(PPOConfig, OnlineConfig)},
    "rloo.md": {"rloo-settings": lambda: settings_of(RLOOConfig)},
    "kto.md": {"kto-settings": lambda: settings_of(KTOConfig)},
    "plan.md": {"choices": choices},
    "orpo.md": {"orpo-settings": lambda: settings_of(ORPOConfig), "cpo-settings": lambda: settings_of(CPOConfig)},
}


def filled(page: str, text: str) -> str:
    """The page's text with every table brought up to date."""
    for name, table in TABLES[page].items():
        text = marked.filled(page, text, name, table())
    return text


def _short(value: Any) -> str:
    return repr(value).replace("'", '"')


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page in TABLES:
        path = FOLDER / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
