"""The mechanism every trainer shares: a window of micro-steps becomes streams, each runs forward and backward, and the
step is one sum.

It knows nothing of any algorithm: subclasses turn a window of rows into micro-batches (`window`) and a micro-batch into
a loss (`loss`) that is already normalised over the whole window and all processes. How a run is saved and resumed is in
`saving`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from posttrain.data.given import named
from posttrain.data.stream import PackItem, Stream, pack, split
from posttrain.errors import TrainingError, UserError
from posttrain.models.forward import StreamLogprobs, make_logprobs
from posttrain.models.head import gains_by_known_grad
from posttrain.models.load import load_tokenizer
from posttrain.tracking.recorder import Recorder
from posttrain.tracking.terminal import TerminalView
from posttrain.trainers.core import best
from posttrain.trainers.core.config import BaseConfig
from posttrain.trainers.core.fingerprint import of_rows
from posttrain.trainers.core.interrupt import Interrupt
from posttrain.trainers.core.memory import MemorySwitches, advice
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.core.saving import RunDirectory, SavingTrainer
from posttrain.trainers.core.starting import starting_model
from posttrain.trainers.core.step import OUT_OF_MEMORY, Loss, NotFinite, RestartableUpdate, forward_backward, halved
from posttrain.trainers.core.switches import MemoryNote, settled_for

logger = logging.getLogger(__name__)


class MicroBatch:
    """One stream and what its loss needs. Subclasses add (B, T) and (B,) tensors. A plain class: wrappers must not
    rebuild it."""

    keeps_groups = False  # whether the completions of a prompt meet in the loss

    def __init__(self, items: list[PackItem], device: torch.device) -> None:
        self.items = items  # with the numbers of their rows
        self.stream = pack(items).to(device)

    def of(self, items: list[PackItem]) -> MicroBatch:
        """The part of this micro-batch that consists of `items`."""
        raise AssertionError(f"{type(self).__name__} does not say what a part of it is")

    def smaller(self, max_tokens: int) -> list[MicroBatch]:
        """The same in micro-batches of at most `max_tokens`, as far as it can be split."""
        return [self.of(part) for part in split(self.items, max_tokens, whole=self.keeps_groups)]


class BaseTrainer(SavingTrainer):
    """Model in, run directory out. Raises UserError for what cannot work, before anything is spent."""

    args: BaseConfig
    model: nn.Module
    train_dataset: Sequence[Any]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BaseConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
    ) -> None:
        _refuse_devices(args)
        name = model if isinstance(model, str) else model.config._name_or_path
        model = starting_model(model, args, peft_config, quantization_config)
        self.tokenizer = processing_class if processing_class is not None else load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        args = settled_for(args, model, train_dataset, self.tokenizer)
        self.metrics = Metrics()
        self.recorder = Recorder(token_groups=args.record_tokens_of, max_token_bytes=args.record_megabytes * 2**20)
        self.view = TerminalView(note=self.recorder.note)
        self.interrupt = Interrupt()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.tokenizer,
            data_collator=list,  # type: ignore[arg-type]
            callbacks=[self.recorder, RunDirectory(self), self.view, self.interrupt, MemoryNote(self.recorder), *(callbacks or [])],
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("FSDP and DeepSpeed are not built yet; use plain data parallelism (`accelerate launch --multi_gpu`), or one device")
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        self.prepare_forward(model)
        self.use_switches()
        self._step_started: float | None = None  # None: the first step of the next log has not begun
        self._steps_before = 0  # optimizer steps done when it began
        self.input_fingerprints = {"data": of_rows(train_dataset)}
        if best.matters(args):
            self.input_fingerprints["eval_data"] = of_rows([[name, of_rows(rows).now] for name, rows in named(eval_dataset).items()])

    # What subclasses say

    def window(self, micro_steps: list[Any]) -> list[MicroBatch]:
        """Everything that one optimizer step learns from on this process, in any number of micro-batches (also
        none)."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns from")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """A micro-batch's share of the update's loss, times the number of processes, which average their gradients."""
        raise AssertionError(f"{type(self).__name__} has no loss")

    def prepare_forward(self, model: nn.Module) -> None:
        """Find out, once, how a stream goes through `model`."""
        self._logprobs = make_logprobs(model)

    def use_switches(self) -> None:
        self.switches = MemorySwitches(self.args, self.model)
        self.token_budget = self.args.token_budget  # halved where it did not fit

    @property
    def chosen(self) -> dict[str, Any]:
        return {"token_budget": self.token_budget}

    def take_chosen(self, chosen: Mapping[str, Any]) -> None:
        self.token_budget = chosen.get("token_budget", self.token_budget)

    # Log-probs

    def logprobs(self, model: nn.Module, stream: Stream, temperature: float = 1.0, *, entropy_grad: bool = False, **wanted: Any) -> StreamLogprobs:
        """(B, T) log-probs and entropies of a stream; never a (B, T, V) tensor. `wanted`: want_argmax, want_sum_p2,
        scorer, known_grad.

        A loss that differentiates the entropy says so with `entropy_grad`.
        """
        return self._logprobs(model, stream, temperature=temperature, entropy_grad=entropy_grad, **wanted)

    def known_grad(self, shape: tuple[int, int], loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """(B, T) the gradient of `loss` in log-probs of that shape, if it does not depend on them: of an SFT loss, of a
        policy whose ratio is 1 by definition. With it a head that is trained in float32 is passed once instead of
        twice. None: it depends, or nothing would be gained.
        """
        if self.args.bf16 or self.args.fp16 or not torch.is_grad_enabled() or not gains_by_known_grad(self.model):
            return None
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        slopes: list[torch.Tensor] = []
        for anywhere in (0.0, -1.0):
            stand_in = torch.full(shape, anywhere, dtype=dtype, device=self.args.device, requires_grad=True)
            slopes += torch.autograd.grad(loss(stand_in), stand_in)
        return slopes[0] if torch.equal(*slopes) and bool(slopes[0].any()) else None

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[nn.Module]:
        """The unwrapped module for passes without a gradient: eval mode (LoRA dropout too), same autocast as
        training."""
        module = self.accelerator.unwrap_model(model)
        was_training = {m: m.training for m in module.modules()}
        module.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield module
        finally:
            for m, training in was_training.items():
                m.training = training

    # The window is the step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[dict[str, Any]], None]:
        """transformers' hook: a whole accumulation window in, exactly as many items out. The micro-batches are spread
        over them."""
        if self._step_started is None:
            self._step_started, self._steps_before = time.perf_counter(), self.state.global_step
        self._load_rng_state(str(self._resuming_from) if self._resuming_from else None)
        micro_steps = []
        for _ in range(num_batches):
            try:
                micro_steps.append(next(epoch_iterator))
            except StopIteration:
                break
        batches = self.window(micro_steps) if micro_steps else []
        self._update = RestartableUpdate(functools.partial(self._restarted, self.rollback_point()), self._advice)
        items: list[dict[str, Any]] = [{"micro_batches": batches[index :: len(micro_steps)]} for index in range(len(micro_steps))]
        return items, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward for each micro-batch of this item; gradients are synchronised on the last one of the
        window only."""
        model.train()
        batches = inputs["micro_batches"]
        is_last_item = self.accelerator.sync_gradients
        loss: Loss = self.loss
        if is_last_item and not batches and self.args.world_size > 1:
            batches, loss = [None], lambda model, _: self._zero_loss(model)  # every process must join the reduction
        parts = {"model": model, "accelerator": self.accelerator, "switches": self.switches, "sync": is_last_item}
        try:
            with self.metrics.timed("time/update"):
                total = self._update.run(batches, lambda batches: forward_backward(batches, loss, **parts))
        except NotFinite as error:
            raise TrainingError(self._not_finite("loss", error.value)) from error
        if is_last_item:
            self._fill_missing_gradients(model)
        return total

    def rollback_point(self) -> Callable[[], None]:
        """Remembers what has been noted so far. The returned function puts it back: what an update noted since is
        forgotten."""
        metrics = self.metrics.copy()

        def rollback() -> None:
            self.metrics.restore(metrics)
            self.recorder.forget_tokens(self.state.global_step + 1)

        return rollback

    def _restarted(self, rollback: Callable[[], None], batches: list[Any], error: str) -> list[Any]:
        """`batches`, an update that ran out of memory, in micro-batches of half the size. Nothing of it has happened
        yet."""
        if self.args.world_size > 1:  # the others already wait for this one's gradients
            raise TrainingError(f"{OUT_OF_MEMORY} ({error}): lower max_tokens_per_micro_batch, or {self._advice()}")
        smaller, budget = halved(batches)
        if len(smaller) == len(batches):
            longest = max(len(batch.stream) for batch in batches)
            raise TrainingError(f"{OUT_OF_MEMORY} ({error}), and a micro-batch of {longest:,} tokens cannot be split: {self._advice()}")
        note = f"{OUT_OF_MEMORY} ({error}); micro-batches have at most {budget:,} tokens from here on"
        logger.warning(note)
        self.recorder.note("memory", note)
        self.token_budget = budget
        rollback()
        self.model_wrapped.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is held in pieces that are too small
        return smaller

    def _advice(self) -> str:
        return advice(self.args, self.switches, self.model)

    def _zero_loss(self, model: nn.Module) -> torch.Tensor:
        """A zero that is connected to the graph."""
        stream = pack([PackItem([0], [[0]])]).to(self.args.device)
        return self.logprobs(model, stream).logps.sum() * 0.0

    def _fill_missing_gradients(self, model: nn.Module) -> None:
        """A window that was skipped because its gradient is zero must do what a zero gradient does (momentum, decay),
        not nothing."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' hook between backward and step. A finite loss may have a gradient that is not; with fp16 the
        scaler skips such a step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise TrainingError(self._not_finite("gradient", float(norm)))
        return norm

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the {what} became {value} at step {self.state.global_step + 1}; nothing of this step was applied. "
            "Lower learning_rate or max_grad_norm, use bf16 instead of fp16, or look at the rewards of this step, and resume from the last checkpoint."
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate counts padded rows, which do not exist here

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was noted since the last log. Runs on every process, since metrics are summed over all."""
        if "loss" in logs:
            steps = self.state.global_step - self._steps_before
            logs = self.metrics.drain(self.args.device, steps) | logs
            if self._step_started is not None:
                seconds = (time.perf_counter() - self._step_started) / max(steps, 1)
                logs["step_time"] = seconds
                if "num_tokens" in logs:
                    logs["tokens_per_second"] = logs["num_tokens"] / seconds
            self._step_started = None
        super().log(logs, start_time)


def _refuse_devices(args: BaseConfig) -> None:
    if args.n_gpu > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{args.n_gpu} GPUs are visible but no launcher started this: use `accelerate launch --multi_gpu ...`, or CUDA_VISIBLE_DEVICES=0 for one of them"
        )
