"""A group's parts on the live page: its button, the steps of its story, the table of its scores, and its completions as
coloured text.

What a model wrote reaches the browser as text of labels and of `tokens.js`, which both write text nodes; nothing here
builds markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui
from nicegui.element import Element

from posttrain.characters import shown, visible
from posttrain.tracking.browse import Marks
from posttrain.tracking.lines import number
from posttrain.tracking.reader import GroupRow
from posttrain.watch.figures import said, table
from posttrain.watch.story import Story, StoryStep, ToldCompletion
from posttrain.watch.tokens import ColouredToken


class TokenText(Element, component="tokens.js"):
    """Pieces of text with their tints."""

    def __init__(self, text: Sequence[ColouredToken]) -> None:
        super().__init__()
        self._props["pieces"] = [[piece.text, piece.tint, piece.title, piece.is_given] for piece in text]


def in_short(row: GroupRow, mark: Marks) -> str:
    """A group on a button: `3 · 1.25 ± 0.80 · 2 cut`."""
    parts = [str(row.group), "not scored" if row.mean is None else number(row.mean) + (f" ± {number(row.std)}" if row.std else "")]
    parts += [f"{mark.truncated} cut"] if mark.truncated else []
    parts += ["no signal"] if not mark.has_signal and row.size > 1 else []
    parts += ["alarm"] if mark.is_alarming else []
    return " · ".join(parts)


def draw_stage(place: int, stage: StoryStep) -> None:
    with ui.element("div").classes("pt-stage"):
        ui.label(str(place)).classes("pt-number")
        with ui.element("div"):
            ui.label(stage.title).classes("pt-h3")
            ui.label(stage.text).classes("pt-soft")


def draw_table(story: Story) -> None:
    with ui.element("div").classes("pt-card pt-scroll"), ui.element("table").classes("pt-table"):
        for place, cells in enumerate(table(story)):
            with ui.element("tr"):
                for text in cells:
                    with ui.element("td" if place else "th"):
                        ui.label(text)


def draw_completion(completion: ToldCompletion, text: list[ColouredToken], story: Story) -> None:
    row = completion.row
    with ui.element("div").classes("pt-card pt-completion"):
        with ui.element("div").classes("pt-row pt-badges"):
            ui.label(f"#{row.key.completion}").classes("pt-strong")
            sign = "up" if row.advantage > 0 else "down" if row.advantage < 0 else ""
            ui.label(f"advantage {row.advantage:+.2f}").classes(f"pt-badge {sign}")
            ui.label(f"reward {said(row.reward)}").classes("pt-badge")
            if len(story.components) > 1:
                for name in story.components:
                    ui.label(f"{visible(name)} {said(row.scores.get(name))}").classes("pt-badge pt-soft")
            if completion.is_truncated:
                ui.label("cut").classes("pt-badge down")
        TokenText(text)
        if completion.episode is not None and completion.episode.messages:
            with ui.expansion(f"{completion.episode.turns} turns, as messages").props("dense"):
                for message in completion.episode.messages:
                    ui.label(
                        f"{visible(str(message.get('role', '')))}: {shown(str(message.get('content') or message.get('tool_calls') or ''))}"
                    ).classes("pt-message")
