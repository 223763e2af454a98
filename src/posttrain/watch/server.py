"""The server of the live page: NiceGUI behind the guard, on this machine alone unless another host is asked for.

NiceGUI brings the browser's side of everything (Vue, Quasar, ECharts) in its own package, so nothing is fetched from
anywhere.
"""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.tracking.schema import FILE_NAME
from posttrain.watch.curves import WatchedRun
from posttrain.watch.guard import LOOPBACK, Guard

PORT = 8377
ANY = frozenset({"0.0.0.0", "::", ""})  # every address of this machine


@dataclass(frozen=True)
class Address:
    """Where the page is, and who may ask for it."""

    host: str
    port: int
    token: str | None  # None: whoever is on this machine

    @property
    def url(self) -> str:
        host = socket.gethostname() if self.host in ANY else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    @property
    def names(self) -> frozenset[str] | None:
        """The names under which a browser may ask; None: any, since a machine has many names and a token guards it."""
        return LOOPBACK if self.host in LOOPBACK else None


def choose_address(host: str, port: int | None, *, with_token: bool) -> Address:
    """A free port where none is asked for. Beyond this machine there is always a token. Raises UserError for a port
    that is taken."""
    token = secrets.token_urlsafe(18) if with_token or host not in LOOPBACK else None
    for candidate in [port] if port is not None else range(PORT, PORT + 50):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if port is not None:
                    raise UserError(f"cannot listen on {host}:{port} ({error}): leave --port out for a free one") from error
                continue
            return Address(host, int(probe.getsockname()[1]), token)
    raise UserError(f"no port from {PORT} to {PORT + 49} is free on {host}: name one with --port")


def find_runs(paths: Sequence[str], *, wait: bool = False) -> list[WatchedRun]:
    """The runs of these directories: each itself, or else those right below it. `wait`: a run may yet begin in each of
    them, also where none is.

    Raises UserError for a path without a run.
    """
    directories: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        path = path.parent if path.name == FILE_NAME else path
        below = sorted(store.parent for store in path.glob(f"*/{FILE_NAME}"))
        if (path / FILE_NAME).is_file():
            directories.append(path)
        elif wait or below:
            directories += [path, *below] if wait else below
        else:
            raise UserError(f"{given} holds no {FILE_NAME}, and no directory in it does: give the output_dir of a run, or --wait for it to begin")
    directories = list(dict.fromkeys(directory.resolve() for directory in directories))
    return [WatchedRun(name, directory) for name, directory in zip(_names(directories), directories, strict=True)]


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell them apart."""
    depth = 1
    while depth < max((len(path.parts) for path in directories), default=1) and len({path.parts[-depth:] for path in directories}) < len(directories):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in directories]


def serve(runs: Sequence[WatchedRun], address: Address, *, open_browser: bool = False, ready: Callable[[str], None] = print) -> None:
    """Blocks until interrupted. `ready` is told the page's address as soon as it answers. Raises UserError where
    NiceGUI is not installed."""
    try:
        from nicegui import app, ui
    except ImportError as error:
        raise UserError(f"the live page needs NiceGUI ({error}): pip install 'posttrain[watch]'") from error
    from posttrain.watch.page import REFRESH, STYLE, Page, Watched

    watched = Watched(runs)
    watched.refresh()
    ui.add_css(STYLE, shared=True)

    @ui.page("/", title="posttrain watch")
    def index(run: str = "", step: int | None = None, group: int | None = None) -> None:
        Page(watched, run, step, group)

    def started() -> None:
        ready(address.url)
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address.url,), daemon=True).start()

    app.on_startup(started)
    app.timer(REFRESH, watched.refresh)
    app.add_middleware(Guard, hosts=address.names, token=address.token)
    ui.run(
        host=address.host, port=address.port, title="posttrain watch", dark=None, reload=False, show=False, tailwind=False, show_welcome_message=False
    )
