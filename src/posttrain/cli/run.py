"""`posttrain run`: the stages of a recipe, one after another. What is done is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import runs
from posttrain.cli.options import overrides, say, sentences
from posttrain.cli.recipe import Recipe
from posttrain.cli.stages import DONE, Stage, clear, data_of, read_stages
from posttrain.cli.watch import Watch, watching
from posttrain.errors import UserError


def run(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file with `stages`, or the name of a packaged one.")],
    output: Annotated[str | None, typer.Option(help="The directory of all stages. Default: runs/ and the recipe's name.")] = None,
    resume: Annotated[bool, typer.Option(help="Skip stages that are done, and go on within the one that is not.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Remove what earlier runs of these stages wrote, and start over.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check every stage and its data, train nothing.")] = False,
    watch: Watch = False,
) -> None:
    """Train in stages, such as sft, reward-model, ppo, each on the model before it. Settings can follow:
    --sft.max_steps=100"""
    with sentences():
        from posttrain.cli.build import hide_progress_bars

        hide_progress_bars()
        if resume and overwrite:
            raise UserError("--resume goes on with a run and --overwrite starts it over: give one of them")
        stages = read_stages(recipe, overrides(ctx), output)
        _check_data(stages, again=overwrite)
        if dry_run:
            for stage in stages:
                say(f"{stage.name}: {stage.kind.title}, from {stage.start}, into {stage.directory}")
            say("the recipe is ready to train: nothing was written")
            return
        if overwrite:
            _clear(stages)
        with watching([str(stage.directory) for stage in stages], watch):
            _run(stages, resume)


def _check_data(stages: list[Stage], *, again: bool) -> None:
    """The rows of every stage, before the first is trained. again: also of those that are done."""
    from posttrain.cli.preview import preview

    for stage in stages:
        if (stage.directory / DONE).is_file() and not again:
            continue
        try:
            recipe, kind, before = data_of(stage, stages)
            preview(recipe, kind, 0, before)
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from error


def _clear(stages: list[Stage]) -> None:
    """Of several processes one removes, and the others wait."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        if PartialState().is_main_process:
            for stage in stages:
                clear(stage)


def _run(stages: list[Stage], resume: bool) -> None:
    from posttrain.cli import training
    from posttrain.cli.process_state import restored

    models: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        done = stage.model_if_done(models)
        title = f"stage {number} of {len(stages)}, {stage.name}"
        if done is not None:
            if not resume:
                raise UserError(f"{stage.directory} is done already; go on with --resume, or start over with --overwrite")
            say(f"{title}: done before")
        else:
            say(f"{title}: {stage.kind.title} into {stage.directory}")
            with restored():
                again = resume and runs.has_only_model(str(stage.directory))  # its end was missing, as when its adapters could not be merged
                model = training.train_run(stage.kind, stage.recipe(models), str(stage.directory), resume=resume and not again, overwrite=again)
                done = _leave(stage, models, model)
        models[stage.name] = done
    say(f"all stages are done; the last model is in {models[stages[-1].name]}")


def _leave(stage: Stage, models: dict[str, str], model: Path) -> str:
    """The model that later stages start from: adapters are merged, so that the next stage may have its own. Written by
    one process."""
    from accelerate import PartialState

    from posttrain.models.adapter_files import is_adapter

    left = runs.MERGED if stage.is_policy and is_adapter(model) else runs.MODEL
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            if left == runs.MERGED:
                _merge(stage, stage.recipe(models), model)
            stage.mark_done(left)
    return str(stage.directory / left)


def _merge(stage: Stage, recipe: Recipe, adapter: Path) -> None:
    """Written in the dtype of the weights that the adapters were trained beside, so that a next stage with adapters
    needs no more memory."""
    from posttrain.cli.build import loading, read_args
    from posttrain.models.load import load_tokenizer
    from posttrain.models.merge import load_merged, save_rounded
    from posttrain.models.precision import beside_adapters, dtype_named
    from posttrain.trainers.core.checkpoints import written_whole

    args = read_args(stage.kind, recipe, default_output=str(stage.directory))
    given = (args.model_init_kwargs or {}).get("dtype")
    dtype = beside_adapters(str(adapter), args.autocast_dtype) if given is None else dtype_named(given)
    options = loading(str(adapter)) | {"dtype": "float32"}  # of the sum
    merged = load_merged(str(adapter), **options)
    with written_whole(stage.directory / runs.MERGED, main=True) as staging:
        drift = save_rounded(merged, load_tokenizer(str(adapter)), staging, dtype=dtype)
    typer.echo(f"the adapters were merged into {str(dtype).removeprefix('torch.')} weights: {drift}")
