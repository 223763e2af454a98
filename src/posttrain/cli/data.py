"""`posttrain data preview`: rows as the trainer sees them, before anything is spent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.options import SETTINGS, overrides, say, sentences
from posttrain.cli.recipe import read_recipe

if TYPE_CHECKING:
    from posttrain.cli.preview import Preview

app = typer.Typer(no_args_is_help=True, help="Look at data before they cost a run.")

STYLES = {"read": "dim", "trained": "green", "stop": "bold reverse green"}
MARKS = {"trained": ("⟦", "⟧"), "stop": ("⟦", "⟧")}  # where there are no colours


@app.callback()
def _group() -> None:
    """Keeps `preview` a word of its own, also while it is the only command."""


@app.command(context_settings=SETTINGS)
def preview(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")],
    kind: Annotated[str | None, typer.Option(help="The trainer: sft, dpo, grpo... Default: the one the recipe has settings for.")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a recipe with stages: which one.")] = None,
    rows: Annotated[int, typer.Option("-n", min=0, help="Show so many rows; all are counted.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts and the rows' token ids as JSON.")] = False,
) -> None:
    """Rows with each token coloured by whether it is trained, and how many are. A row without any is an error. Settings
    can follow."""
    with sentences():
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.preview import kind_of_recipe, report
        from posttrain.cli.preview import preview as look
        from posttrain.cli.stages import data_of, named, read_stages

        hide_progress_bars()
        if stage is not None:
            stages = read_stages(recipe, overrides(ctx), None)
            read, what, before = data_of(named(stages, stage), stages)
            found = look(read, what, rows, before)
        else:
            read = read_recipe(recipe, overrides(ctx))
            found = look(read, kind_of_recipe(read, kind), rows)
        if as_json:
            say(json.dumps(_as_json(found)))
            return
        _print_rows(found)
        say("\n".join(report(found)))


def _print_rows(found: Preview) -> None:
    from rich.console import Console
    from rich.text import Text

    from posttrain.characters import shown
    from posttrain.cli.preview import stretches

    console = Console(highlight=False, soft_wrap=True)
    for number, pieces in enumerate(found.shown):
        console.rule(f"row {number}", align="left", style="dim")
        for piece in pieces:
            text = Text(f"{piece.name}: " if len(pieces) > 1 else "", style="bold")
            for content, style in stretches(piece, found.tokenizer, found.stop_ids):
                before, after = MARKS.get(style, ("", "")) if console.no_color or not console.is_terminal else ("", "")
                text.append(before + shown(content) + after, style=STYLES[style])
            console.print(text)
    if found.shown:
        legend = Text.assemble(
            "read only ", ("dim", "dim"), ", trained ", ("green", STYLES["trained"]), ", trained stop token ", ("reverse", STYLES["stop"])
        )
        console.print(legend if console.is_terminal and not console.no_color else Text("trained tokens stand in ⟦ ⟧"))


def _as_json(found: Preview) -> dict[str, Any]:
    counts = {name: getattr(found, name) for name in ("rows", "tokens", "trained", "runs", "ended", "cut", "longest")}
    return counts | {"shown": [[{"name": p.name, "ids": p.ids, "trained": p.trained} for p in pieces] for pieces in found.shown]}
