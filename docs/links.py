"""Whether every link of the built site leads somewhere: `python docs/links.py build/docs`. Files and anchors, without the network; exits with 1 if not."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

REFERENCE = "reference"  # pdoc names places of inherited variables that it leaves out: its pages are checked for files only


class Links(HTMLParser):
    """The links of a page, and the places in it that a link may name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given[name] for name in ("href", "src") if name in given]


def broken(site: Path) -> list[str]:
    """'page -> link' for each that leads nowhere."""
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    found = []
    for page, read in pages.items():
        for link in read.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:  # elsewhere
                continue
            folder = site if parts.path.startswith("/") else page.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            has_place = target not in pages or target.parent.name == REFERENCE or unquote(parts.fragment) in pages[target].places
            is_there = target.is_file() and has_place
            if not is_there:
                found.append(f"{page.relative_to(site.resolve())} -> {link}")
    return found


if __name__ == "__main__":
    nowhere = broken(Path(sys.argv[1]))
    print("\n".join(nowhere) or "every link resolves")
    sys.exit(bool(nowhere))
