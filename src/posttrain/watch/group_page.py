"""The tab with the groups: which run, step and group it looks at, the filters and the search that lead there, and the
group's story."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from nicegui import run as background
from nicegui import ui

from posttrain.characters import shown
from posttrain.errors import UserError
from posttrain.tracking.browse import CLIPPED, FILTERS, Browser, Found, Marks, Wanted
from posttrain.tracking.reader import GroupRow
from posttrain.watch.charts import comparison
from posttrain.watch.curves import WatchedRun
from posttrain.watch.group_view import draw_completion, draw_stage, draw_table, in_short
from posttrain.watch.story import Story, ToldCompletion, tell, trust_of
from posttrain.watch.tokens import MODES, pieces

FIRST = 8  # completions that are shown until all are asked for: the best and the worst


def told(method: Callable[..., None]) -> Callable[..., None]:
    """What a store holds may be no posttrain's: then the page says so and stays as it was."""

    @functools.wraps(method)
    def safe(*args: Any) -> None:
        try:
            method(*args)
        except UserError as error:
            ui.notify(str(error), type="negative", close_button=True)

    return safe


class GroupPage:
    """The state of one browser tab: which run, step and group it looks at, and how."""

    def __init__(self, run: str, step: int | None, group: int | None) -> None:
        self.runs: list[WatchedRun] = []
        self.run: WatchedRun | None = None  # None: no run has groups yet
        self.wanted_run, self.step, self.group = run, step, group
        self.mode, self.update = "advantage", -1
        self.kinds: frozenset[str] = frozenset()
        self.words = ""
        self.follows = step is None
        self.shows_all = False
        self._moving = False  # the slider is being set by us, not by the user
        self.box = ui.element("div")

    @told
    def show(self, runs: list[WatchedRun]) -> None:
        """Something new was read, or the tab was opened: keep to the newest step if the user follows it."""
        known = [one for one in runs if _has_groups(one)]
        if self.run is None or self.runs != known:
            self.runs = known
            self.run = self.run if self.run in known else next((one for one in known if one.name == self.wanted_run), known[0] if known else None)
            self._build()
        else:
            first, last = self._reader.first_and_last() or (0, 0)
            self.slider.props(f"min={first} max={last}")
            if self.step is None or not first <= self.step <= last or (self.follows and last != self.step):
                self._go(last)

    @property
    def _reader(self) -> Browser:
        assert self.run is not None
        assert self.run.reader is not None
        return self.run.reader

    # What stays while steps change

    def _build(self) -> None:
        self.box.clear()
        with self.box:
            if self.run is None:
                ui.label("No groups yet. Runs that sample (GRPO, RLOO, PPO) show each prompt with its completions here.").classes("pt-soft pt-empty")
                return
            with ui.element("div").classes("pt-card"):
                self._controls()
            self.list = ui.element("div").classes("pt-list")
            self.before = ui.element("div")
            with ui.element("div").classes("pt-card") as self.card:  # one chart for every group: one that is removed before it was drawn is an error
                self.chart = ui.echart({}).classes("pt-chart")
            self.after = ui.element("div")
        ends = self._reader.first_and_last()
        if ends is not None:
            self._go(self._reader.nearest(ends[1] if self.step is None else self.step) or ends[1], self.group)

    def _controls(self) -> None:
        first, last = self._reader.first_and_last() or (0, 0)
        with ui.element("div").classes("pt-row"):
            if len(self.runs) > 1 and self.run is not None:
                choice = ui.select([one.name for one in self.runs], value=self.run.name, on_change=lambda event: self._choose_run(event.value))
                choice.props("dense outlined options-dense")
            ui.button(icon="chevron_left", on_click=lambda: self._turn(-1)).props("flat round dense aria-label=earlier")
            self.where = ui.label().classes("pt-strong pt-where")
            ui.button(icon="chevron_right", on_click=lambda: self._turn(1)).props("flat round dense aria-label=later")
            self.slider = ui.slider(min=first, max=max(last, first + 1), value=last, on_change=lambda event: self._slid(int(event.value)))
            self.slider.props("dense aria-label=step").classes("pt-wide")
            self.follow = ui.switch("newest", value=self.follows, on_change=lambda event: self._follow(event.value)).props("dense")
        with ui.element("div").classes("pt-row pt-filters"):
            for kind in (*FILTERS, CLIPPED):
                ui.checkbox(kind, on_change=lambda event, kind=kind: self._filter(kind, event.value)).props("dense")
            words = ui.input(placeholder="text in prompts and answers", on_change=lambda event: self._say(event.value or ""))
            words.props("dense outlined debounce=300 clearable").classes("pt-wide")
            ui.button("earlier", on_click=lambda: self._find(-1)).props("flat dense no-caps")
            ui.button("find next", on_click=lambda: self._find(1)).props("flat dense no-caps")

    @told
    def _choose_run(self, name: str) -> None:
        self.run = next(one for one in self.runs if one.name == name)
        self.step, self.group = None, None
        self._build()

    @told
    def _slid(self, step: int) -> None:
        if not self._moving and step != self.step:
            self._stay()
            self._go(self._reader.nearest(step) or step)

    @told
    def _turn(self, direction: int) -> None:
        step = self._reader.neighbour(self.step or 0, direction)
        if step is not None:
            self._stay()
            self._go(step)

    def _stay(self) -> None:
        self.follows = False
        self.follow.value = False

    @told
    def _follow(self, wanted: bool) -> None:
        self.follows = wanted
        ends = self._reader.first_and_last()
        if wanted and ends is not None:
            self._go(ends[1])

    # Filters and search

    def _filter(self, kind: str, wanted: bool) -> None:
        self.kinds = self.kinds | {kind} if wanted else self.kinds - {kind}
        self._draw_list()

    def _say(self, words: str) -> None:
        self.words = words.strip()
        self._draw_list()

    def _chosen(self) -> list[tuple[GroupRow, Marks]]:
        """The groups of this step that pass every filter."""
        assert self.step is not None
        marks = {mark.group: mark for mark in self._reader.marks(self.step)}
        kept = {group for _, group in self._reader.matching(self._wanted, self.step, self.step)}
        return [(row, marks[row.group]) for row in self._reader.groups(self.step) if row.group in kept]

    @property
    def _wanted(self) -> Wanted:
        assert self.run is not None
        return Wanted(self.kinds, self.words, trust_of(self.run))

    async def _find(self, direction: int) -> None:
        """Go to the next step with a group like the filters and words say. Searches have a connection of their own and
        an end."""
        if not self.kinds and not self.words:
            ui.notify("choose a filter, or type what to look for")
            return
        start = self.step or 0
        try:
            found: Found | None = await background.io_bound(_search, self._reader.path, self._wanted, start, direction)
        except UserError as error:
            ui.notify(str(error), type="negative", close_button=True)
            return
        if found is None:  # the server is being stopped
            return
        if found.step is not None:
            self._stay()
            self._go(found.step, found.group)
        else:
            ui.notify("none from here on" if found.is_complete else f"none up to step {found.read_to:,}; look on from there", close_button=True)
            if not found.is_complete:
                self._stay()
                self._go(self._reader.nearest(found.read_to) or start)

    # What changes with the step

    @told
    def _go(self, step: int, group: int | None = None) -> None:
        self.step, self.shows_all = step, False
        self._moving = True
        self.slider.value = step
        self._moving = False
        self.where.text = f"step {step:,}"
        self.group = group
        self._draw_list()

    @told
    def _draw_list(self) -> None:
        rows = self._chosen() if self.step is not None else []
        self.list.clear()
        with self.list:
            if not rows:
                ui.label("No group of this step is like that. `find next` looks in later steps.").classes("pt-soft")
            with ui.element("div").classes("pt-groups"):
                for row, mark in rows:
                    with ui.element("button").classes("pt-group").on("click", lambda _, place=row.group: self._open(place)) as button:
                        ui.label(in_short(row, mark))
                    if row.group == (self.group if self.group is not None else rows[0][0].group):
                        button.classes("chosen")
        if rows and self.group not in {row.group for row, _ in rows}:
            self.group = rows[0][0].group
        self._draw_group()

    def _open(self, group: int) -> None:
        self.group, self.shows_all = group, False
        self._draw_list()

    @told
    def _draw_group(self) -> None:
        self.before.clear()
        self.after.clear()
        row = next((row for row in self._reader.groups(self.step or 0) if row.group == self.group), None)
        self.card.set_visibility(row is not None)
        if row is None or self.run is None:
            return
        story = tell(self.run, self._reader, row.step, row)
        sample, score, compare, *rest = story.stages
        with self.before:
            draw_stage(1, sample)
            ui.label(shown(row.prompt)).classes("pt-prompt pt-card")
            draw_stage(2, score)
            draw_table(story)
            draw_stage(3, compare)
        self.chart.options.clear()
        self.chart.options.update(comparison([completion.row for completion in story.completions], row.mean, row.std))
        self.chart.update()
        with self.after:
            for place, stage in enumerate(rest, start=4):
                draw_stage(place, stage)
                if place == 4:
                    self._completions(story)

    def _completions(self, story: Story) -> None:
        with ui.element("div").classes("pt-card"):
            with ui.element("div").classes("pt-row"):
                ui.label("colour tokens by").classes("pt-soft")
                ui.toggle(list(MODES), value=self.mode, on_change=lambda event: self._colour(event.value)).props("dense no-caps unelevated").classes(
                    "pt-modes"
                )
                updates = sorted(
                    {update.step for completion in story.completions for update in (completion.tokens.updates if completion.tokens else ())}
                )
                if len(updates) > 1:
                    places = {place - len(updates): f"update of step {step}" for place, step in enumerate(updates)}
                    ui.select(places, value=max(self.update, -len(updates)), on_change=lambda event: self._see(event.value)).props(
                        "dense outlined options-dense"
                    )
            ui.label(f"{MODES[self.mode].legend}. {story.kept}").classes("pt-soft pt-small")
        chosen = story.completions if self.shows_all else best_and_worst(story.completions, FIRST)
        ids = {token for completion in chosen if completion.tokens is not None for token in completion.tokens.token_ids}
        vocabulary = self._reader.vocabulary(ids)
        assert self.run is not None
        with ui.element("div").classes("pt-grid pt-completions"):
            for completion in chosen:
                draw_completion(completion, pieces(completion, self.mode, vocabulary, trust_of(self.run), self.update), story)
        if len(chosen) < len(story.completions):
            left = len(story.completions) - len(chosen)
            ui.button(f"the best and the worst; show the {left} between them too", on_click=self._show_all).props("flat dense no-caps")

    def _colour(self, mode: str) -> None:
        self.mode = mode
        self._draw_group()

    def _see(self, update: int) -> None:
        self.update = update
        self._draw_group()

    def _show_all(self) -> None:
        self.shows_all = True
        self._draw_group()


def best_and_worst(completions: list[ToldCompletion], count: int) -> list[ToldCompletion]:
    """From both ends of a list that begins with the best: what a group learns from is their difference."""
    return completions if len(completions) <= count else [*completions[: count // 2], *completions[-(count // 2) :]]


def _has_groups(run: WatchedRun) -> bool:
    return run.reader is not None and run.reader.first_and_last() is not None


def _search(path: Path, wanted: Wanted, start: int, direction: int) -> Found:
    """In a thread of its own, hence with a connection of its own."""
    with closing(Browser(path)) as reader:
        return reader.search(wanted, start, direction)
