"""Forward and backward of an update's micro-batches, and how an update that did not fit is restarted in smaller ones.

An update is a sum over its micro-batches, so splitting them changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from posttrain.errors import TrainingError, first_sentence
from posttrain.trainers.core.memory import MemorySwitches

OUT_OF_MEMORY = "out of memory in an update"
Loss = Callable[[nn.Module, Any], torch.Tensor]


class NotFinite(Exception):
    """A loss was not. Nothing was applied."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


def forward_backward(
    batches: list[Any], loss: Loss, *, model: nn.Module, accelerator: Accelerator, switches: MemorySwitches, sync: bool
) -> torch.Tensor:
    """The summed loss of `batches`, after the backward of each. The gradients of processes meet after the last one,
    where it ends a window (`sync`).

    Raises NotFinite.
    """
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        is_last = sync and index == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model), switches.tiles(model):
            with switches.forward():
                value = loss(model, batch)
            if not torch.isfinite(value):
                raise NotFinite(value.item())
            accelerator.backward(value)
        total += value.detach()
    return total


class RestartableUpdate:
    """One optimizer step as far as it has come. `restart(batches, error)` undoes it and returns the same work in
    smaller micro-batches; `advice()` says what is left to do where that does not help."""

    def __init__(self, restart: Callable[[list[Any], str], list[Any]], advice: Callable[[], str]) -> None:
        self._restart, self._advice = restart, advice
        self._done: list[Any] = []  # micro-batches of this update that were run
        self._loss: Any = 0.0  # theirs

    def run(self, batches: list[Any], step: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        """The summed loss of `batches`. Where they do not fit, all of the update so far is run again in smaller ones,
        once.

        Raises TrainingError where that does not help.
        """
        errors: list[str] = []
        with caught(errors):
            loss = step(batches)
            self._done, self._loss = self._done + batches, self._loss + loss
            return loss
        self._done, before = self._restart(self._done + batches, errors[0]), self._loss
        with caught(errors):
            self._loss = step(self._done)
            return self._loss - before
        longest = max(len(batch.stream) for batch in self._done)
        raise TrainingError(f"{OUT_OF_MEMORY}, also in micro-batches of {longest:,} tokens ({errors[1]}): {self._advice()}")


@contextlib.contextmanager
def caught(errors: list[str]) -> Iterator[None]:
    """An out-of-memory error inside is put into `errors` in one line. Its traceback, which holds the tensors, is gone
    afterwards."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        errors.append(first_sentence(error))


def halved(batches: list[Any]) -> tuple[list[Any], int]:
    """The same work in micro-batches of at most half the tokens of the longest one, and that number of tokens."""
    budget = max(max(len(batch.stream) for batch in batches) // 2, 1)
    return [part for batch in batches for part in (batch.smaller(budget) if len(batch.stream) > budget else [batch])], budget
