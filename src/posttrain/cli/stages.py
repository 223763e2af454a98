"""A recipe with stages: several trainings in order, each in a run directory of its own and on the model that an earlier
one left.

    stages:
      - sft: {data: {train: demonstrations.jsonl}}
      - reward-model: {data: {train: pairs.jsonl}}
      - ppo: {rubric: [stage:reward-model]}

A stage is the recipe around it with its own sections laid over. It starts from the last stage that left a policy,
unless `from` names another (`start`: the recipe's own model). "stage:NAME" stands for the model of a stage. A stage
that is done says so in stage.json.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.cli import runs
from posttrain.cli.recipe import Recipe, find_recipe, lay_over, load_yaml, recipe_of
from posttrain.cli.values import nearest, read_settings
from posttrain.errors import UserError
from posttrain.io import read_json, write_whole
from posttrain.methods import METHODS, Method

DONE, START, MARK = "stage.json", "start", "stage:"


@dataclass
class Stage:
    """One training of a recipe. `values` are its sections, with "stage:NAME" where a model is that does not exist
    yet."""

    name: str
    kind: Method
    directory: Path
    start: str  # the stage whose model it starts from, or START
    values: dict[str, Any]
    file: Path  # the recipe's

    @property
    def is_policy(self) -> bool:
        return not self.kind.leaves_scorer

    def recipe(self, models: dict[str, str]) -> Recipe:
        """`models`: the directory of every stage that is done. Raises UserError for sections that cannot be read."""
        values = _with_models(copy.deepcopy(self.values), models)
        if self.start != START:
            kept = {key: value for key, value in values["model"].items() if key in ("dtype", "lora", "load_in_4bit", "keep_in_16bit")}
            values["model"] = {"name": models.get(self.start, MARK + self.start), **kept}
        values.setdefault(self.kind.section, {})["output_dir"] = str(self.directory)
        return recipe_of(values, self.file)

    def digest(self) -> str:
        """Of what it was told, wherever its folder lies."""
        recipe = self.recipe({})
        del getattr(recipe, self.kind.section)["output_dir"]
        return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]

    def _digest_with_places(self, models: dict[str, str]) -> str:
        """As earlier versions made it."""
        return hashlib.sha256(self.recipe(models).to_yaml().encode()).hexdigest()[:16]

    def model_if_done(self, models: dict[str, str]) -> str | None:
        """Its model; None: it is not done, or its model is gone. Raises UserError where it was done with other settings
        than the recipe has now."""
        path = self.directory / DONE
        if not path.is_file():
            return None
        fix = "remove that file, and the stage goes on from its last checkpoint; or start over with --overwrite"
        try:
            done = read_json(path)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}; {fix}") from error
        if not isinstance(done.get("model"), str):
            raise UserError(f"{path} is damaged: it names no model; {fix}")
        if done.get("digest") not in (self.digest(), self._digest_with_places(models)):
            raise UserError(f"the stage '{self.name}' was done with another recipe; put the settings back, or start over with --overwrite")
        model = self.directory / done["model"]
        return str(model) if runs.is_model(model) else None

    def mark_done(self, model: str) -> None:
        write_whole(self.directory / DONE, json.dumps({"model": model, "digest": self.digest()}))


def read_stages(name: str, overrides: Iterable[str], output: str | None) -> list[Stage]:
    """Every stage, its names and settings checked. An override goes to the stages that have its section. Raises
    UserError."""
    path = find_recipe(name)
    values = load_yaml(path)
    listed = values.pop("stages", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"{path} has no list of stages; a single training is started with its own command: {', '.join(f'posttrain {k}' for k in METHODS)}"
        )
    folder = Path(output or f"runs/{path.stem}")
    stages: list[Stage] = []
    for number, given in enumerate(listed, start=1):
        kind, own = _read_stage(given, number)
        stage_name = str(own.pop("name", kind))
        if stage_name in (START, *(stage.name for stage in stages)):
            raise UserError(f"stages: two are called '{stage_name}'; give this one a name of its own: {{{kind}: {{name: ...}}}}")
        stage_values = _laid_over(values, own, ("from",))
        for override in overrides:
            section = override.partition("=")[0].partition(".")[0]
            if section == METHODS[kind].section or section not in METHODS.sections().values():
                lay_over(stage_values, override)
        start = own.get("from") or next((stage.name for stage in reversed(stages) if stage.is_policy), START)
        stages.append(Stage(stage_name, METHODS[kind], folder / f"{number}-{stage_name}", str(start), stage_values, path))
    _check(stages)
    return stages


def named(stages: list[Stage], wanted: str) -> Stage:
    for stage in stages:
        if stage.name == wanted:
            return stage
    names = [stage.name for stage in stages]
    raise UserError(f"there is no stage '{wanted}'; there are: {', '.join(names)}.{nearest(wanted, names)}")


def data_of(stage: Stage, stages: list[Stage]) -> tuple[Recipe, Method, list[dict[str, Any]]]:
    """What `preview` needs to see a stage's data before the stages before it were trained: its recipe with the model
    that the first of them starts from, its kind, and the settings that this model will have gone through."""
    recipe = stage.recipe({})
    before: list[dict[str, Any]] = []
    at = stage
    while at.start != START:
        at = named(stages, at.start)
        before.insert(0, getattr(at.recipe({}), at.kind.section))
    recipe.model = at.recipe({}).model
    return recipe, stage.kind, before


def _read_stage(given: Any, number: int) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(f"stages: number {number} must be a trainer with its sections, such as {{sft: {{data: ...}}}}, not {given!r}"[:300])
    ((kind, own),) = given.items()
    if kind not in METHODS:
        raise UserError(f"stages: {kind} is no trainer; use one of {', '.join(METHODS)}.{nearest(str(kind), METHODS)}")
    if not isinstance(own, dict | None):
        raise UserError(f"stages: {kind} must have sections such as data, not {own!r}"[:300])
    return kind, dict(own or {})


def _check(stages: list[Stage]) -> None:
    """What can be said before anything is trained: names, sections, settings."""
    before: list[str] = [START]
    for stage in stages:
        asked = [stage.start, *_asked_for(stage.values)]
        for name in asked:
            if name not in before:
                raise UserError(
                    f"the stage '{stage.name}' needs '{name}', which is no earlier stage; there are: {', '.join(before)}.{nearest(name, before)}"
                )
        recipe = stage.recipe({})
        read_settings(stage.kind.section, getattr(recipe, stage.kind.section), stage.kind.config_class(), stage.kind.title)
        if recipe.model.lora is not None and recipe.model.from_scratch is not None:
            raise UserError(
                f"the stage '{stage.name}': adapters on random weights leave nothing that a later stage could start from; leave model.lora out"
            )
        if recipe.data.train is None:
            raise UserError(f"the stage '{stage.name}' does not say data.train")
        before.append(stage.name)


def _asked_for(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.removeprefix(MARK)] if value.startswith(MARK) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for one in inner for name in _asked_for(one)]


def _with_models(value: Any, models: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_models(inner, models) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_models(inner, models) for inner in value]
    return models.get(value.removeprefix(MARK), value) if isinstance(value, str) and value.startswith(MARK) else value


def _laid_over(below: dict[str, Any], above: dict[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Sections are merged key by key; anything else is replaced."""
    merged = copy.deepcopy(below)
    for key, value in above.items():
        if key in leave_out:
            continue
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else copy.deepcopy(value)
    return merged


def clear(stage: Stage) -> None:
    """Remove what an earlier run of the stage wrote."""
    import shutil

    runs.clear(str(stage.directory))
    (stage.directory / DONE).unlink(missing_ok=True)
    for name in (runs.MERGED, f".writing-{runs.MERGED}", f".deleting-{runs.MERGED}"):
        shutil.rmtree(stage.directory / name, ignore_errors=True)
