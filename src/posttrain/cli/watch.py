"""`posttrain watch` and `posttrain report`: a run's record as a live page, and as one file. `watching` is what --watch
on a training command does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import say, sentences
from posttrain.errors import UserError, did_you_mean
from posttrain.processes import guard, release

Watch = Annotated[bool, typer.Option("--watch", help="Show the training on a local web page while it runs.")]
NEEDS = "the live page needs NiceGUI: pip install 'posttrain[watch]'"


def watch(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Directories of runs, or one that holds several. More than one are drawn over each other.")
    ],
    host: Annotated[str, typer.Option(help="Listen here. Anything but this machine gets a token.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 8377 on.")] = None,
    token: Annotated[bool, typer.Option("--token", help="Ask for a token on this machine too (others use it as well).")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="The runs may not have begun yet.")] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    with_parent: Annotated[bool, typer.Option(hidden=True, help="End when standard input ends.")] = False,
) -> None:
    """Look at runs while they learn, or afterwards: curves, and every prompt with its completions."""
    own_end = suppress(KeyboardInterrupt) if with_parent else nullcontext()  # the signal by which it ends with its parent is nothing to tell
    with sentences(), own_end:
        if with_parent:
            _end_with_parent()
        from posttrain.watch.server import choose_address, find_runs, serve

        address = choose_address(host, port, with_token=token)
        serve(find_runs(runs, wait=wait), address, open_browser=open_browser, ready=lambda url: say(f"watch it:  {url}"))


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    group: Annotated[
        list[str] | None, typer.Option(metavar="STEP/GROUP", help="A group to tell, as 120/3; as often as wanted. Default: three.")
    ] = None,
    color: Annotated[str, typer.Option(help="What tokens are coloured by: advantage, ratio, log-prob, entropy, KL.")] = "advantage",
) -> None:
    """Write a run as one HTML file that needs no network: the charts, chosen groups, notes and settings."""
    with sentences():
        from posttrain.watch.report import write_report
        from posttrain.watch.server import find_runs
        from posttrain.watch.tokens import MODES

        if color not in MODES:
            raise UserError(f"--color {color}: there are {', '.join(MODES)}.{did_you_mean(color, MODES)}")
        found = find_runs([run])
        if len(found) > 1:
            raise UserError(f"{run} holds {len(found)} runs: name one of {', '.join(one.name for one in found)}")
        found[0].refresh()
        if found[0].reader is None:
            raise UserError(f"{run}: the run has not begun yet, there is nothing to report")
        write_report(found[0], output, groups=None if not group else [_place(one) for one in group], mode=color)
        say(f"written to {output} ({output.stat().st_size / 2**20:.1f} MB)")


def _place(given: str) -> tuple[int, int]:
    step, _, group = given.partition("/")
    if not (step.isdigit() and group.isdigit()):
        raise UserError(f"--group {given}: a step and the number of a group in it, as in 120/3")
    return int(step), int(group)


@contextmanager
def watching(directories: Sequence[str], wanted: bool) -> Iterator[None]:
    """While training runs, a page about it in a process of its own. It ends with the training, however that ends.

    Raises UserError before training where the page cannot be made.
    """
    if not wanted or os.environ.get("RANK", "0") != "0":
        yield
        return
    if find_spec("nicegui") is None:
        raise UserError(NEEDS)
    command = [sys.executable, "-m", "posttrain.cli.main", "watch", "--wait", "--with-parent", *directories]
    page = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # its own session: Ctrl-C is the training's
    guard(page.pid)  # a page that is busy in C code does not see its standard input end
    try:
        yield
    finally:
        assert page.stdin is not None
        page.stdin.close()
        try:
            page.wait(timeout=10)
        except subprocess.TimeoutExpired:
            page.kill()
            page.wait()
        release(page.pid)


def _end_with_parent() -> None:
    """The pipe that is our standard input closes when the training ends, also when it is killed."""

    def listen() -> None:
        sys.stdin.buffer.read()
        if os.name == "posix":
            os.kill(os.getpid(), signal.SIGINT)
        else:  # where `kill` ends a process as it stands
            signal.raise_signal(signal.SIGINT)

    if os.name == "posix":
        os.nice(5)  # the training comes first
    threading.Thread(target=listen, daemon=True).start()
