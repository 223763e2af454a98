"""What commands share: settings as options (--train.beta=0.1), and errors that become one sentence on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import typer

from posttrain.characters import shown
from posttrain.cli.recipe import SECTION_NAMES
from posttrain.cli.values import nearest
from posttrain.errors import EnvError, RewardError, TrainingError, UserError, is_full
from posttrain.secrets import redacted_message

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # --train.learning_rate=1e-6 and its like
EXIT_CODES: dict[type[Exception], int] = {TrainingError: 1, UserError: 2, RewardError: 2, EnvError: 2, OSError: 1}


def say(text: str, *, err: bool = False) -> None:
    """Print, as every command does: texts that are not ours reach no terminal with their control characters."""
    typer.echo(shown(text), err=err)


def as_utf8(argument: str) -> str:
    """An argument of the command line, which a locale like C reads as ASCII with surrogates in the place of all other
    bytes."""
    return argument if argument.isascii() else argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def quiet() -> None:
    """Leave out two lines that other libraries print in every run and that ask nothing of anybody."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks transformers by the old name
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")  # it offers kernels of the hub, which are code that is downloaded
    kernels.addFilter(lambda record: "kernels-community" not in str(record.msg))


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Errors that are the user's to mend are printed as a sentence, without a traceback."""
    try:
        yield
    except BrokenPipeError:  # whoever reads our output has enough: typer ends quietly
        raise
    except tuple(EXIT_CODES) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") == "1":
            raise
        hint = "; free some space and run this again" if is_full(error) else ""
        say(f"error: {' '.join(redacted_message(str(error)).split())}{hint}", err=True)
        raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from error
    except KeyboardInterrupt as error:
        say("interrupted", err=True)
        raise typer.Exit(130) from error


def overrides(ctx: typer.Context) -> list[str]:
    """["train.beta=0.1", ...] from what the command's own options left over: --train.beta=0.1 or --train.beta 0.1."""
    rest, found = list(ctx.args), []
    sections = SECTION_NAMES
    while rest:
        given = rest.pop(0)
        name, equals, value = given.removeprefix("--").partition("=")
        if not given.startswith("--") or name.partition(".")[0] not in sections:
            options = [option for parameter in ctx.command.params for option in parameter.opts] + [f"--{section}" for section in sections]
            raise UserError(
                f"{given} is not an option; settings carry their section, as in --train.learning_rate=1e-6.{nearest(given.split('.')[0], options)}"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{given} has no value; write {given}=...")
            value = rest.pop(0)
        found.append(f"{name}={value}")
    return found
