"""`posttrain export`: a run's model as a directory that others load, compared with the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli import runs
from posttrain.cli.options import say, sentences


def export(
    source: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A run's directory, or that of a model or of adapters.")],
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Where the exported model goes; it must not be there yet.")],
    format: Annotated[str, typer.Option(help="merged: all weights, adapters folded in. adapter: the adapters alone.")] = "merged",
    dtype: Annotated[str, typer.Option(help="Of the merged weights: bfloat16, float16 or float32.")] = "bfloat16",
    base: Annotated[str | None, typer.Option(help="For adapters: the name under which others find the model they belong to.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file of rows with `prompt` to compare on. Default: the run's questions, else a few of ours.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Ask the trained and the exported model the same prompts.")] = True,
    push_to_hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it afterwards.")] = None,
    public: Annotated[bool, typer.Option(help="With --push-to-hub: everybody may see it.")] = False,
) -> None:
    """Write a model that transformers, vLLM and llama.cpp's converter load, with a card and a report on whether it says
    the same."""
    with sentences():
        from posttrain import export as library
        from posttrain.cli.build import hide_progress_bars, loading

        hide_progress_bars()
        model, run = runs.model_of(source), runs.run_of(source)
        of_run = None if run is None else run.directory
        merged = format == "merged"
        asked = (_prompts(prompts, of_run) or library.PROMPTS) if compare and merged else None
        options = loading(model) if merged else {}
        options.pop("dtype", None)  # the sum is computed in float32
        parity = library.export_model(model, directory, format=format, dtype=dtype, base=base, prompts=asked, **options)
        if parity is not None:
            say(str(parity))
        library.write_card(directory, source=model, run=of_run, parity=parity)
        say(f"exported to {directory}")
        if push_to_hub is not None:
            say(f"pushed to {library.push_to_hub(directory, push_to_hub, private=not public)}")


def _prompts(given: str | None, run: Path | None) -> list[Any]:
    """At most 20 prompts, from the file that was named or the questions that the run wrote."""
    from posttrain.data.prompts import validate_prompts
    from posttrain.data.sources import load_rows

    source = given or (str(run / runs.QUESTIONS) if run is not None and (run / runs.QUESTIONS).is_file() else None)
    if source is None:
        return []
    rows = load_rows(source)
    chosen = [rows[index] for index in range(min(20, len(rows)))]
    validate_prompts(chosen)
    return [row["prompt"] for row in chosen]
