"""Settings of the trainers that learn from completions in the data: DPO, KTO, ORPO, CPO. Each adds its objective in its
own file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from posttrain.errors import UserError, did_you_mean
from posttrain.trainers.core.config import BaseConfig, setting, settings
from posttrain.trainers.core.unused import EVERYWHERE, OFFLINE, Table

_TEXT_ONLY = "only decoder-only language models are trained; leave it out"
_GENERATE = "not built: `posttrain eval` and `posttrain sample` show what a model answers"

REFUSED: dict[str, tuple[Any, str]] = {
    "truncation_mode": ("keep_start", "a completion is cut at its end, a prompt never; leave it out"),
    "router_aux_loss_coef": (None, "the load-balancing loss of mixture-of-experts models is not added yet; leave it out"),
    "max_prompt_length": (None, "prompts are never cut; set max_length, and filter rows whose prompts leave no room"),
    "max_completion_length": (None, "max_length bounds a prompt with its completion; cut longer completions in the data"),
    "is_encoder_decoder": (None, _TEXT_ONLY),
    "generate_during_eval": (False, _GENERATE),
    "model_adapter_name": (None, "the reference is the model without its adapter; leave it out"),
    "ref_adapter_name": (None, "the reference is the model without its adapter; leave it out"),
    "force_use_ref_model": (False, "ref_model is used whenever it is given; leave it out"),
    "reference_free": (False, "use CPOTrainer: its losses need no reference"),
    "rpo_alpha": (None, "use loss_type=['sigmoid', 'sft'] with loss_weights=[1.0, rpo_alpha]"),
}


@settings
@dataclass
class OfflineConfig(BaseConfig):
    """per_device_train_batch_size counts rows of the data: pairs, or single completions for KTO."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = REFUSED
    unused: ClassVar[Table] = EVERYWHERE | OFFLINE

    learning_rate: float = setting(1e-6, "AdamW's learning rate.")
    disable_dropout: bool = setting(True, "Set every dropout in the model to 0, so that log-probs can be compared.")
    max_length: int | None = setting(
        1024, "Tokens of a prompt with one completion. Longer completions are cut at their end; a prompt that leaves no room is an error."
    )
    shuffle_dataset: bool = setting(True, "A new order each epoch, drawn from (seed, epoch).")
    beta: float = setting(0.1, "How dear it is to leave the reference: the smaller, the further the policy may go.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise UserError(f"beta={self.beta}: it must be above 0; 0.1 is usual")

    def check_read(self, losses: list[str], readers: dict[str, tuple[str, ...]]) -> None:
        """Raises UserError for a setting that was changed though no chosen loss reads it. `readers`: setting -> the
        losses that do."""
        defaults = {known.name: known.default for known in fields(self)}
        for name, reading in readers.items():
            value = getattr(self, name)
            if value != defaults[name] and not set(losses) & set(reading):
                raise UserError(f"{name}={value!r} is not read by {' or '.join(losses)}, only by {', '.join(reading)}; leave it out")


@settings
@dataclass
class ReferenceConfig(OfflineConfig):
    """Where the reference's log-probs come from."""

    lowest: ClassVar[dict[str, float]] = BaseConfig.lowest | {"ref_model_mixup_alpha": 0, "ref_model_sync_steps": 1}

    precompute_ref_log_probs: bool = setting(
        False,
        "Compute the reference's log-probs once, before training, and keep them in output_dir (reference.safetensors): no reference model is held "
        "in memory. The file is bound to the data and the weights; one that does not fit is refused.",
    )
    sync_ref_model: bool = setting(False, "Move the frozen reference towards the policy every ref_model_sync_steps.")
    ref_model_mixup_alpha: float = setting(0.6, "Share of the policy in the synced reference.")
    ref_model_sync_steps: int = setting(512, "Optimizer steps between two syncs of the reference.")

    @property
    def holds_reference(self) -> bool:
        return not self.precompute_ref_log_probs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError("sync_ref_model moves the reference, but precompute_ref_log_probs computes it once; use one of them")


def check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} is unknown; there are: {', '.join(known)}.{did_you_mean(str(value), known)}")
