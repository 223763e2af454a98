"""What all trainers' settings share: transformers' TrainingArguments with our defaults, and names that are never
ignored.

A setting that another library has and this one does not is refused with a sentence (see `settings`), never silently
dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from posttrain.errors import UserError, did_you_mean
from posttrain.models.adapter_files import is_adapter
from posttrain.models.load import with_new_names
from posttrain.models.precision import beside_adapters
from posttrain.ops.precision import multiplies_natively
from posttrain.secrets import redacted
from posttrain.sizes import MICRO_BATCH_TOKENS
from posttrain.trainers.core import checks
from posttrain.trainers.core.unused import EVERYWHERE, Table, renamed, say_fields, without_foreign

Config = TypeVar("Config", bound="BaseConfig")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its one documentation; --help and the docs are made from it."""
    return field(default=default, metadata={"help": help})


def settings(cls: type[Config]) -> type[Config]:
    """For a dataclass of settings: its constructor answers unknown or refused names in a sentence.

    `refused` on the class maps a foreign name to (the value at which it changes nothing, why it is refused and what to
    use). At that value the name is accepted, so scripts that spell out the default go on working. Names in `unused` are
    accepted at any value, with a line that says what is done instead; the object keeps the value for scripts that read
    it.
    """
    known = {f.name for f in fields(cls) if f.init}
    construct: Callable[..., None] = cls.__init__

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        own, foreign = without_foreign(cls, renamed(cls.in_own_words(kwargs), known), known)
        construct(self, *args, **checks.checked(cls, own))
        for name, value in foreign.items():
            setattr(self, name, value)

    cls.kinds = checks.kinds_of(cls)
    cls.types = {known.name: str(known.type) for known in fields(cls) if known.init}
    checks.as_text_for_parsers(cls)
    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


AUTOMATIC = "auto"
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # one setting, by its older and its newer name
NOT_SET: dict[str, tuple[Any, ...]] = {"max_tokens_per_micro_batch": (None,)}  # other values that leave a setting open
# Settings that are chosen where nobody sets them (memory/choice.py), and what they are where nothing has to be saved.
SWITCHED_OFF: dict[str, Any] = {
    "gradient_checkpointing": False,
    "activation_offloading": False,
    "tile_rows": None,
    "max_tokens_per_micro_batch": None,
    "max_concurrent_completions": 256,
}
ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NO_EFFECT = {  # settings of transformers that no trainer here reads: name -> (values at which that is no loss, what to do)
    "train_sampling_strategy": (
        ("random", "group_by_length"),
        "set shuffle_dataset=False to keep the order of the data; lengths need no grouping, since nothing is padded",
    ),
    "label_smoothing_factor": ((0.0,), "only SFT smooths its targets (DPO and CPO have label_smoothing); leave it out"),
    "neftune_noise_alpha": ((None, 0.0), "only SFT adds noise to embeddings; leave it out"),
}
_NOT_TAKEN = ("remove_unused_columns", "logging_nan_inf_filter", "report_to")  # defaults of transformers that a trainer here has otherwise
_SHARDED = "sharding over devices is not built yet; use plain data parallelism (`accelerate launch`), or one device"


@settings
@dataclass
class BaseConfig(TrainingArguments):
    """Defaults that differ from transformers', and settings of the run directory."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = {}
    unused: ClassVar[Table] = EVERYWHERE
    types: ClassVar[dict[str, str]] = {}  # setting -> its annotation, as it is written
    kinds: ClassVar[dict[str, frozenset[str]]] = {}  # setting -> what its annotation names
    no_effect: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = _NO_EFFECT
    # The least value of a setting, where one is given.
    lowest: ClassVar[dict[str, float]] = {"max_tokens_per_micro_batch": 1, "record_tokens_of": 0, "record_megabytes": 0}

    output_dir: str | None = setting("runs/run", "Where checkpoints, the record and summary.json go.")
    logging_steps: float = setting(1, "Log every so many steps.")
    bf16: bool | None = setting(  # type: ignore[assignment]
        None,
        "bf16 autocast over the loaded weights. Default: on where a GPU supports it. A processor that only emulates bf16 computes in float32 instead.",
    )
    report_to: str | list[str] | None = setting("none", "Other trackers (wandb, tensorboard, trackio). The run's own record is always kept.")
    remove_unused_columns: bool = setting(False, "Columns are kept: rewards may ask for them.")
    logging_nan_inf_filter: bool = setting(False, "Must stay off: a loss that is not finite stops training instead of being hidden.")
    restore_callback_states_from_checkpoint: bool = setting(
        True, "Callbacks that count, such as early stopping, go on where they were. False: they begin anew, as transformers has it."
    )
    disable_dropout: bool = setting(False, "Set every dropout in the model to 0.")
    trust_remote_code: bool = setting(False, "Run code that a model repository ships. Off unless you trust its author.")
    model_init_kwargs: dict[str, Any] | None = setting(
        None, "Keywords for from_pretrained when the model is given by name, e.g. {'dtype': 'bfloat16'}."
    )
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "Token budget of one forward and backward. Changes memory and speed, never the result. Default: 4096 or the longest single stream; less where "
        "that would not fit.",
    )
    gradient_checkpointing: bool | str | None = setting(  # type: ignore[assignment]
        "auto", "Keep only the input of each layer and compute the layer again in the backward. 'auto': where the job does not fit without it."
    )
    activation_offloading: bool | str = setting(
        "auto",
        "Keep what the forward saves for the backward in host memory. 'auto': where the job does not fit without it. No effect on a CPU.",
    )
    tile_rows: int | str | None = setting(
        "auto",
        "Compute norms, MLPs and projections so many rows at a time: less memory for long streams, slower. None: all at once. 'auto': 2048 where the "
        "job does not fit without it.",
    )
    adapter_dtype: str = setting(
        "float32", "Of the adapters made from peft_config: 'float32' masters, or 'bfloat16' at half the memory, where small updates may round away."
    )
    memory_check: bool = setting(True, "Commands refuse, before the model is loaded, what `posttrain plan` says cannot fit the device.")
    # How the memory switches were chosen (trainers/core/switches.py). None: nothing was chosen yet; text: why nothing
    # could be planned.
    memory: Any = field(init=False, default=None, repr=False)
    chosen: tuple[str, ...] = field(init=False, default=(), repr=False)  # the settings that were automatic until then
    in_use: bool = field(init=False, default=False, repr=False)  # a trainer has them: another one chooses anew
    record_tokens_of: int = setting(4, "Record per-token log-probs, ratios, entropies and KLs of this many groups a step.")
    record_megabytes: int = setting(512, "Size cap of the per-token records of a run.")

    learns_from_pairs: ClassVar[bool] = False  # both completions of a prompt meet in the loss

    @classmethod
    def in_own_words(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the constructor, with those that say in another way what settings here say."""
        return given

    @property
    def holds_reference(self) -> bool:
        """Whether a frozen copy of a model that is trained whole is held beside it."""
        return False

    @property
    def knows_gradient(self) -> bool:
        """What `BaseTrainer.known_grad` will find, from the settings alone: the gradient of the log-probs does not
        depend on them."""
        return False

    @property
    def automatic(self) -> tuple[str, ...]:
        """The settings among `SWITCHED_OFF` that nobody has set, until they are chosen."""
        if self.memory is not None:
            return ()
        values = {name: getattr(self, name) for name in SWITCHED_OFF if name in self._known()} | {"gradient_checkpointing": self.asked_checkpointing}
        return tuple(name for name, value in values.items() if value in (AUTOMATIC, *NOT_SET.get(name, ())))

    def name_checkpointing(self, value: Any) -> None:
        """Newer versions of transformers have a second name for gradient_checkpointing, and read that one."""
        self.gradient_checkpointing = value
        if "activation_checkpointing" in self._known():
            self.activation_checkpointing = value

    @property
    def asked_checkpointing(self) -> bool | str:
        """What was asked for under either name; scripts change one of them on a config that they were given. Raises
        UserError for anything else."""
        newer = getattr(self, "activation_checkpointing", None)  # None: not set, or a version that does not have it
        asked = newer if newer not in (None, AUTOMATIC) else self.gradient_checkpointing
        asked = AUTOMATIC if asked is None else asked
        if asked not in (True, False, AUTOMATIC):
            raise UserError(f"gradient_checkpointing={asked!r}: use True, False or 'auto'")
        return asked

    @classmethod
    def _known(cls) -> set[str]:
        return {known.name for known in fields(cls)}

    @property
    def token_budget(self) -> int:
        """Stream tokens of one micro-batch."""
        return self.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """Without secrets, nested ones too: trackers, records and manifests are made from it."""
        values: dict[str, Any] = redacted(super().to_dict())
        return values

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What forwards compute in; None: in the dtype of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def loading(self, name: str, peft_config: Any = None) -> dict[str, Any]:
        """What `load_model` is told for a model by its name: model_init_kwargs, and beside adapters (new ones, or those
        in `name`) the dtype."""
        given: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "seed": self.seed, **(self.model_init_kwargs or {})}
        if "dtype" not in given and (peft_config is not None or is_adapter(name)):
            given["dtype"] = beside_adapters(name, self.autocast_dtype, peft_config)
        return given

    def __post_init__(self) -> None:
        for name, value in checks.checked(type(self), {name: getattr(self, name) for name in self.kinds}).items():
            setattr(self, name, value)
        if self.model_init_kwargs is not None:
            self.model_init_kwargs = with_new_names(self.model_init_kwargs)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.bf16 and (self.use_cpu or not torch.accelerator.is_available()) and not multiplies_natively(torch.bfloat16, "cpu"):
            self.bf16 = False  # float32 is exacter, and several times faster there
        say_fields(self)
        checkpoints = self.asked_checkpointing
        self.name_checkpointing(checkpoints is True)  # transformers knows no "auto"
        for name, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
            names = [each.value for each in known]
            value = str(getattr(getattr(self, name), "value", getattr(self, name)))
            if value not in names:
                raise UserError(f"{name}={value!r} is unknown.{did_you_mean(value, names)}")
        try:
            super().__post_init__()
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
        self.name_checkpointing(checkpoints)
        for name, lowest in self.lowest.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and value < lowest:
                raise UserError(f"{name}={value}: set it to {lowest} or more")
        for name, (harmless, why) in self.no_effect.items():
            if getattr(self, name) not in harmless:
                raise UserError(f"{name}={getattr(self, name)!r} would have no effect: {why}")
        if self.logging_nan_inf_filter:
            raise UserError("logging_nan_inf_filter hides a loss that is not finite; leave it at False")
        if self.fsdp or self.deepspeed:
            raise UserError(f"{'fsdp' if self.fsdp else 'deepspeed'}: {_SHARDED}")
        if self.activation_offloading not in (False, True, "auto"):
            raise UserError(f"activation_offloading={self.activation_offloading!r}: use True, False or 'auto'")
        if self.tile_rows not in (None, "auto") and not (isinstance(self.tile_rows, int) and self.tile_rows >= 1):
            raise UserError(f"tile_rows={self.tile_rows!r}: use a number of rows, 1 or more, or 'auto'")
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise UserError(f"adapter_dtype={self.adapter_dtype!r}: use {' or '.join(map(repr, ADAPTER_DTYPES))}")
        if self.auto_find_batch_size:
            raise UserError("auto_find_batch_size would change the batch in silence; set max_tokens_per_micro_batch, which changes memory only")


def as_config(args: TrainingArguments | None, cls: type[Config]) -> Config:
    """A trainer's settings from what a script hands over: none, the trainer's own, or transformers' TrainingArguments,
    whose fields are taken.

    Of those, what must stay off here is taken only where it was changed. Raises UserError for another trainer's
    settings.
    """
    if args is None:
        return cls()
    if isinstance(args, cls):
        return args
    if isinstance(args, BaseConfig) or not isinstance(args, TrainingArguments):
        raise UserError(f"args is a {type(args).__name__}; this trainer takes a {cls.__name__}, or transformers' TrainingArguments")
    own = {known.name: known.default for known in fields(TrainingArguments) if known.init}
    left = {name for name in _NOT_TAKEN if getattr(args, name) == own[name]}
    left |= {name for name in CHECKPOINTING if name in own and not getattr(args, name)}  # which nobody has set there, or has left at its default
    return cls(**{name: getattr(args, name) for name in own.keys() & cls.kinds.keys() if name not in left})


def refuse(reasons: dict[str, str], given: dict[str, Any]) -> None:
    """Raise UserError for the first argument of `reasons` that was given."""
    for name, why in reasons.items():
        if given[name] is not None:
            raise UserError(f"{name}: {why}")
