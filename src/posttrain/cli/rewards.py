"""`posttrain reward check`: the unit tests of a reward as a table. Exit code 0 when it passed, 1 when a check failed, 2
when it could not be asked."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.options import say, sentences
from posttrain.cli.recipe import DataSection, Recipe, read_recipe
from posttrain.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.rewards.check import CheckReport
    from posttrain.rewards.rubric import Rubric

app = typer.Typer(no_args_is_help=True, help="Look at rewards before they cost a run.")

_COLOURS = {"ok": "green", "FAIL": "bold red", "note": "yellow"}


@app.callback()
def _group() -> None:
    """Keeps `check` a word of its own, also while it is the only command."""


@app.command()
def check(
    reward: Annotated[str, typer.Argument(metavar="REWARD", help="FILE.py:function, a name of the library, or a recipe (.yaml) with its rubric.")],
    data: Annotated[
        str | None, typer.Option(help="Rows with the columns that the reward reads: a file or a name on the hub. Default: sums of our own.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help='How a row becomes a prompt: "{question}".')] = None,
    answer: Annotated[str | None, typer.Option(help='How a row tells the gold answer: "{answer|after:####}".')] = None,
    form: Annotated[
        str | None, typer.Option(help='A good completion: "<think>{reasoning}</think>{answer}". Default: the known form that earns most.')
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the reward, such as legacy=true.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Ask about the first so many rows of the data.")] = 32,
    patience: Annotated[float, typer.Option(min=0.1, help="Seconds after which a call is given up.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Unit-test a reward: gold answers must earn the most, and text that deserves nothing must earn nothing."""
    with sentences():
        from posttrain.rewards.check import check_reward

        recipe = read_recipe(reward) if reward.endswith((".yaml", ".yml")) else None
        rubric = _rubric(reward, _settings(settings or []), recipe)
        try:
            asked = _rows(DataSection() if recipe is None else recipe.data, data, prompt, answer, rows)
            report = check_reward(rubric, asked, form=None if form is None else form.replace("\\n", "\n"), patience=patience)
        finally:
            rubric.close()
        if as_json:
            say(json.dumps({"passed": report.passed, **asdict(report)}))
        else:
            _print(reward, rubric, report)
        if not report.passed:
            raise typer.Exit(1)


def _rubric(name: str, settings: dict[str, Any], recipe: Recipe | None) -> Rubric:
    """What is asked: a single reward, or the rubric of a recipe."""
    if recipe is None:
        from posttrain.rewards.rubric import Rubric

        return Rubric.from_config([{"reward": name, **settings}])
    if settings:
        raise UserError("--set is for a single reward; a recipe holds the settings of its own")
    from posttrain.cli.build import hide_progress_bars, make_rubric

    hide_progress_bars()
    return make_rubric(recipe)


def _rows(section: DataSection, data: str | None, prompt: str | None, answer: str | None, count: int) -> list[dict[str, Any]] | None:
    """About which rows it is asked; None: the checks' own."""
    from posttrain.data.mixture import load_data
    from posttrain.data.prompts import Template

    source = section.train if data is None else data
    if source is None:
        return None
    templates = section.templates() | ({} if answer is None else {"answer": answer})
    loaded = load_data(source, streaming=section.streaming)
    chosen = [dict(row) for row in itertools.islice(loaded, count)]
    return list(Template(section.prompt if prompt is None else prompt, templates, section.system).apply(chosen, chat=False))


def _settings(given: list[str]) -> dict[str, Any]:
    from posttrain.cli.yaml12 import read_yaml

    settings = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item} has no value; write --set {item}=...")
        settings[key] = read_yaml(value, f"--set {key}")
    return settings


def _print(name: str, rubric: Rubric, report: CheckReport) -> None:
    from rich.console import Console
    from rich.text import Text

    from posttrain.characters import visible

    console = Console(highlight=False)
    console.print(Text(visible(name), style="bold"))
    for line in rubric.describe().splitlines():
        console.print(Text("  " + visible(line)), soft_wrap=True)
    console.print(Text(f"  {report.rows} rows; good completions are written as {visible(report.form)}", style="dim"), soft_wrap=True)
    console.print(_table(report))
    failed = len(report.failed)
    console.print(Text("passed", style="green") if report.passed else Text(f"{failed} of {len(report.findings)} checks failed", style="bold red"))


def _table(report: CheckReport) -> Table:
    """One row a check; those that were not asked share a row for each reason."""
    from rich.table import Table
    from rich.text import Text

    from posttrain.characters import visible

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    skipped: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.verdict == "note" and finding.detail.startswith("not asked"):
            skipped.setdefault(finding.detail, []).append(finding.name)
        else:
            table.add_row(Text(finding.verdict, style=_COLOURS[finding.verdict]), Text(finding.name), Text(visible(finding.detail)))
    for reason, names in skipped.items():
        table.add_row(Text("note", style=_COLOURS["note"]), Text(reason.partition(":")[0]), Text(f"{', '.join(names)}:{reason.partition(':')[2]}"))
    return table
