"""The dataclasses of TRL's scripts, with its names and defaults, and what scripts make of them: data, adapters,
quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


def _argument(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class DatasetConfig:
    """One dataset of a mixture: the arguments of `datasets.load_dataset`, the columns to keep, and its fraction of the
    mixture."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """Several datasets, one after the other. Raises UserError for an entry that is no dataset."""

    datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Datasets of the mixture: path, name, data_dir, data_files, split, columns, fraction."}
    )
    streaming: bool = _argument(False, "Read rows as they are needed.")
    test_split_size: float | None = _argument(None, "Fraction or number of rows that are kept for evaluation.")

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(given) for given in self.datasets]


@dataclass
class ScriptArguments:
    """Which dataset a script reads."""

    dataset_name: str | None = _argument(None, "A name on the hub, or a directory of data files.")
    dataset_config: str | None = _argument(None, "Which configuration of the dataset.")
    dataset_train_split: str = _argument("train", "Split to train on.")
    dataset_test_split: str = _argument("test", "Split to evaluate on.")
    dataset_streaming: bool = _argument(False, "Read rows as they are needed.")
    ignore_bias_buffers: bool = _argument(False, "Does nothing here: no buffer is broadcast.")


@dataclass
class ModelConfig:
    """Which model a script trains, in which precision, with which adapters."""

    model_name_or_path: str | None = _argument(None, "A directory or a name on the hub.")
    model_revision: str = _argument("main", "Branch, tag or commit on the hub.")
    dtype: str | None = _argument("float32", "Of the weights; 'auto': the checkpoint's.", choices=["auto", "bfloat16", "float16", "float32"])
    attn_implementation: str | None = _argument(None, "Does nothing here: attention is posttrain's own.")
    use_peft: bool = _argument(False, "Train LoRA adapters instead of the weights.")
    lora_r: int = _argument(16, "Rank of the adapters.")
    lora_alpha: int = _argument(32, "Their output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _argument(0.05, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = _argument(None, "Names of the layers to adapt.")
    lora_target_parameters: list[str] | None = _argument(None, "Names of parameters to adapt, for layers that are no linears.")
    lora_modules_to_save: list[str] | None = _argument(None, "Layers that are trained whole.")
    lora_task_type: str = _argument("CAUSAL_LM", "SEQ_CLS for reward models.")
    use_rslora: bool = _argument(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = _argument(False, "Weight-decomposed adapters (DoRA).")
    load_in_8bit: bool = _argument(False, "Frozen weights in 8 bits.")
    load_in_4bit: bool = _argument(False, "Frozen weights in 4 bits.")
    bnb_4bit_quant_type: str = _argument("nf4", "How 4 bits hold a weight.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = _argument(False, "Quantise the scales too.")
    bnb_4bit_quant_storage: str | None = _argument(None, "Dtype that the packed weights are stored in.")

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("load_in_8bit and load_in_4bit contradict each other; set one of them")
        targets = self.lora_target_modules
        if isinstance(targets, list) and len(targets) == 1 and not targets[0].isidentifier():
            self.lora_target_modules = targets[0]  # type: ignore[assignment] # "all-linear", or a pattern: PEFT wants those as text

    @property
    def torch_dtype(self) -> str | None:
        """The older name of dtype."""
        return self.dtype


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """The datasets one after the other as the split `train`, and with test_split_size a split `test`.

    With fractions, each gives its first rows, so many that none is repeated. Raises UserError where fractions cannot be
    kept.
    """
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    if not mixture_config.datasets:
        raise UserError("the mixture names no dataset; give `datasets`, a list of {path: ...}")
    parts: list[Any] = []
    for one in mixture_config.datasets:
        part = load_dataset(one.path, one.name, data_dir=one.data_dir, data_files=one.data_files, split=one.split, streaming=mixture_config.streaming)
        parts.append(part if one.columns is None else part.select_columns(one.columns))
    rows = concatenate_datasets(_by_fraction(parts, mixture_config))
    if mixture_config.test_split_size is None:
        return DatasetDict({"train": rows})
    return rows.train_test_split(test_size=mixture_config.test_split_size)


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The adapters that the arguments ask for; None where they ask for none."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How frozen weights are packed, for `quantization_config` of a trainer; None where they are not."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


def get_kbit_device_map() -> None:
    """None: a trainer puts the model where it trains."""
    return


def init_zero_verbose() -> None:
    """Does nothing: no library's logging is changed here."""


def _dataset_config(given: Any) -> DatasetConfig:
    if isinstance(given, DatasetConfig):
        return given
    try:
        return DatasetConfig(**given)
    except TypeError as error:
        raise UserError(f"datasets: {given!r} is no dataset; give path, and where needed name, data_files, split, columns or fraction") from error


def _by_fraction(parts: list[Any], mixture: DatasetMixtureConfig) -> list[Any]:
    fractions = [one.fraction for one in mixture.datasets]
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return parts
    if len(given) != len(parts) or mixture.streaming:
        raise UserError("fraction: give one for every dataset of the mixture or for none, and none with streaming")
    if min(given) < 0 or not sum(given):
        raise UserError(f"fraction: {given} must not be negative, nor all 0")
    shares = [fraction / sum(given) for fraction in given]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share)
    return [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]
