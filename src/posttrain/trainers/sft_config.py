"""The settings of supervised fine-tuning, under TRL's names. What is not built, or could change nothing, is refused with a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from posttrain.data.examples import ExampleOptions
from posttrain.errors import UserError, did_you_mean
from posttrain.losses.sft import LOSSES
from posttrain.trainers.core.config import BaseConfig, setting, settings

PACKING_STRATEGIES = ("bfd", "bfd_split")


@settings
@dataclass
class SFTConfig(BaseConfig):
    """per_device_train_batch_size counts examples; with `packing`, bins of examples of at most max_length tokens together."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = {
        "dataset_kwargs": (None, "rows are always prepared here; give text or messages, or subclass SFTTrainer"),
        "dataset_num_proc": (None, "rows are tokenised in this process; leave it out"),
        "truncation_mode": ("keep_start", "what is too long loses its end (the setting is deprecated in TRL too); leave it out"),
        "pad_to_multiple_of": ("auto", "streams have no padding; leave it out"),
        "pad_token": (None, "streams have no padding; set tokenizer.pad_token if the exported model shall have another"),
        "eval_packing": (None, "an evaluation is a mean over tokens, which packing does not change; leave it out"),
        "router_aux_loss_coef": (None, "the auxiliary loss of mixture-of-experts routers is not built; leave it out"),
    }

    no_effect: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        name: why for name, why in BaseConfig.no_effect.items() if name not in ("label_smoothing_factor", "neftune_noise_alpha")
    }

    learning_rate: float = setting(2e-5, "AdamW's learning rate.")
    max_length: int | None = setting(1024, "Longer examples are cut at their end; None keeps them whole. With packing: the size of a bin.")
    shuffle_dataset: bool = setting(True, "A new order each epoch, drawn from (seed, epoch). A stream is shuffled within 1,000 rows.")
    loss_type: str = setting("nll", "nll: negative log-likelihood (chunked_nll is the same here). dft: each token weighted by its own probability.")
    completion_only_loss: bool | None = setting(
        None, "Train on the completion only. Default: where rows have prompt and completion. False trains on the prompt too."
    )
    assistant_only_loss: bool = setting(
        False, "Train only on what the assistant writes in a conversation. Found by rendering, so any chat template will do."
    )
    packing: bool = setting(False, "Fill bins of max_length tokens with whole examples; a batch counts bins. No example attends to another.")
    packing_strategy: str = setting("bfd", "bfd: best fit, the longest first; too long examples are cut. bfd_split: they are split into several.")
    padding_free: bool = setting(True, "Streams never have padding, whatever this says: kept for scripts that set it.")
    dataset_text_field: str = setting("text", "The column of plain text, for data without prompts or messages.")
    eos_token: str | None = setting(None, "The token that ends a reply, e.g. '<|im_end|>'. Default: the tokenizer's.")
    chat_template_path: str | None = setting(
        None, "A chat template: a .jinja file, a tokenizer's directory or hub name, or one of ours for base models: plain, chatml."
    )
    reply_opening: str | None = setting(
        None, "With the template plain or chatml: text that opens every reply, e.g. '<start_working_out>', so that the model need not write it."
    )

    @property
    def knows_gradient(self) -> bool:
        return not self.fp16 and self.loss_type != "dft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing_strategy == "wrapped":
            raise UserError("packing_strategy='wrapped' cuts examples anywhere and joins them, so that they read each other; use bfd or bfd_split")
        for name, value, known in (("loss_type", self.loss_type, LOSSES), ("packing_strategy", self.packing_strategy, PACKING_STRATEGIES)):
            if value not in known:
                raise UserError(f"{name}={value!r} is not known; use one of {', '.join(known)}.{did_you_mean(str(value), known)}")
        if self.packing and self.max_length is None:
            raise UserError("packing fills bins of max_length tokens; give max_length")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length={self.max_length} leaves no token to predict; use 2 or more")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor={self.label_smoothing_factor} must be in [0, 1)")
        if self.label_smoothing_factor and self.loss_type == "dft":
            raise UserError("label_smoothing_factor and loss_type='dft' contradict each other: one flattens the targets, the other sharpens them")

    @property
    def examples(self) -> ExampleOptions:
        """What of a row is trained."""
        whole = self.packing and self.packing_strategy == "bfd_split"  # cut afterwards, into pieces
        return ExampleOptions(None if whole else self.max_length, self.dataset_text_field, self.completion_only_loss, self.assistant_only_loss)
