"""The command line. Each command reads its input, calls the library and prints; whatever can go wrong becomes one
sentence on stderr.

Exit codes: 0 done, 1 training stopped (state on disk is whole), 2 the input cannot work, 130 Ctrl-C, 143 SIGTERM and
129 SIGHUP (the step is saved); what checks something exits with 1 when that fails (`probe` also with 3: nothing to
learn). POSTTRAIN_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import data as data_commands
from posttrain.cli import flat, rewards, runs, threads
from posttrain.cli.doctor import doctor
from posttrain.cli.evaluate import evaluate
from posttrain.cli.export import export
from posttrain.cli.options import SETTINGS, as_utf8, overrides, quiet, say, sentences
from posttrain.cli.plan import plan
from posttrain.cli.probe import probe
from posttrain.cli.recipe import read_recipe
from posttrain.cli.run import run as run_stages
from posttrain.cli.watch import Watch, report, watch, watching
from posttrain.methods import METHODS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model better at your task: SFT, reward models, DPO and its relatives, PPO, RLOO and GRPO.",
)
app.add_typer(rewards.app, name="reward")
app.add_typer(data_commands.app, name="data")
app.command()(export)
app.command()(watch)
app.command()(report)
app.command(name="eval")(evaluate)
app.command(context_settings=SETTINGS)(probe)
app.command()(doctor)
app.command(context_settings=SETTINGS)(plan)
app.command(name="run", context_settings=SETTINGS)(run_stages)


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe: arithmetic, gsm8k, gsm8k-tiny.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last complete checkpoint (from the start, if there is none yet).")]
Overwrite = Annotated[bool, typer.Option(help="Remove an earlier run in the output directory and start over.")]
DryRun = Annotated[bool, typer.Option(help="Check everything, print the plan, train nothing.")]


def _training_command(name: str) -> Callable[..., None]:
    def command(
        ctx: typer.Context, recipe: RecipeName, resume: Resume = False, overwrite: Overwrite = False, dry_run: DryRun = False, watch: Watch = False
    ) -> None:
        with sentences():
            _train(name, ctx, recipe, resume, overwrite, dry_run, watch)

    return command


for _name, _help in METHODS.helps().items():
    app.command(name=_name, help=_help, context_settings=SETTINGS)(_training_command(_name))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the data, the model and the training.")] = 0,
    output: Annotated[str, typer.Option(help="Where the run is written.")] = "runs/demo",
    quick: Annotated[bool, typer.Option(help="A few steps only: does everything work here?")] = False,
    watch: Watch = False,
) -> None:
    """A tiny transformer learns two-digit addition, on CPU, without a download. An earlier demo there is replaced, any
    other run is not."""
    with sentences(), watching([output, f"{output}/sft"], watch):
        runs.make_way_for_demo(output, ["sft"])
        from posttrain.demo import run_demo

        run_demo(seed=seed, output_dir=output, quick=quick)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A model's directory or name, or a run's directory.")],
    prompt: Annotated[str, typer.Argument(help="Text; asked as a user's message where the model has a chat template.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many completions.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print completions of one prompt."""
    with sentences():
        from posttrain.characters import shown
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.evaluations import complete
        from posttrain.types import Sampling

        hide_progress_bars()
        for completion in complete(
            model, as_utf8(prompt), None if system is None else as_utf8(system), n, Sampling(max_new_tokens, temperature), seed
        ):
            text = shown(completion.text) if sys.stdout.isatty() else completion.text
            typer.echo(text + ("" if not completion.is_truncated else " [cut]"))  # a pipe gets what the model wrote


def _train(command: str, ctx: typer.Context, name: str, resume: bool, overwrite: bool, dry_run: bool, watch: bool) -> None:
    recipe = read_recipe(name, overrides(ctx))
    from posttrain.cli import build, training

    build.hide_progress_bars()
    kind = METHODS[command]
    if dry_run:
        say(training.dry_run(kind, recipe))
        say("the recipe is ready to train: nothing was written")
        return
    default_output = f"runs/{Path(name).stem}" + ("" if command == "grpo" else f"-{command}")
    output_dir = str(getattr(recipe, kind.section).get("output_dir") or default_output)
    with watching([output_dir], watch):
        training.train_run(kind, recipe, output_dir, resume=resume, overwrite=overwrite)


def run() -> None:
    """The console script. An output that is not UTF-8 (a pipe on Windows) gets escapes for what it cannot hold, instead
    of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    threads.prepare()
    quiet()
    sys.exit(flat.app() if flat.is_flat(sys.argv[1:]) else app())


if __name__ == "__main__":
    run()
