"""A real browser and a real server for tests of the page: Debian's chromium, driven by Playwright; `posttrain watch` as a process of its own."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def browser_or_skip():
    """A context manager of Playwright, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install playwright")
    pytest.importorskip("nicegui", reason="the page needs nicegui: pip install 'posttrain[watch]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    return playwright.sync_playwright()


@contextlib.contextmanager
def served(*arguments):
    """The address of a page about these runs, while it is served."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "posttrain.cli.main", "watch", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stdout.read()
        _wait_for(found[0])
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def _wait_for(url):
    until = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url.partition("?")[0], timeout=5).close()
            return
        except urllib.error.HTTPError:  # it answers, if only that it wants a token
            return
        except OSError:
            assert time.monotonic() < until, f"{url} does not answer"
            time.sleep(0.05)


class Tab:
    """A page that remembers what it asked for and what went wrong."""

    def __init__(self, browser, *, width=1200, height=900, **settings):
        self.page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error).splitlines()[0]))

    def open(self, url):
        self.page.goto(url)
        self.page.wait_for_selector(".pt-chart canvas")
        return self.page

    def check(self, url):
        """Nothing went wrong, and nothing was asked of anybody but the server of `url`."""
        assert self.errors == [], self.errors
        host = url.split("/")[2]
        foreign = [asked for asked in self.requests if not asked.startswith(("data:", "blob:")) and asked.split("/")[2] != host]
        assert foreign == [], foreign
        self.page.close()
