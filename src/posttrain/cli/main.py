"""The command line. Each command reads its input, calls the library and prints; whatever can go wrong becomes one sentence on stderr.

Exit codes: 0 done, 1 training stopped (state on disk is whole), 2 the input cannot work, 130 Ctrl-C. POSTTRAIN_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import runs
from posttrain.cli.kinds import KINDS
from posttrain.cli.recipe import Recipe, read_recipe
from posttrain.cli.values import nearest
from posttrain.errors import RewardError, TrainingError, UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Turn a language model into one that reasons: GRPO and SFT."
)
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # --train.learning_rate=1e-6 and its like
EXIT_CODES: dict[type[Exception], int] = {TrainingError: 1, UserError: 2, RewardError: 2}


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Errors that are the user's to mend are printed as a sentence, without a traceback."""
    try:
        yield
    except tuple(EXIT_CODES) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") == "1":
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from error


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe: arithmetic, gsm8k, gsm8k-tiny.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last complete checkpoint (from the start, if there is none yet).")]
Overwrite = Annotated[bool, typer.Option(help="Remove an earlier run in the output directory and start over.")]
DryRun = Annotated[bool, typer.Option(help="Check everything, print the plan, train nothing.")]


def _training_command(name: str) -> Callable[..., None]:
    def command(ctx: typer.Context, recipe: RecipeName, resume: Resume = False, overwrite: Overwrite = False, dry_run: DryRun = False) -> None:
        with sentences():
            _train(name, ctx, recipe, resume, overwrite, dry_run)

    return command


for _name, _kind in KINDS.items():
    app.command(name=_name, help=_kind.help, context_settings=SETTINGS)(_training_command(_name))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the data, the model and the training.")] = 0,
    output: Annotated[str, typer.Option(help="Where the run is written.")] = "runs/demo",
    quick: Annotated[bool, typer.Option(help="A few steps only: does everything work here?")] = False,
) -> None:
    """A tiny transformer learns two-digit addition, on CPU, without a download."""
    with sentences():
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
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.exams import complete
        from posttrain.types import Sampling

        hide_progress_bars()
        for rollout in complete(model, prompt, system, n, Sampling(max_new_tokens, temperature), seed):
            typer.echo(rollout.text + ("" if not rollout.is_truncated else " [cut]"))


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's directory or name, or a run's directory.")],
    data: Annotated[
        str | None, typer.Option(help="Questions: a file or a name on the hub. Default: the run's own exam, else the recipe's eval.data.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Its templates and rubric are used. Default: the run's own.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Ask so many of them, always the same ones. Default: the recipe's eval.samples, else all.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what the run was trained with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Greedy accuracy with its 95 % interval."""
    with sentences():
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.exams import evaluate, find_question, report

        hide_progress_bars()
        result = evaluate(find_question(target, data, recipe, max_new_tokens), samples)
        typer.echo(json.dumps(result) if as_json else report(result))


def _train(command: str, ctx: typer.Context, name: str, resume: bool, overwrite: bool, dry_run: bool) -> None:
    recipe = read_recipe(name, _overrides(ctx))
    from posttrain.cli import build

    build.hide_progress_bars()
    kind, section = KINDS[command], KINDS[command].section
    default_output = f"runs/{Path(name).stem}" + ("" if command == "grpo" else f"-{command}")
    if dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            trainer = build.make_trainer(kind, recipe, default_output=default_output, output_dir=nowhere)
            typer.echo(trainer.plan())
            typer.echo("the recipe is ready to train: nothing was written")
        return
    output_dir = str(getattr(recipe, section).get("output_dir") or default_output)
    goes_on = runs.may_start(output_dir, section=section, resume=resume, overwrite=overwrite)
    trainer = build.make_trainer(kind, recipe, default_output=default_output)
    with trainer.args.main_process_first():
        if trainer.args.process_index == 0:
            _begin(output_dir, recipe, overwrite)
    if resume and not goes_on:
        typer.echo(f"no complete checkpoint in {output_dir} yet: starting from the beginning")
    trainer.train(resume_from_checkpoint=goes_on or None)
    trainer.save_model(str(Path(output_dir) / runs.MODEL))
    if trainer.args.process_index == 0:
        typer.echo(f"the model is in {output_dir}/{runs.MODEL}" + (f"   examine it: posttrain eval {output_dir}" if kind.is_online else ""))


def _begin(output_dir: str, recipe: Recipe, overwrite: bool) -> None:
    if overwrite:
        runs.clear(output_dir)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / runs.RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")


def _overrides(ctx: typer.Context) -> list[str]:
    """["train.beta=0.1", ...] from what the command's own options left over: --train.beta=0.1 or --train.beta 0.1."""
    rest, found = list(ctx.args), []
    sections = Recipe.__dataclass_fields__
    while rest:
        given = rest.pop(0)
        name, equals, value = given.removeprefix("--").partition("=")
        if not given.startswith("--") or name.partition(".")[0] not in sections:
            options = [option for parameter in ctx.command.params for option in parameter.opts] + [f"--{section}" for section in sections]
            raise UserError(
                f"{given} is not an option; settings carry their section, as in --train.learning_rate=1e-6.{nearest(given.split('.')[0], options)}"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{given} has no value; write {given}=...")
            value = rest.pop(0)
        found.append(f"{name}={value}")
    return found


def run() -> None:
    """The console script."""
    sys.exit(app())


if __name__ == "__main__":
    run()
