"""From a recipe to a plan: what the settings, the model's config and the longest rows say about memory. No model is
loaded.

`settle` is asked by every training command before the model is loaded: it chooses the memory switches that nobody has
set, and refuses what cannot fit (`memory_check: false` among the trainer's settings leaves that out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.cli.options import say
from posttrain.cli.recipe import ModelSection, Recipe
from posttrain.errors import UserError, did_you_mean
from posttrain.io import read_json
from posttrain.memory.advice import refuse_what_cannot_fit
from posttrain.memory.job import loaded_dtype
from posttrain.memory.shapes import Shape, find_shape, shape_of
from posttrain.methods import METHODS, Method
from posttrain.sizes import nf4_bytes


def settle(recipe: Recipe, args: Any, rows: Any, tokenizer: Any) -> Any:
    """The settings with every automatic memory switch made definite. Raises UserError, with the fix, for what cannot
    fit this machine. What cannot be planned is said in a line, and goes on with no switch on."""
    from posttrain.trainers.core.switches import choose_for, job_of, longest, settled

    device = args.device.type
    try:
        job = job_of(args, weights_of(recipe.model, args, vocab=len(tokenizer)), longest(args, rows, tokenizer))
    except UserError as error:
        if args.memory_check:
            say(f"memory was not checked: {error}", err=True)
        return settled(args, str(error))
    choice = choose_for(args, job)
    if args.memory_check and choice.limit is not None and not recipe.data.streaming:
        note = refuse_what_cannot_fit(choice.job, choice.limit, "the GPU" if device == "cuda" else "this machine")
        if note is not None:
            say(f"warning: {note}", err=True)
    return settled(args, choice)


def weights_of(section: ModelSection, args: Any, vocab: int | None = None) -> Any:
    """What the trainer will load (`trainers.switches.Weights`). vocab: of a model from scratch. Raises UserError for
    what is not modelled."""
    from posttrain.trainers.core.switches import Weights

    shape = shape_of_model(section, vocab)
    lora_r, targets = _adapters(section)
    known = [linear.name for linear in shape.linears]
    for name in targets or ():
        if name not in known:
            raise UserError(f"the plan knows adapters on linear layers only ({', '.join(known)}), not on '{name}'.{did_you_mean(name, known)}")
    given = section.dtype or (args.model_init_kwargs or {}).get("dtype")
    has_frozen_weights = lora_r is not None and section.from_scratch is None and _leave_their_base(section.name)
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if given == "auto":
        given = shape.dtype
    return Weights(
        shape,
        str(given).removeprefix("torch.") if given else loaded_dtype(shape.dtype, autocast, has_frozen_weights),
        lora_r,
        targets,
        section.load_in_4bit or _is_packed(section.name),
        _kept(section.keep_in_16bit, shape),
    )


def shape_of_model(section: ModelSection, vocab: int | None = None) -> Shape:
    """Of the model by its name, or of the config in `from_scratch` with a vocabulary of that size. Raises UserError
    where it is not known."""
    if section.from_scratch is None:
        from posttrain.models.adapter_files import base_of, is_adapter

        name = str(section.name)
        return find_shape(base_of(name) if is_adapter(name) else name)
    from transformers import AutoConfig

    settings = dict(section.from_scratch)
    kind = settings.pop("model_type", "qwen3")
    size = vocab if vocab is not None else section.tokenizer.vocab_size if section.tokenizer is not None else None
    config = AutoConfig.for_model(kind, **({} if size is None else {"vocab_size": size}) | settings)
    return shape_of(config.get_text_config().to_dict(), f"a {kind} from scratch")


def _adapters(section: ModelSection) -> tuple[int | None, tuple[str, ...] | None]:
    """Rank and target layers; None: no adapters, all linear layers."""
    if section.lora is not None:
        targets = section.lora.target_modules
        return section.lora.r, tuple(dict.fromkeys(str(name).rpartition(".")[2] for name in targets)) if isinstance(targets, list) else None
    config = Path(section.name or "") / "adapter_config.json"
    if section.name is None or not config.is_file():
        return None, None
    saved = read_json(config)
    targets = saved["target_modules"]
    names = tuple(dict.fromkeys(name.rpartition(".")[2] for name in targets)) if isinstance(targets, list) else None  # paths, for all-linear
    return saved["r"], names


def _leave_their_base(name: str | None) -> bool:
    """Whether the adapters that are saved there, if any are, let the weights beside them stay in 16 bits
    (`models.precision.beside_adapters`)."""
    from posttrain.models.adapter_files import is_adapter, settings_of
    from posttrain.models.initialisation import changes_the_base

    if name is None or not is_adapter(name):
        return True
    saved = settings_of(name)
    return saved.get("bias", "none") == "none" and not changes_the_base(saved.get("init_lora_weights"))


def _kept(given: int | list[str] | None, shape: Shape) -> int:
    """Further bytes of linear layers that are named, or the budget for them."""
    if given is None or isinstance(given, int):
        return given or 0
    weights = {linear.name: linear.weights for linear in shape.linears}
    names = [name.rpartition(".")[2] for name in given]
    return sum(2 * weights[name] - nf4_bytes(weights[name]) for name in names if name in weights)


def _is_packed(name: str | None) -> bool:
    """Whether a checkpoint is in 4 bits already."""
    config = Path(name or "") / "config.json"
    if name is None or not config.is_file():
        return "bnb-4bit" in str(name)
    return bool(read_json(config).get("quantization_config", {}).get("load_in_4bit"))


def kind_named(name: str) -> Method:
    """Raises UserError for a trainer that there is not."""
    if name not in METHODS:
        raise UserError(f"--trainer {name} is not known; use one of {', '.join(METHODS)}")
    return METHODS[name]
