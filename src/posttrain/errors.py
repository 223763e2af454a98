"""The kinds of error, by who has to act. A `UserError` is a sentence with the fix; the command line shows it without a
traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator

from posttrain.characters import shown
from posttrain.secrets import redacted_message

LONGEST = 20_000  # characters of a message: a reward may put a whole data set into its exception


class _Shown(Exception):
    """Messages quote foreign text: completions, file names, messages of libraries. Every message passes here: control
    characters become visible, secrets are blanked, and of a long message the middle is left out."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [{len(text) - LONGEST} characters left out] {text[-LONGEST // 2 :]}"
        return shown(redacted_message(text))


class UserError(_Shown, ValueError):
    """The user's input cannot work: a recipe, a dataset, a reward, a model path. The message names the cause and the
    fix."""


class NothingToLearn(UserError):
    """No token of a row is trained. Such rows are left out and counted; it is an error if all are such."""


class RewardError(_Shown, RuntimeError):
    """A reward broke (raised, returned NaN or the wrong length). Never a silent zero."""


class EnvError(_Shown, RuntimeError):
    """An environment broke: it raised, or did not answer with a message. (An exception of a tool is sent to the model
    instead.)"""


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
