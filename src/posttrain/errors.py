"""What can go wrong, by whose hand. `UserError` is a sentence with the fix, shown without a traceback by the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input cannot work: a recipe, a dataset, a reward, a model path. The message names the cause and the fix."""


class RewardError(RuntimeError):
    """A reward broke (raised, returned NaN or the wrong length). Never a silent zero."""


class EnvError(RuntimeError):
    """An environment broke: it raised, or answered with what is no message. What a tool raises is not that: the model is told."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, a full disk). State on disk is whole."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_sentence(error: BaseException) -> str:
    """Of a message that may run to a page."""
    return str(error).split(". ")[0].strip()
