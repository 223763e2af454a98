"""The tables of settings in the pages of this folder, made from the configs' fields: name, default and help stand once, in the source.

`python docs/settings.py` rewrites what stands between the markers; tests/test_docs.py fails while it is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from posttrain.losses.policy import OBJECTIVES
from posttrain.losses.preference import LOSSES
from posttrain.trainers.config import BaseConfig
from posttrain.trainers.dpo import DPOConfig
from posttrain.trainers.grpo_config import GRPOConfig
from posttrain.trainers.kto import KTOConfig
from posttrain.trainers.offline_config import OfflineConfig, ReferenceConfig
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.orpo import CPOConfig, ORPOConfig
from posttrain.trainers.ppo_config import PPOConfig
from posttrain.trainers.reward import RewardConfig
from posttrain.trainers.rloo import RLOOConfig

FOLDER = Path(__file__).parent


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


# Page -> marker -> table.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "grpo.md": {
        "objectives": objectives,
        "objective-settings": lambda: settings_of(GRPOConfig),
        "rollout-settings": lambda: settings_of(OnlineConfig),
        "run-settings": lambda: settings_of(BaseConfig),
        "refused": lambda: refused(GRPOConfig),
    },
    "dpo.md": {
        "losses": preference_losses,
        "dpo-settings": lambda: settings_of(DPOConfig),
        "reference-settings": lambda: settings_of(ReferenceConfig),
        "data-settings": lambda: settings_of(OfflineConfig),
        "refused": lambda: refused(DPOConfig),
    },
    "reward-model.md": {"reward-settings": lambda: settings_of(RewardConfig), "refused": lambda: refused(RewardConfig)},
    "ppo.md": {"ppo-settings": lambda: settings_of(PPOConfig), "refused": lambda: refused(PPOConfig, OnlineConfig)},
    "rloo.md": {"rloo-settings": lambda: settings_of(RLOOConfig)},
    "kto.md": {"kto-settings": lambda: settings_of(KTOConfig)},
    "orpo.md": {"orpo-settings": lambda: settings_of(ORPOConfig), "cpo-settings": lambda: settings_of(CPOConfig)},
}


def filled(page: str, text: str) -> str:
    """The page's text with every table brought up to date."""
    for name, table in TABLES[page].items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            sys.exit(f"{page} has no {start} ... {end}")
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text


def _short(value: Any) -> str:
    return repr(value).replace("'", '"')


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page in TABLES:
        path = FOLDER / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
