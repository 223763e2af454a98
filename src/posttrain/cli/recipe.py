"""A recipe: one YAML file, read into typed sections. Every unknown key is an error that names the nearest one; nothing
is skipped.

Reading only: objects are made from it in `build.py`. Overrides such as `--train.learning_rate=1e-6` are laid over the
file before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from posttrain.cli.environments import EnvSection
from posttrain.cli.values import read_section
from posttrain.cli.yaml12 import read_yaml
from posttrain.errors import UserError, did_you_mean
from posttrain.io import read_text
from posttrain.methods import METHODS
from posttrain.rewards.loading import names_model
from posttrain.secrets import redacted


@dataclass
class Lora:
    """Train low-rank adapters instead of every weight."""

    r: int = 32  # rank
    alpha: int = 64  # the adapter's output is scaled by alpha / r
    dropout: float = 0.0
    target_modules: list | str = "all-linear"  # names of the layers to adapt


@dataclass
class TokenizerSection:
    """A tokenizer trained on the data's text, for models from scratch."""

    kind: str = "bpe"
    vocab_size: int = 2000


@dataclass
class ModelSection:
    name: str | None = None  # a local directory or a name on the hub
    dtype: str | None = None  # float32, bfloat16 or float16; None: the loader's choice
    lora: Lora | None = None
    from_scratch: dict | None = None  # {model_type: qwen3, hidden_size: 64, ...}: random weights instead of `name`
    tokenizer: TokenizerSection | None = None  # with from_scratch only
    load_in_4bit: bool = False
    keep_in_16bit: int | list | None = None  # with load_in_4bit: linears that are not quantised, by name; or bytes for those that lose most

    def __post_init__(self) -> None:
        if self.load_in_4bit and (self.lora is None or self.from_scratch is not None):
            raise UserError(
                "model.load_in_4bit: 4-bit weights of a pretrained model stay as they are beside adapters; give model.lora too (lora: {})"
            )
        if self.keep_in_16bit is not None and not self.load_in_4bit:
            raise UserError("model.keep_in_16bit: says what load_in_4bit leaves alone; set both, or neither")
        if (self.name is None) == (self.from_scratch is None):
            raise UserError("model needs one of: name (a directory or a name on the hub), from_scratch (a config, for random weights)")
        if (self.tokenizer is None) != (self.from_scratch is None):
            raise UserError("model.tokenizer and model.from_scratch belong together: a pretrained model brings its own tokenizer")
        if self.tokenizer is not None and self.tokenizer.kind != "bpe":
            raise UserError(f"model.tokenizer.kind: {self.tokenizer.kind} is not known; use bpe")


@dataclass
class DataSection:
    """Templates say how a row becomes a prompt: "{question}", "{answer|after:####}"."""

    train: str | list | None = None  # a file, a directory saved by datasets, "name:config:split" on the hub, or a list of {path, weight, rename}
    streaming: bool = False  # read rows as they are needed; for trainers whose data hold what they learn from, with max_steps
    prompt: str | None = None  # None: the data has a column `prompt`
    answer: str | None = None  # becomes the column `answer`, which rewards read
    completion: str | None = None  # becomes the column `completion`, which SFT trains on
    chosen: str | None = None  # becomes the column `chosen`: the better completion of a preference pair
    rejected: str | None = None  # becomes the column `rejected`: the worse one
    label: str | None = None  # becomes the column `label`: whether a completion is good, for KTO
    system: str | None = None  # a system message, or text before the prompt where the tokenizer has no chat template
    columns: dict = field(default_factory=dict)  # further columns: {name: template}

    def templates(self) -> dict[str, str]:
        named = {name: getattr(self, name) for name in ("answer", "completion", "chosen", "rejected", "label")}
        return {**self.columns, **{name: template for name, template in named.items() if template is not None}}


@dataclass
class EngineSection:
    kind: str = "local"  # local | hf


@dataclass
class EvalSection:
    data: str | None = None  # as data.train; the same templates apply
    every: int | None = None  # optimizer steps between two evaluations; None: only by `posttrain eval`
    samples: int | None = None  # rows to use, drawn once; None: all


@dataclass
class Recipe:
    """What every recipe has; one that is read has a section for each method too (`SECTIONS["recipe"]`)."""

    model: ModelSection
    data: DataSection
    rubric: list = field(default_factory=list)
    env: EnvSection = field(default_factory=EnvSection)
    engine: EngineSection = field(default_factory=EngineSection)
    eval: EvalSection = field(default_factory=EvalSection)

    def to_yaml(self) -> str:
        """What reads back as the same recipe, without its secrets: a run's directory is passed on."""
        written = redacted(asdict(self))
        written["eval"] = written.pop("eval")  # the last, as digests of finished stages have it
        for section in METHODS.outside_sections():  # so that installing a package changes no digest
            if not written[section]:
                del written[section]
        written["data"]["columns"] = self.data.columns  # names of columns and their templates: a column `secret` is data
        return yaml.safe_dump(written, sort_keys=False, allow_unicode=True)


_WithMethods = make_dataclass("Recipe", [(section, dict, field(default_factory=dict)) for section in METHODS.sections().values()], bases=(Recipe,))
SECTIONS: dict[str, type] = {
    "recipe": _WithMethods, "model": ModelSection, "model.lora": Lora, "model.tokenizer": TokenizerSection,
    "data": DataSection, "env": EnvSection, "engine": EngineSection, "eval": EvalSection,
}  # fmt: skip

SECTION_NAMES = tuple(known.name for known in fields(_WithMethods))


def read_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of that path or packaged name, with overrides laid over it. Paths in it become absolute."""
    path = find_recipe(name)
    values = load_yaml(path)
    for override in overrides:
        lay_over(values, override)
    if "stages" in values:
        raise UserError(f"{path} has stages: run all of them with `posttrain run {name}`")
    return recipe_of(values, path)


def recipe_of(values: dict[str, Any], path: Path) -> Recipe:
    """The recipe that `path` would hold with these values."""
    if "model" not in values or "data" not in values:
        raise UserError(f"{path} needs the sections model and data; it has: {', '.join(values) or 'none'}")
    recipe: Recipe = read_section("", values, SECTIONS)
    folder = path.parent
    recipe.data.train = _absolute_sources(recipe.data.train, folder)
    recipe.eval.data = absolute(recipe.eval.data, folder)
    recipe.model.name = absolute(recipe.model.name, folder)
    recipe.rubric = [_absolute_reward(entry, folder) for entry in recipe.rubric]
    recipe.env.tools = [_absolute_reward(entry, folder) for entry in recipe.env.tools]
    recipe.env.name = _absolute_reward(recipe.env.name, folder)
    return recipe


def find_recipe(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = {entry.name: Path(str(entry)) for entry in resources.files("posttrain").joinpath("recipes").iterdir() if entry.name.endswith(".yaml")}
    wanted = path.name if path.suffix == ".yaml" else f"{path.name}.yaml"
    if wanted in packaged and path.parent in (Path(), Path("recipes")):
        return packaged[wanted]
    near = did_you_mean(wanted, packaged)
    raise UserError(f"there is no recipe {name}; packaged ones are: {', '.join(sorted(file.removesuffix('.yaml') for file in packaged))}.{near}")


def lay_over(values: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=text` in place; the text is read as YAML, unless the setting is text."""
    key, _, text = override.partition("=")
    *parents, last = key.split(".")
    place = values
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise UserError(f"--{key}: {'.'.join(parents[: depth + 1])} has no settings of its own; give it whole, as YAML")
    is_text = _is_text(".".join(parents), last) and text != "null"
    place[last] = text if is_text else read_yaml(text, f"--{key}={text}")


def load_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections ({', '.join(SECTION_NAMES)}), not {type(values).__name__}")
    return values


def _is_text(section: str, key: str) -> bool:
    """Whether that setting is text whatever it looks like: on the command line {question} is a template, not a
    mapping."""
    return section in SECTIONS and any(known.name == key and known.type in ("str", "str | None") for known in fields(SECTIONS[section]))


def absolute(source: str | None, folder: Path = Path()) -> str | None:
    """A path that exists, from here or from the recipe's folder, made absolute; anything else (a name on the hub) as it
    is."""
    if not isinstance(source, str):
        return source
    for candidate in (Path(source).expanduser(), folder / source):
        if candidate.exists():
            return str(candidate.resolve())
    return source


def _absolute_sources(given: Any, folder: Path) -> Any:
    if not isinstance(given, list):
        return absolute(given, folder)
    return [
        {**one, "path": absolute(one["path"], folder)} if isinstance(one, dict) and "path" in one else _absolute_sources(one, folder) for one in given
    ]


def _absolute_reward(entry: Any, folder: Path) -> Any:
    """The file of a function, or the directory of a reward model, made absolute."""
    name = entry.get("reward") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        return entry
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        whole = f"{absolute(file, folder)}:{function}"
    elif names_model(found := absolute(name, folder)):
        whole = str(found)
    else:
        return entry
    return {**entry, "reward": whole} if isinstance(entry, dict) else whole
