"""One training run in its directory: may it start, where does it go on from, and what is left there when it is done."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.cli import runs
from posttrain.cli.options import say
from posttrain.cli.recipe import Recipe
from posttrain.io import write_whole
from posttrain.methods import Method
from posttrain.trainers.core import checkpoints


class _Beginning(TrainerCallback):
    """What changes in the directory only once nothing refuses to train: the recipe, and the model with which the run
    ended before, if there are further steps."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self._recipe, self._directory = recipe, directory

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        write_whole(self._directory / runs.RECIPE, self._recipe.to_yaml())
        model = self._directory / runs.MODEL
        if state.global_step < state.max_steps and model.exists():
            checkpoints.remove(model)


def dry_run(kind: Method, recipe: Recipe) -> str:
    """Build everything and train nothing; the plan of a step and the rubric's table. Raises UserError for whatever
    cannot work."""
    from posttrain.cli import build
    from posttrain.trainers.core.switches import memory_line
    from posttrain.trainers.online.trainer import OnlineTrainer

    with tempfile.TemporaryDirectory() as nowhere:
        trainer = build.make_trainer(kind, recipe, default_output="runs/run", output_dir=nowhere)
        rubric = trainer.rubric if isinstance(trainer, OnlineTrainer) else None
        lines = (trainer.plan(), memory_line(trainer.args), None if rubric is None else rubric.describe())
        return "\n".join(line for line in lines if line is not None)


def train_run(kind: Method, recipe: Recipe, output_dir: str, *, resume: bool, overwrite: bool) -> Path:
    """Train into `output_dir`, from its last checkpoint where `resume` finds one. Returns the directory of the
    model."""
    from posttrain.cli import build

    goes_on = runs.may_start(output_dir, section=kind.section, resume=resume, overwrite=overwrite)
    trainer = build.make_trainer(kind, recipe, default_output=output_dir)
    with trainer.args.main_process_first():
        if trainer.args.process_index == 0:
            _make_room(output_dir, overwrite)
    if resume and not goes_on:
        say(f"no complete checkpoint in {output_dir} yet: starting from the beginning")
    trainer.add_callback(_Beginning(recipe, Path(output_dir)))
    trainer.train(resume_from_checkpoint=goes_on or None)
    model = Path(output_dir) / runs.MODEL
    with checkpoints.written_whole(model, main=trainer.args.should_save) as staging:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")
    if trainer.args.process_index == 0:
        say(f"the model is in {model}" + (f"   examine it: posttrain eval {output_dir}" if kind.is_online else ""))
    return model


def _make_room(output_dir: str, overwrite: bool) -> None:
    if overwrite:
        runs.clear(output_dir)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
