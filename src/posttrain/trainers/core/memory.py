"""What a trainer does about memory: which switches are on, and how an update that did not fit is begun anew in smaller micro-batches.

An update is a sum over its micro-batches, so cutting them up changes nothing but rounding. What was noted of the failed attempt is taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.errors import TrainingError, first_sentence
from posttrain.models.load import is_quantised
from posttrain.models.tiles import check_tiles, tiled
from posttrain.ops.offload import offloading
from posttrain.sizes import AUTO_TILE_ROWS

if TYPE_CHECKING:
    from posttrain.trainers.core.base import BaseTrainer
    from posttrain.trainers.core.config import BaseConfig

logger = logging.getLogger(__name__)

_WHERE = "out of memory in an update"


class MemorySwitches:
    """Those of one run that its forward and backward need: `activation_offloading` and `tile_rows`, which are definite by then (switches.py)."""

    def __init__(self, args: BaseConfig, model: nn.Module) -> None:
        self.device = args.device
        self.tile_rows: int | None = args.tile_rows  # type: ignore[assignment]
        if self.tile_rows is not None:
            check_tiles(model, strict="tile_rows" not in args.chosen)
        self.offloads = bool(args.activation_offloading)

    def forward(self) -> AbstractContextManager[object]:
        """Around the forward of a micro-batch only."""
        return offloading(self.device) if self.offloads else nullcontext()

    def tiles(self, model: nn.Module) -> AbstractContextManager[object]:
        """Around the forward of a micro-batch and its backward."""
        return nullcontext() if self.tile_rows is None else tiled(model, self.tile_rows)


class Update:
    """One optimizer step as far as it has come, so that it can be begun anew."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self._take_back = trainer.notes()
        self._done: list[Any] = []  # micro-batches of this update that were run
        self._loss: Any = 0.0  # theirs

    def run(self, model: nn.Module, batches: list[Any], *, sync: bool) -> torch.Tensor:
        """The summed loss of `batches`, after their backward. Where they do not fit, all of the update so far is run again in smaller ones, once.

        Raises TrainingError where that does not help.
        """
        errors: list[str] = []
        with caught(errors):
            loss = self.trainer.run(model, batches, sync=sync)
            self._done, self._loss = self._done + batches, self._loss + loss
            return loss
        self._done, before = self._begin_anew(model, self._done + batches, errors[0]), self._loss
        with caught(errors):
            self._loss = self.trainer.run(model, self._done, sync=sync)
            return self._loss - before
        raise TrainingError(f"{_WHERE}, also in micro-batches of {self.trainer.token_budget:,} tokens ({errors[1]}): {self._advice()}")

    def _begin_anew(self, model: nn.Module, batches: list[Any], error: str) -> list[Any]:
        """Nothing of the update has happened yet; the same work, in micro-batches of half the size."""
        if self.trainer.args.world_size > 1:  # the others already wait for this one's gradients
            raise TrainingError(f"{_WHERE} ({error}): lower max_tokens_per_micro_batch, or {self._advice()}")
        longest = max(len(batch.stream) for batch in batches)
        budget = max(longest // 2, 1)
        smaller = [part for batch in batches for part in (batch.smaller(budget) if len(batch.stream) > budget else [batch])]
        if len(smaller) == len(batches):
            raise TrainingError(f"{_WHERE} ({error}), and a micro-batch of {longest:,} tokens cannot be cut: {self._advice()}")
        note = f"{_WHERE} ({error}); micro-batches have at most {budget:,} tokens from here on"
        logger.warning(note)
        self.trainer.recorder.note("memory", note)
        self.trainer.token_budget = budget
        self._take_back()
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is held in pieces that are too small
        return smaller

    def _advice(self) -> str:
        return advice(self.trainer.args, self.trainer.switches, self.trainer.model)


@contextmanager
def caught(errors: list[str]) -> Iterator[None]:
    """An out-of-memory error inside is put into `errors` in one line. Its traceback, which holds the tensors, is gone afterwards."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        errors.append(first_sentence(error))


def advice(args: BaseConfig, switches: MemorySwitches, model: nn.Module) -> str:
    """What is left to switch on, in the order of what it costs."""
    left = [
        (not args.gradient_checkpointing, "gradient_checkpointing=True"),
        (switches.tile_rows is None, f"tile_rows={AUTO_TILE_ROWS}"),
        (not switches.offloads and args.device.type != "cpu", "activation_offloading=True"),
        (not str(args.optim).endswith("8bit"), "optim='adamw_8bit'"),
        (type(model).__module__.split(".")[0] != "peft", "LoRA (model.lora, or peft_config)"),
        (not is_quantised(model), "4-bit weights (load_in_4bit) beside adapters"),
        (True, "shorter prompts or completions"),
    ]
    return f"try {', '.join(what for is_left, what in left if is_left)}; `posttrain plan` says what each of them saves"
