"""Marked places in a page, and what a script writes into them: between `<!-- NAME:start -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

import sys


def filled(page: str, text: str, name: str, content: str) -> str:
    """The page's text with `content` at the place called `name`."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{page} has no {start} ... {end}")
    return f"{before}{start}\n{content}\n{end}{after}"
