"""Run directories as the command line sees them: may a run start here, where is the model of a run, what did its recipe
say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.cli.recipe import Recipe, absolute, load_yaml, recipe_of
from posttrain.errors import UserError, did_you_mean
from posttrain.tracking.lock import in_use, is_written
from posttrain.tracking.schema import FILE_NAME, LOCK_NAME

MODEL, RECIPE, QUESTIONS, SUMMARY, ANSWERS = "model", "recipe.yaml", "exam.jsonl", "summary.json", "eval.jsonl"
MERGED = "merged"  # a stage's adapters folded into the model
# All that a run writes. Starting over removes these names and nothing else.
WRITTEN = (
    MODEL,
    RECIPE,
    QUESTIONS,
    SUMMARY,
    ANSWERS,
    "pushed",
    "run.sqlite*",
    "reference.safetensors",
    "checkpoint-*",
    "abandoned-checkpoint-*",
    ".writing-checkpoint-*",
    ".deleting-checkpoint-*",
    ".deleting-abandoned-checkpoint-*",
    f".writing-{MODEL}",
    f".deleting-{MODEL}",
    ".writing-reference.safetensors",
    f".{RECIPE}.tmp",
    f".{SUMMARY}.tmp",
)


class Run(NamedTuple):
    directory: Path
    recipe: Recipe  # what it was told


def may_start(output_dir: str, *, section: str, resume: bool, overwrite: bool) -> bool:
    """Whether to go on from a checkpoint. Raises UserError where an earlier run, or one that is training now, would be
    written over."""
    from posttrain.trainers.core.checkpoints import newest

    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite starts it over: give one of them")
    _refuse_written(output_dir)
    last = newest(output_dir)
    if last is not None and not (resume or overwrite):
        raise UserError(
            f"{output_dir} holds an earlier run, saved up to {last.name}. Go on with --resume, start over with --overwrite, or write elsewhere: --{section}.output_dir=..."
        )
    if has_only_model(output_dir) and not overwrite:  # --resume would begin anew, in silence, and remove it
        raise UserError(
            f"{output_dir} holds the model of an earlier run{' and no checkpoint to go on from' if resume else ''}. "
            f"Start over with --overwrite, or write elsewhere: --{section}.output_dir=..."
        )
    return resume and last is not None


def has_only_model(output_dir: str) -> bool:
    """Whether a run ended there that kept no checkpoint, so that nothing can go on from it."""
    from posttrain.trainers.core.checkpoints import newest

    return newest(output_dir) is None and is_model(Path(output_dir) / MODEL)


def make_way_for_demo(output_dir: str, stages: Iterable[str]) -> None:
    """Remove an earlier demo and its `stages`. Raises UserError where any other run would be written over.

    A demo leaves sums as questions, and unlike every other command no recipe.
    """
    folder, questions = Path(output_dir), Path(output_dir) / QUESTIONS
    directories = [folder, *(folder / stage for stage in stages)]
    if any(_written(directory) for directory in directories):
        is_demo = questions.is_file() and re.match(rb'\{"prompt": "\d\d\+\d\d="', questions.read_bytes()[:40]) and not (folder / RECIPE).exists()
        if not is_demo:
            raise UserError(f"{output_dir} holds a run that is no demo. Write elsewhere: --output runs/demo, say")
    for directory in directories:
        _refuse_written(str(directory))
    for directory in directories:
        clear(str(directory))


def clear(output_dir: str) -> None:
    """Remove what an earlier run wrote. Raises UserError while a training writes there."""
    _refuse_written(output_dir)
    for path in _written(Path(output_dir)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written(folder: Path) -> list[Path]:
    """What a run left there. The lock of its writer is nothing: it stays for whoever comes next."""
    return [path for pattern in WRITTEN for path in folder.glob(pattern) if path.name != LOCK_NAME]


def _refuse_written(output_dir: str) -> None:
    store = Path(output_dir) / FILE_NAME
    if is_written(store):
        raise in_use(store)


def model_of(target: str) -> str:
    """The model's directory or hub name: `target` itself, or for a run its final model, else its last checkpoint.

    Raises UserError where there is neither, and where the files of a checkpoint are not those that were saved.
    """
    from posttrain.trainers.core.checkpoints import newest
    from posttrain.trainers.core.manifest import MANIFEST, check_model, read

    path = Path(target).expanduser()
    if not path.exists():
        if target.startswith((".", "/", "~")) or target.count("/") > 1 or "\\" in target:
            near = did_you_mean(path.name, [found.name for found in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise UserError(f"there is no model or run at {target}.{near}")
        return target
    if (path / MANIFEST).is_file():
        check_model(path)
    if is_model(path):
        return str(path)
    if is_model(path / MODEL):
        return str(path / MODEL)
    last = newest(path)
    if last is not None:
        read(last)
        check_model(last)
    else:
        raise UserError(f"{target} holds neither a model (config.json) nor a run with a saved one")
    return str(last)


def method_of(run: str) -> str | None:
    """What the run was trained with, as in `Method.method`; None: no record says."""
    from posttrain.tracking.reader import RunReader

    try:
        with closing(RunReader(Path(run).expanduser())) as reader:
            return reader.meta().get("method")
    except UserError:
        return None


def run_of(target: str) -> Run | None:
    """The run that `target` is, or whose model or checkpoint it is. Recipes of stages, and those that start from
    `target`, only lie beside it."""
    given = Path(target).expanduser().absolute()
    for path in dict.fromkeys((given, given.resolve())):
        is_part = path.is_dir() and (path.name in (MODEL, MERGED) or path.name.startswith("checkpoint-"))
        for directory in (path, path.parent) if is_part else (path,):
            file = directory / RECIPE
            if file.is_file() and _is_run_recipe(values := load_yaml(file)):
                recipe = recipe_of(values, file)
                if recipe.model.name not in (absolute(target), str(given.resolve())):
                    return Run(directory, recipe)
    return None


def _is_run_recipe(values: Any) -> bool:
    """As `Recipe.to_yaml` writes it. Other programs call files of their own so too, and put them beside weights."""
    return isinstance(values, dict) and {"model", "data"} <= values.keys() and "stages" not in values


def is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
