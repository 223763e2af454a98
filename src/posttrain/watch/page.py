"""The live page: a head line, and tabs with the charts, the groups and the notes. It looks at what `Watched` has read
and never at a file.

A page belongs to one browser tab, and only what can be seen is drawn. Charts keep their places: what is new replaces
their data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nicegui import ui

from posttrain.characters import shown, visible
from posttrain.watch import charts as drawing
from posttrain.watch.curves import WatchedRun
from posttrain.watch.figures import figures, status
from posttrain.watch.group_page import GroupPage
from posttrain.watch.panels import SECTIONS, Chart, charts

REFRESH = 1.5  # seconds between two looks at the runs
STYLE = Path(__file__).with_name("style.css")
OVERVIEW, GROUPS, NOTES = "Overview", "Groups", "Notes"


class Watched:
    """The runs that a server looks at, read once for all pages."""

    def __init__(self, runs: Sequence[WatchedRun]) -> None:
        self.runs = list(runs)
        self.version = 0  # counts changes, so that a page knows whether it is behind

    def refresh(self) -> None:
        if any([run.looked_at() for run in self.runs]):
            self.version += 1

    @property
    def begun(self) -> list[WatchedRun]:
        return [run for run in self.runs if run.reader is not None]


class Page:
    """One browser tab."""

    def __init__(self, watched: Watched, run: str, step: int | None, group: int | None) -> None:
        self.watched = watched
        self._shown: list[Chart] | None = None  # None: nothing was laid out yet
        self._charts: dict[int, tuple[ui.label, ui.echart]] = {}  # the number of what is shown -> its caption, its drawing
        self._drawn: dict[str, int] = {}  # tab -> the version that it shows
        self.dark = ui.dark_mode(None)
        with ui.element("div").classes("pt-page"):
            self._head()
            with ui.tabs().props("dense no-caps align=left") as self.tabs:
                names = {name: ui.tab(name) for name in (OVERVIEW, GROUPS, NOTES)}
            with ui.tab_panels(self.tabs, value=OVERVIEW if step is None else GROUPS, animated=False).classes("pt-tabs"):
                with ui.tab_panel(names[OVERVIEW]):
                    self.figures = ui.element("div")
                    self.panels = ui.element("div")
                with ui.tab_panel(names[GROUPS]):
                    self.groups = GroupPage(run, step, group)
                with ui.tab_panel(names[NOTES]):
                    self.notes = ui.element("div")
        self.draw()
        self.tabs.on_value_change(self.draw)
        ui.timer(REFRESH, self.draw)

    def _head(self) -> None:
        with ui.element("div").classes("pt-row"):
            ui.label("posttrain").classes("pt-title")
            self.status = []
            for place, run in enumerate(self.watched.runs):
                with ui.element("div").classes("pt-row pt-run"):
                    if len(self.watched.runs) > 1:
                        ui.element("span").classes("pt-dot").style(f"background: {drawing.COLOURS[place % len(drawing.COLOURS)]}")
                    ui.label(visible(run.name)).classes("pt-strong")
                    self.status.append(ui.label().classes("pt-soft"))
            ui.element("div").classes("pt-spring")
            ui.button(icon="contrast", on_click=self._turn).props("flat round dense aria-label='light or dark'").tooltip(
                "dark, light, or as the system is"
            )

    def _turn(self) -> None:
        self.dark.value = {None: True, True: False, False: None}[self.dark.value]

    def draw(self) -> None:
        """Bring the tab that is seen up to what was read."""
        for label, run in zip(self.status, self.watched.runs, strict=True):
            label.text = status(run)
        tab = str(self.tabs.value)
        if self._drawn.get(tab) != self.watched.version:
            self._drawn[tab] = self.watched.version
            {OVERVIEW: self._draw_overview, GROUPS: self.groups.show, NOTES: self._draw_notes}[tab](self.watched.begun)

    # The charts

    def _draw_overview(self, runs: list[WatchedRun]) -> None:
        wanted = charts(sorted({name for run in runs for name in run.names}))
        if self._shown is None or wanted != self._shown:
            self._shown = wanted
            self._lay_out(wanted)
        for number, chart in enumerate(wanted):
            caption, drawn = self._charts[number]
            caption.text = drawing.caption(chart, runs)
            drawn.options.clear()
            drawn.options.update(drawing.option(chart, runs, marks=number == 0))
            drawn.update()
        self._draw_figures(runs)

    def _lay_out(self, wanted: list[Chart]) -> None:
        self.panels.clear()
        self._charts.clear()
        with self.panels:
            if not wanted:
                ui.label("Nothing was logged yet. The page fills itself once training has begun.").classes("pt-soft pt-empty")
            for section in SECTIONS:
                chosen = [(number, chart) for number, chart in enumerate(wanted) if chart.panel.section == section]
                if chosen:
                    ui.label(section).classes("pt-section")
                    with ui.element("div").classes("pt-grid"):
                        for number, chart in chosen:
                            self._charts[number] = self._add(chart)

    def _add(self, chart: Chart) -> tuple[ui.label, ui.echart]:
        with ui.element("div").classes("pt-card"):
            ui.label(visible(chart.panel.title)).classes("pt-h3")
            caption = ui.label().classes("pt-caption")
            with ui.element("q-intersection").props("once").classes("pt-chart-place"):  # drawn when it is first scrolled to
                return caption, ui.echart({}).classes("pt-chart")

    def _draw_figures(self, runs: list[WatchedRun]) -> None:
        self.figures.clear()
        with self.figures:
            for run in runs:
                if len(runs) > 1:
                    ui.label(visible(run.name)).classes("pt-soft")
                with ui.element("div").classes("pt-figures"):
                    for label, value in figures(run):
                        with ui.element("div").classes("pt-figure"):
                            ui.label(value).classes("pt-value")
                            ui.label(label).classes("pt-soft")

    # The notes

    def _draw_notes(self, runs: list[WatchedRun]) -> None:
        self.notes.clear()
        with self.notes:
            if not any(run.notes for run in runs):
                ui.label("No warnings, and nothing else to tell.").classes("pt-soft pt-empty")
            for run in runs:
                for note in reversed(run.notes[-100:]):
                    with ui.element("div").classes("pt-card pt-below"):
                        where = f"{visible(run.name)} · " if len(runs) > 1 else ""
                        ui.label(f"{where}step {note.step} · {visible(note.kind)}").classes("pt-soft")
                        ui.label(shown(note.text)).classes("pt-note")
