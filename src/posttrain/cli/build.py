"""From a recipe to objects: tokenizer, rows, rubric, model, trainer. In the order of cost, so that a mistake shows
before anything is loaded.

Heavy libraries are imported inside functions: `posttrain --help` and a recipe's typing mistakes need none of them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli import fit, runs
from posttrain.cli.recipe import DataSection, EvalSection, ModelSection, Recipe, absolute
from posttrain.cli.values import nearest, read_settings
from posttrain.data.mixture import load_data
from posttrain.data.prompts import Template
from posttrain.data.sources import Rows, load_rows
from posttrain.errors import UserError
from posttrain.methods import METHODS, Method
from posttrain.rewards.loading import names_model
from posttrain.rewards.rubric import Rubric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.types import Engine

DTYPES = ("float32", "bfloat16", "float16")
# Settings of online trainers that say how completions are drawn and scored.
DRAWING = (
    *("max_completion_length", "temperature", "top_k", "top_p", "min_p", "generation_kwargs", "chat_template_kwargs", "skip_special_tokens"),
    *("max_turns", "max_turn_tokens", "max_tool_calling_iterations", "env_on_error", "engine", "max_concurrent_completions"),
    *("reward_weights", "reward_timeout", "reward_on_error", "reward_retries"),
)


def hide_progress_bars() -> None:
    """transformers' bars for reading and writing files would break into the live view. Those of downloads stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def make_trainer(kind: Method, recipe: Recipe, *, default_output: str, output_dir: str | None = None) -> Any:
    """A trainer ready to train; every input has been checked. `output_dir` overrides the recipe's (a dry run writes
    nowhere)."""
    args = read_args(kind, recipe, default_output=default_output, output_dir=output_dir)
    rubric = make_rubric(recipe) if kind.is_online else None
    if recipe.data.streaming and kind.is_online:
        raise UserError(f"data.streaming: {kind.title} draws its prompts from the whole dataset; leave it out")
    raw = load_data(needed(recipe.data.train, "data.train"), streaming=recipe.data.streaming)
    tokenizer = make_tokenizer(recipe.model, raw)
    inputs: dict[str, Any] = {"train_dataset": fill(raw, recipe.data, tokenizer, rubric), "processing_class": tokenizer}
    if recipe.eval.every is not None:
        inputs["eval_dataset"] = evaluation_rows(recipe, tokenizer, rubric)
    if rubric is not None:
        inputs["reward_funcs"] = rubric
    if (environment := recipe.env.make()) is not None:
        if not kind.is_online:
            raise UserError(f"env: {kind.title} does not play in environments; leave the section out")
        inputs["env"] = environment
    inputs["args"] = args = fit.settle(recipe, args, inputs["train_dataset"], tokenizer)
    model = make_model(recipe.model, tokenizer, args)
    with _no_empty_folder(args.output_dir):
        return kind.trainer_class()(model, peft_config=lora_config(recipe.model), **inputs)


def read_args(kind: Method, recipe: Recipe, *, default_output: str, output_dir: str | None = None) -> Any:
    """The trainer's settings, those that stand in other sections among them."""
    settings = _settings(kind, recipe)
    if recipe.eval.every is not None:
        _join(settings, kind.section, "eval_strategy", "steps", "eval.every", default=None)
        _join(settings, kind.section, "eval_steps", recipe.eval.every, "eval.every", default=None)
    return _config(kind.config_class(), kind.section, settings, recipe.model, default_output, output_dir)


def read_drawing(kind: Method, recipe: Recipe) -> Any:
    """An online trainer's settings as far as they say how completions are drawn and scored. How it trains, and what its
    machine could do, is left at the defaults: the completions may be wanted on another one."""
    import torch

    given = _settings(kind, recipe)
    settings = {name: given[name] for name in DRAWING if name in given}
    if torch.cuda.is_available():  # bf16 is the default where a GPU supports it
        settings |= {name: value for name, value in (("bf16", False), ("fp16", True)) if given.get(name) is value}
    return _config(kind.config_class(), kind.section, settings, recipe.model, "runs/eval", None)


def _settings(kind: Method, recipe: Recipe) -> dict[str, Any]:
    """The trainer's section; for an online one with what the sections engine and env say."""
    settings = read_settings(kind.section, getattr(recipe, kind.section), kind.config_class(), kind.title)
    if kind.is_online:
        _join(settings, kind.section, "engine", recipe.engine.kind, "engine.kind", default="local")
        for name, value in recipe.env.settings().items():
            _join(settings, kind.section, name, value, f"env.{name}", default=None)
    return settings


def make_rubric(recipe: Recipe) -> Rubric:
    if not recipe.rubric:
        raise UserError("the recipe has no rubric: name a preset (rubric: [arithmetic]) or your own function (rubric: [my_rewards.py:is_right])")
    return Rubric(*map(_scorer, recipe.rubric))


def _scorer(entry: Any) -> Any:
    """A reward of the library or of a file, or a trained reward model by its directory or hub name."""
    named = entry if isinstance(entry, dict) else {"reward": entry}
    if not names_model(named.get("reward")):
        return Rubric.from_config([entry])
    if unknown := sorted(named.keys() - {"reward", "weight", "tokenizer"}):
        raise UserError(f"rubric: {unknown[0]} is not a setting of a reward model; it has a weight and a tokenizer")
    from posttrain.models.load import load_tokenizer
    from posttrain.trainers.online.reward_model import ModelReward

    tokenizer = None if named.get("tokenizer") is None else load_tokenizer(named["tokenizer"])
    return ModelReward(named["reward"], tokenizer), named.get("weight", 1.0)


def make_tokenizer(model: ModelSection, raw: Any) -> PreTrainedTokenizerBase:
    """The model's own, or for a model from scratch one trained on the text of the data."""
    if model.tokenizer is None:
        from posttrain.models.load import load_tokenizer

        return load_tokenizer(needed(model.name, "model.name"))
    from posttrain.data.tokenizer import train_bpe

    return train_bpe((text for row in raw for value in row.values() for text in _texts(value)), model.tokenizer.vocab_size)


def _texts(value: Any) -> Iterator[str]:
    """All text in a value: itself, or what its messages say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner.get("content", inner.get("value", inner.get("text"))) if isinstance(inner, dict) else inner)


def fill(raw: Any, data: DataSection, tokenizer: Any, rubric: Rubric | None = None) -> Rows:
    """The rows with the recipe's templates filled; the rubric's columns are checked before that costs anything."""
    template = Template(data.prompt, data.templates(), data.system)
    rows = template.apply(raw, chat=bool(tokenizer.chat_template))
    if rubric is not None:
        rubric.check_columns(rows[0])
    return rows


def evaluation_rows(recipe: Recipe, tokenizer: Any, rubric: Rubric | None = None) -> Rows:
    raw = chosen(load_rows(needed(recipe.eval.data, "eval.data")), recipe.eval)
    return fill(raw, recipe.data, tokenizer, rubric)


def chosen(rows: Any, section: EvalSection) -> Any:
    """`samples` of the rows, always the same ones."""
    if section.samples is None or section.samples >= len(rows):
        return rows
    if section.samples < 1:
        raise UserError(f"eval.samples={section.samples}: use 1 or more")
    return [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), section.samples))]


def make_engine(args: Any, tokenizer: Any) -> Engine:
    """The engine of an online trainer, in its precision."""
    from posttrain.rollout import engines

    return engines.make_engine(args.engine, tokenizer, autocast_dtype=args.autocast_dtype, max_slots=args.most_completions)


def make_model(section: ModelSection, tokenizer: Any, args: Any) -> str | PreTrainedModel:
    """The model's name, which the trainer loads; or a model in 4 bits, or one with random weights. `args`: the
    trainer's settings."""
    if section.load_in_4bit:
        from posttrain.models.adapter_files import is_adapter
        from posttrain.models.load import load_model
        from posttrain.models.quantise import in_4bit

        name = needed(section.name, "model.name")
        if is_adapter(name):
            raise UserError(f"model.name: {name} holds adapters, and model.lora asks for new ones; merge them first (`posttrain export`)")
        quantised = in_4bit(name, has_adapters=True, keep_in_16bit=section.keep_in_16bit)
        return load_model(name, **args.loading(name, lora_config(section)) | quantised)
    if section.from_scratch is None:
        return needed(section.name, "model.name")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.seeding import seeded

    settings = dict(section.from_scratch)
    kind = settings.pop("model_type", "qwen3")
    try:
        known = AutoConfig.for_model(kind).to_dict()
    except ValueError as error:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        raise UserError(f"model.from_scratch.model_type: {kind} is not known to transformers.{nearest(str(kind), CONFIG_MAPPING_NAMES)}") from error
    for key in settings:
        if key not in known:
            raise UserError(f"model.from_scratch.{key} is not a setting of {kind}.{nearest(str(key), known, 'model.from_scratch.')}")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    dtype = getattr(torch, _dtype(section) or "float32")
    with seeded(args.seed):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**ids, **settings}), dtype=dtype)


def loading(name: str, recipe: Recipe | None = None) -> dict[str, Any]:
    """What `load_model` is told to load the model `name` as the run that left it has it, adapters on what they were
    trained beside.

    recipe: for what no run left. It says all about the model that it starts from, and of another one the dtype only.
    """
    from posttrain.models.adapter_files import base_of, is_adapter
    from posttrain.models.load import with_new_names
    from posttrain.models.precision import beside_adapters, default_autocast

    run, base = runs.run_of(name), base_of(name) if is_adapter(name) else name
    recipe = recipe if run is None else run.recipe
    if recipe is None:
        return {}
    method = None if run is None else runs.method_of(str(run.directory))
    told = [
        getattr(recipe, of_method) for known, of_method in METHODS.sections().items() if method is None or METHODS[known].recorded_as == method
    ]  # without a record: any
    section = recipe.model
    options: dict[str, Any] = {"dtype": _dtype(section) or ("float32" if base == name else beside_adapters(name, default_autocast()))}
    starts_from_it = section.name == absolute(base)
    if run is None and not starts_from_it:
        return options
    options["trust_remote_code"] = any(given.get("trust_remote_code") for given in told)
    if not section.load_in_4bit:
        for given in told:
            options |= with_new_names(given.get("model_init_kwargs") or {})
    elif base != name or starts_from_it:
        from posttrain.models.quantise import in_4bit

        options |= in_4bit(base, has_adapters=True, keep_in_16bit=section.keep_in_16bit)
    return options


def lora_config(section: ModelSection) -> Any:
    if section.lora is None:
        return None
    from peft import LoraConfig

    lora = section.lora
    try:
        return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:  # PEFT's
        raise UserError(f"model.lora: {str(error).splitlines()[0]}") from error


def _config(cls: Any, section: str, settings: dict[str, Any], model: ModelSection, default_output: str, output_dir: str | None) -> Any:
    settings.setdefault("output_dir", default_output)
    if output_dir is not None:
        settings["output_dir"] = output_dir
    if model.dtype is not None:
        from posttrain.models.load import with_new_names

        settings["model_init_kwargs"] = {"dtype": _dtype(model), **with_new_names(settings.get("model_init_kwargs") or {})}
    try:
        return cls(**settings)
    except UserError as error:
        raise UserError(f"{section}: {error}") from error
    except (ValueError, TypeError) as error:  # transformers' own checks
        raise UserError(f"{section}: {error}") from error


def _join(settings: dict[str, Any], section: str, key: str, value: Any, where: str, *, default: Any) -> None:
    """Put another section's setting into the trainer's; both may not disagree."""
    if key in settings and settings[key] != value and value != default:
        raise UserError(f"{section}.{key}={settings[key]} and {where}={value} say two things; leave {section}.{key} out")
    settings.setdefault(key, value)


def _dtype(section: ModelSection) -> str | None:
    if section.dtype is not None and section.dtype not in DTYPES:
        raise UserError(f"model.dtype: {section.dtype} is not known; use one of {', '.join(DTYPES)}.{nearest(section.dtype, DTYPES)}")
    return section.dtype


def needed(value: Any, where: str) -> Any:
    if value is None:
        raise UserError(f"the recipe does not say {where}; give it there or as --{where}=...")
    return value


@contextlib.contextmanager
def _no_empty_folder(output_dir: str) -> Iterator[None]:
    """A trainer makes its folder before it has checked everything: what is refused leaves none behind."""
    existed = Path(output_dir).exists()
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # not empty: then it is not ours to remove
                Path(output_dir).rmdir()
        raise
