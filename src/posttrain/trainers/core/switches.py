"""A trainer's settings as a job of the plan, and the memory switches that nobody has set, chosen for the device that it
trains on.

The command line chooses before the model is loaded, from the recipe; a trainer chooses for itself where nothing was
chosen yet. Both come here, so that a run has what its plan said. `memory/choice.py` says which set of switches is the
cheapest.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.characters import encodable
from posttrain.errors import UserError
from posttrain.memory.advice import shortfall
from posttrain.memory.cards import free_memory
from posttrain.memory.choice import Choice, choose
from posttrain.memory.job import OPTIMIZERS, TrainingJob
from posttrain.memory.shapes import Shape, shape_of
from posttrain.models.head import base_model
from posttrain.models.load import is_quantised
from posttrain.ops.precision import multiplies_natively
from posttrain.sizes import MICRO_BATCH_TOKENS
from posttrain.tracking.recorder import Recorder
from posttrain.trainers.core.config import AUTOMATIC, NOT_SET, SWITCHED_OFF, BaseConfig
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.online.config import OnlineConfig

logger = logging.getLogger(__name__)

LOOKED_AT = 2000  # rows, for the longest
TRAINED = ("prompt", "completion", "text", "messages", "chosen", "rejected")  # columns that become tokens
TOUCH_BITS = ("tile_rows", "max_tokens_per_micro_batch", "max_concurrent_completions")  # sums are taken in another order
Lengths = tuple[int, int, int | None]  # tokens of prompt and completion; of all rows of an update, where they are few


@dataclass(frozen=True)
class Weights:
    """What is loaded, as far as memory goes."""

    shape: Shape
    dtype: str  # of what is not in 4 bits
    lora_r: int | None = None  # None: every weight is trained
    lora_targets: tuple[str, ...] | None = None  # None: all linear layers
    load_in_4bit: bool = False
    keep_in_16bit: int = 0  # bytes that linear layers which are not quantised take more


def weights_of(model: nn.Module) -> Weights:
    """Of a model that is loaded, with its adapters. Raises UserError for an architecture that is not modelled."""
    base = base_model(model)
    shape = shape_of(base.config.to_dict(), type(base).__name__)
    dtype = str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    adapters = getattr(model, "peft_config", {})  # only PEFT's models have adapters
    if not adapters:
        return Weights(shape, dtype, load_in_4bit=is_quantised(model))
    lora = next(iter(adapters.values()))
    names = {str(name).rpartition(".")[2] for name in lora.target_modules} if isinstance(lora.target_modules, (list, set, tuple)) else set()
    linears = {linear.name for linear in shape.linears}
    targets = None if not names or linears <= names else tuple(sorted(names))
    return Weights(shape, dtype, getattr(lora, "r", 8), targets, is_quantised(model))  # kinds of adapters without a rank are about as small


def job_of(args: BaseConfig, weights: Weights, lengths: Lengths, device: str | None = None) -> TrainingJob:
    """What a trainer with these settings does, every switch that nobody has set turned off. device: "cpu" or "cuda";
    None: the one it trains on.

    Raises UserError for an optimizer that the plan does not know.
    """
    prompt, completion, total = lengths
    device = device or ("cuda" if args.device.type == "cuda" else "cpu")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in OPTIMIZERS:
        raise UserError(f"optim={optim} is not known to the plan")
    online = args if isinstance(args, OnlineConfig) else None
    generations = online.num_generations if online else 2 if args.learns_from_pairs else 1
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * generations
    budget = args.token_budget if total is None else max(prompt + completion, min(args.token_budget, total))
    switches = ("gradient_checkpointing", "activation_offloading", "tile_rows")
    given = {name: getattr(args, name) for name in switches} | {"gradient_checkpointing": args.asked_checkpointing}
    set_by_user = {name: SWITCHED_OFF[name] if name in args.automatic else given[name] for name in switches}
    return TrainingJob(
        weights.shape,
        prompt_length=prompt,
        completion_length=completion,
        generations=generations,
        rollout_size=int(online.generation_batch_size or 1) // args.world_size if online else rows,
        is_online=online is not None,
        keeps_groups=args.learns_from_pairs,
        lora_r=weights.lora_r,
        lora_targets=weights.lora_targets,
        load_in_4bit=weights.load_in_4bit,
        keep_in_16bit=weights.keep_in_16bit,
        dtype=weights.dtype,
        adapter_dtype=args.adapter_dtype,
        bf16=bool(args.bf16 or args.fp16),
        optim=optim,
        gradient_checkpointing=bool(set_by_user["gradient_checkpointing"]),
        activation_offloading=bool(set_by_user["activation_offloading"]),
        tile_rows=set_by_user["tile_rows"],
        max_tokens_per_micro_batch=budget if budget != MICRO_BATCH_TOKENS else None,
        max_concurrent_completions=online.most_completions if online else 1,
        has_reference=args.holds_reference,
        has_known_gradient=args.knows_gradient,
        device=device,
        emulates_bf16=device == "cpu" and weights.dtype == "bfloat16" and not multiplies_natively(torch.bfloat16, "cpu"),
    )


def longest(args: BaseConfig, rows: Any, tokenizer: Any) -> Lengths:
    """Of the first rows; where completions are in the data, also what an update's rows have together, on average.

    rows: of the data, or tasks with a `prompt`. Of a stream nothing is read: its rows count as long as they may be.
    Raises UserError for no rows.
    """
    limit = getattr(args, "max_length", None)  # online trainers have max_completion_length instead
    if not isinstance(rows, Sized):
        return 1, max(1, (limit or MICRO_BATCH_TOKENS) - 1), None
    looked_at = [rows[index] for index in range(min(LOOKED_AT, len(rows)))]  # type: ignore[index]
    if not looked_at:
        raise UserError("the data have no rows")
    if isinstance(args, OnlineConfig):
        prompts = [row["prompt"] if isinstance(row, dict) else row.prompt for row in looked_at]
        return max(_tokens(max(prompts, key=_letters), tokenizer), 1), args.sampling(()).max_new_tokens, None
    looked_at = [{name: value for name, value in row.items() if name in TRAINED} for row in looked_at]
    letters = [sum(map(_letters, row.values())) for row in looked_at]
    row = looked_at[letters.index(max(letters))]
    prompt = _tokens(row.get("prompt"), tokenizer)
    others = [_tokens(value, tokenizer) for name, value in row.items() if name != "prompt"]
    completion = max([1, *others])
    if limit is not None:
        prompt = min(prompt, limit - 1)
        completion = min(completion, limit - prompt)
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if getattr(args, "packing", False):  # only SFT packs
        return max(prompt, 1), max(completion, 1), update * int(limit or 0)
    mean = sum(letters) / len(letters) / max(*letters, 1)  # of a row, as a share of the longest
    return max(prompt, 1), max(completion, 1), int(update * mean * (prompt + sum(others)))


def _letters(value: Any) -> int:
    """Of all text in a value: itself, or what its messages say."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Sequence):
        return sum(_letters(inner.get("content", inner.get("text")) if isinstance(inner, dict) else inner) for inner in value)
    return 0


def _tokens(value: Any, tokenizer: Any) -> int:
    if isinstance(value, str):
        return len(tokenizer(encodable(value), add_special_tokens=False)["input_ids"])  # what cannot be encoded is refused by its row
    if isinstance(value, Sequence):
        return sum(_tokens(inner.get("content", inner.get("text")) if isinstance(inner, dict) else inner, tokenizer) for inner in value)
    return 0


def choose_for(args: BaseConfig, job: TrainingJob, held: int = 0) -> Choice:
    """For the device of these settings as it is now. held: bytes of the model that are there already. Processes that
    train together choose for the one that has least."""
    device = args.device.type
    limit, host = (free_memory(device), free_memory("cpu")) if device in ("cuda", "cpu") else (None, None)
    if limit is not None and device == "cpu":
        limit //= args.world_size  # they share it; those of other machines too, but nobody trains over machines without a GPU
    names = set(args.automatic)
    if device == "cuda" and torch.cuda.get_device_properties(args.device).is_integrated:
        names.discard("activation_offloading")  # its memory is the host's
    limits = [one for one in gather_json(None if limit is None else limit + held, args.device) if one is not None]
    return choose(job, names, min(limits) if limits else None, None if host is None else host // args.world_size)


def settled(args: BaseConfig, choice: Choice | str) -> Any:
    """A copy of the settings with every automatic one made definite. choice: or why nothing could be planned; then
    nothing is switched on."""
    definite = copy.copy(args)
    definite.name_checkpointing(args.asked_checkpointing)
    definite.memory, definite.chosen = choice, args.automatic
    chosen = {} if isinstance(choice, str) else choice.settings
    for name in definite.chosen:
        set_switch(definite, name, chosen.get(name, SWITCHED_OFF[name]))
    return definite


def set_switch(args: BaseConfig, name: str, value: Any) -> None:
    setattr(args, name, value)
    if name == "gradient_checkpointing":
        args.name_checkpointing(value)


def as_stored(args: BaseConfig, stored: Mapping[str, Any]) -> bool:
    """What was chosen and touches the numbers' last bits becomes what the run has had (`stored`: a checkpoint's
    settings); the other switches are chosen anew beside it. Returns whether anything changed."""
    pinned = {name: stored[name] for name in TOUCH_BITS if name in args.chosen and name in stored}
    if all(getattr(args, name) == value for name, value in pinned.items()):
        return False
    for name, value in pinned.items():
        set_switch(args, name, value)
    if not isinstance(args.memory, str):
        _choose_the_rest(args, args.memory, pinned)
    return True


def _choose_the_rest(args: BaseConfig, before: Choice, pinned: dict[str, Any]) -> None:
    job = before.before.but(**{name: value for name, value in pinned.items() if value is not None or name == "tile_rows"})
    choice = choose(job, [name for name in before.open if name not in pinned], before.limit, before.host_limit)
    args.memory = replace(choice, before=before.before, open=before.open)
    for name in choice.open:
        set_switch(args, name, choice.settings.get(name, SWITCHED_OFF[name]))


def memory_line(args: BaseConfig) -> str | None:
    """What was chosen, in a sentence; None where there is nothing to say: nothing was switched on, and there is no
    GPU."""
    choice = args.memory
    if isinstance(choice, str) or choice is None or choice.limit is None:
        return None
    if args.device.type != "cuda" and not choice.settings and choice.fits:
        return None
    place = "the GPU" if args.device.type == "cuda" else "this machine"
    missing = None if choice.fits else shortfall(choice.job, choice.limit, place)
    return f"memory: {choice.line()}" + (f"\nit does not fit: {missing}" if missing else "")


class MemoryNote(TrainerCallback):
    """What was chosen, in the run's record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert isinstance(args, BaseConfig)
        if line := memory_line(args):
            self._recorder.note("memory", line)


def settled_for(args: BaseConfig, model: nn.Module, rows: Any, tokenizer: Any) -> Any:
    """`settled`, for a model that is loaded; the settings themselves where the command line has chosen already for this
    trainer."""
    if args.memory is not None and not args.in_use:
        args.in_use = True
        return args
    definite = _chosen_for(reopened(args) if args.in_use else args, model, rows, tokenizer)
    definite.in_use = True
    return definite


def reopened(args: BaseConfig) -> Any:
    """A copy of another trainer's settings in which nothing is chosen yet: that was for its model and its rows."""
    again = copy.copy(args)
    again.memory, again.chosen, again.in_use = None, (), False
    for name in args.chosen:
        set_switch(again, name, NOT_SET.get(name, (AUTOMATIC,))[0])
    return again


def _chosen_for(args: BaseConfig, model: nn.Module, rows: Any, tokenizer: Any) -> Any:
    try:
        job = job_of(args, weights_of(model), longest(args, rows, tokenizer))
    except UserError as error:
        logger.info("memory was not planned: %s", error)
        return settled(args, str(error))
    return settled(args, choose_for(args, job, _held(args, model)))


def _held(args: BaseConfig, model: nn.Module) -> int:
    """Bytes that this process has of the device already: the plan counts them too."""
    if args.device.type == "cuda":
        return int(torch.cuda.memory_reserved(args.device))
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.device.type == args.device.type)
