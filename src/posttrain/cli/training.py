"""One training run in its directory: may it start, where does it go on from, and what is left there when it is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from posttrain.cli import runs
from posttrain.cli.kinds import Kind
from posttrain.cli.recipe import Recipe


def dry_run(kind: Kind, recipe: Recipe) -> str:
    """Build everything and train nothing; the plan of a step and the rubric's table. Raises UserError for whatever cannot work."""
    from posttrain.cli import build
    from posttrain.trainers.online import OnlineTrainer

    with tempfile.TemporaryDirectory() as nowhere:
        trainer = build.make_trainer(kind, recipe, default_output="runs/run", output_dir=nowhere)
        return trainer.plan() + (f"\n{trainer.rubric.describe()}" if isinstance(trainer, OnlineTrainer) else "")


def train_run(kind: Kind, recipe: Recipe, output_dir: str, *, resume: bool, overwrite: bool) -> Path:
    """Train into `output_dir`, from its last checkpoint where `resume` finds one. Returns the directory of the model."""
    from posttrain.cli import build

    goes_on = runs.may_start(output_dir, section=kind.section, resume=resume, overwrite=overwrite)
    trainer = build.make_trainer(kind, recipe, default_output=output_dir)
    with trainer.args.main_process_first():
        if trainer.args.process_index == 0:
            _begin(output_dir, recipe, overwrite)
    if resume and not goes_on:
        typer.echo(f"no complete checkpoint in {output_dir} yet: starting from the beginning")
    trainer.train(resume_from_checkpoint=goes_on or None)
    model = Path(output_dir) / runs.MODEL
    trainer.save_model(str(model))
    if trainer.args.process_index == 0:
        typer.echo(f"the model is in {model}" + (f"   examine it: posttrain eval {output_dir}" if kind.is_online else ""))
    return model


def _begin(output_dir: str, recipe: Recipe, overwrite: bool) -> None:
    if overwrite:
        runs.clear(output_dir)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / runs.RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
