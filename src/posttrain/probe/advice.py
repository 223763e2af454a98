"""Experience as checks: what people who train with RL advise before a run, compared with what the run is going to be.

Advice and no more: a run may break every line of it on purpose (the demo does). What is impossible is said by the probe
itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.types import Prompt

ROWS, STEPS = 500, 300  # fewer rows are learned by heart; rewards seldom rise before so many steps
THINKING_PARAMETERS = 1.5e9  # smaller models seldom learn to think within tags
CUT, ENDED = 0.2, 0.05
_THINKING = re.compile(r"<\s*(think|thinking|reason|reasoning|thought|start_working_out)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """One piece of advice: whether it is kept, and a sentence that says what was found."""

    name: str
    ok: bool
    says: str


@dataclass(frozen=True)
class Setting:
    """What a run is going to be, as far as advice is about it."""

    rows: int
    max_steps: int | None  # None: not known
    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    max_new_tokens: int
    rewards: Sequence[str]  # names


def checks(setting: Setting, truncated: float, ended: float, unscored: float) -> list[Check]:
    """All of them, in the order in which they are shown. truncated, ended, unscored: shares of completions."""
    found = [_rows(setting), _steps(setting), _thinking(setting), _template(setting), _length(setting, truncated), _ends(ended, truncated)]
    return [check for check in [*found, _scored(unscored)] if check is not None]


def _rows(setting: Setting) -> Check:
    ok = setting.rows >= ROWS
    return Check("rows", ok, f"{setting.rows:,} rows" + ("" if ok else f"; with fewer than {ROWS} a model learns them by heart"))


def _steps(setting: Setting) -> Check | None:
    if setting.max_steps is None:
        return None
    ok = setting.max_steps >= STEPS
    return Check("steps", ok, f"{setting.max_steps:,} steps" + ("" if ok else f"; rewards often rise only after {STEPS}, so be patient (max_steps)"))


def _thinking(setting: Setting) -> Check | None:
    """Only where the task asks for thoughts in tags."""
    text = " ".join(prompt if isinstance(prompt, str) else " ".join(str(message["content"]) for message in prompt) for prompt in setting.prompts)
    if not _THINKING.search(text) and not any("think" in name or "reasoning" in name for name in setting.rewards):
        return None
    size = setting.model.num_parameters()
    ok = size >= THINKING_PARAMETERS
    said = f"think tags with {size / 1e9:.2g}B parameters"
    return Check(
        "size", ok, said + ("" if ok else "; models below 1.5B seldom learn to think in tags: a larger one, or SFT on examples with tags first")
    )


def _template(setting: Setting) -> Check:
    if setting.tokenizer.chat_template:
        return Check("template", True, "the tokenizer has a chat template")
    return Check(
        "template",
        False,
        "the tokenizer has no chat template (a base model?), so prompts go in as plain text; an instruct model, or SFT with chat_template_path, has one",
    )


def _length(setting: Setting, truncated: float) -> Check:
    ok = truncated <= CUT
    said = f"{truncated:.0%} of completions were cut at {setting.max_new_tokens} tokens"
    return Check("length", ok, said + ("" if ok else f"; a cut answer earns little, so try max_completion_length={2 * setting.max_new_tokens}"))


def _ends(ended: float, truncated: float) -> Check | None:
    """Only where nearly nothing ends: a model that does not know its end is not helped by more tokens."""
    if ended >= ENDED or truncated < 1 - 2 * ENDED:
        return None
    return Check(
        "end", False, f"{ended:.0%} of completions end with a stop token: the model does not know how to stop; SFT teaches it, or a chat template"
    )


def _scored(unscored: float) -> Check | None:
    if not unscored:
        return None
    return Check(
        "scored", False, f"{unscored:.0%} of completions could not be scored (every reward said None, or broke); they take no part in training"
    )
