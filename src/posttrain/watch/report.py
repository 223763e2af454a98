"""A run as one HTML file to send: the charts of the live page, chosen groups, notes and settings. Opened, it asks no
network for anything.

The browser's chart library is the one that NiceGUI ships, written into the file. Texts go through Jinja's escaping,
without an exception.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain import __version__
from posttrain.characters import shown, visible
from posttrain.errors import UserError
from posttrain.io import write_whole
from posttrain.secrets import redacted
from posttrain.tracking.reader import CompletionRow, GroupRow
from posttrain.watch import charts as drawing
from posttrain.watch.curves import WatchedRun
from posttrain.watch.figures import figures, status, table
from posttrain.watch.panels import SECTIONS, charts
from posttrain.watch.story import Story, tell, trust_of
from posttrain.watch.tokens import MODES, ColouredToken, pieces

HERE = Path(__file__).parent
# Settings that nobody needs to understand a run: where it ran, and what transformers would have done elsewhere.
LEFT_OUT = re.compile(r"output_dir|logging_dir|(.*_)?token|(hub|push_to|tpu|fsdp|deepspeed|ddp)(_.*)?")


@dataclass(frozen=True)
class Told:
    """A group as the report shows it."""

    told: Story
    prompt: str
    table: list[list[str]]
    texts: list[tuple[CompletionRow, list[ColouredToken]]]
    number: int  # of its chart


def write_report(run: WatchedRun, path: Path, *, groups: Sequence[tuple[int, int]] | None = None, mode: str = "advantage") -> None:
    """`groups`: (step, group) of those to tell; None: one of the beginning, the middle and the end. Raises UserError
    for what is not there.

    The file is written whole or not at all; what is no plain file, such as /dev/stdout, is written to.
    """
    write_whole(path, render(run, groups=groups, mode=mode))


def render(run: WatchedRun, *, groups: Sequence[tuple[int, int]] | None = None, mode: str = "advantage") -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    library, export = _library()
    wanted = charts(run.names)
    options = [drawing.option(chart, [run], marks=chart is wanted[0]) for chart in wanted]
    stories = []
    for step, group in chosen_groups(run) if groups is None else groups:
        row = _group(run, step, group)
        stories.append(_tell(run, row, mode, len(options)))
        options.append(drawing.comparison([completion.row for completion in stories[-1].told.completions], row.mean, row.std))
    numbered = [(number, chart, drawing.caption(chart, [run])) for number, chart in enumerate(wanted)]
    environment = Environment(autoescape=True)
    environment.filters |= {"visible": visible, "shown": shown}
    template = environment.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=visible(run.name),
        status=status(run),
        figures=figures(run),
        sections=[(section, found) for section in SECTIONS if (found := [one for one in numbered if one[1].panel.section == section])],
        stories=stories,
        mode=MODES[mode],
        notes=run.notes[-50:],
        settings=_settings(run),
        options=options,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        library=Markup(library),
        export=export,
        version=__version__,
    )


def chosen_groups(run: WatchedRun) -> list[tuple[int, int]]:
    """(step, group) of the most telling group at the beginning, in the middle and at the end: the one whose rewards
    differ most."""
    reader = run.browser
    ends = reader.first_and_last()
    if ends is None:
        return []
    steps = dict.fromkeys(reader.nearest(step) for step in (ends[0], (ends[0] + ends[1]) // 2, ends[1]))
    rows = [max(reader.groups(step), key=lambda row: row.std or 0.0) for step in steps if step is not None]
    return [(row.step, row.group) for row in rows]


def _group(run: WatchedRun, step: int, group: int) -> GroupRow:
    reader = run.browser
    row = next((row for row in reader.groups(step) if row.group == group), None)
    if row is None:
        near = reader.nearest(step)
        where = "the run has no groups" if near is None else f"the nearest step with groups is {near}, with {len(reader.groups(near))} of them"
        raise UserError(f"there is no group {group} at step {step} of {run.name}: {where}")
    return row


def _tell(run: WatchedRun, row: GroupRow, mode: str, number: int) -> Told:
    reader = run.browser
    story = tell(run, reader, row.step, row)
    ids = {token for completion in story.completions if completion.tokens for token in completion.tokens.token_ids}
    vocabulary = reader.vocabulary(ids)
    texts = [(completion.row, pieces(completion, mode, vocabulary, trust_of(run))) for completion in story.completions]
    return Told(story, shown(row.prompt), table(story), texts, number)


def _settings(run: WatchedRun) -> Iterable[tuple[str, str]]:
    for group in ("config", "versions"):
        for name, value in sorted(redacted(run.part(group)).items()):  # records of older versions hold some
            if value not in (None, "", [], {}) and not LEFT_OUT.fullmatch(name):
                yield name, visible(str(value))[:200]


def _library() -> tuple[str, str]:
    """ECharts as a module, and the name under which it exports itself. Raises UserError where NiceGUI is missing or
    packs it otherwise."""
    from importlib.util import find_spec

    spec = find_spec("nicegui")
    if spec is None or spec.origin is None:
        raise UserError("a report draws with the chart library that NiceGUI brings: pip install 'posttrain[watch]'")
    folder = Path(spec.origin).parent / "elements" / "echart" / "dist"
    index = (folder / "index.js").read_text(encoding="utf-8") if (folder / "index.js").is_file() else ""
    found = re.search(r'import\s*\{\s*(\w+) as (\w+)[^}]*\}\s*from\s*"\./([\w.-]+\.js)"', index)
    if found is None or f"{found[2]} as echarts" not in index:
        raise UserError(f"this version of NiceGUI keeps its chart library otherwise than expected ({folder}); install the one of constraints.txt")
    source = (folder / found[3]).read_text(encoding="utf-8")
    if "</script" in source.lower() or re.search(r'\bfrom\s*"\.', source):
        raise UserError(f"{folder / found[3]} cannot be written into one file; install the NiceGUI of constraints.txt")
    return source.partition("//# sourceMappingURL")[0], found[1]
