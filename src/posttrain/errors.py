"""What can go wrong, by whose hand. `UserError` is a sentence with the fix, shown without a traceback by the command
line."""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator

from posttrain.characters import shown
from posttrain.secrets import redacted_message

LONGEST = 20_000  # characters of a message: a reward may put a whole data set into its exception


class _Shown(Exception):
    """Messages quote texts that are not ours: completions, file names, what a library said. Here, in the one place that
    every message passes, their control characters become visible, secrets are blanked, and what is too long to read is
    cut in its middle."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [{len(text) - LONGEST} characters left out] {text[-LONGEST // 2 :]}"
        return shown(redacted_message(text))


class UserError(_Shown, ValueError):
    """The user's input cannot work: a recipe, a dataset, a reward, a model path. The message names the cause and the
    fix."""


class NothingToLearn(UserError):
    """A row that can teach nothing: none of its tokens is trained. Such rows are left out and counted; where all are,
    it is an error."""


class RewardError(_Shown, RuntimeError):
    """A reward broke (raised, returned NaN or the wrong length). Never a silent zero."""


class EnvError(_Shown, RuntimeError):
    """An environment broke: it raised, or answered with what is no message. What a tool raises is not that: the model
    is told."""


class TrainingError(_Shown, RuntimeError):
    """Training cannot go on (a loss that is not finite, a full disk). State on disk is whole."""


@contextlib.contextmanager
def at_row(number: int) -> Iterator[None]:
    """Says with which row of the data a UserError has to do."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"row {number}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def is_full(error: BaseException) -> bool:
    """Whether the disk, a quota or a limit on file sizes refuses to take more."""
    return isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in ("ENOSPC", "EDQUOT", "EFBIG")


def first_sentence(error: BaseException) -> str:
    """Of a message that may run to a page."""
    return str(error).split(". ")[0].strip()
