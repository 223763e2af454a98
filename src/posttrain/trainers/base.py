"""The mechanism every trainer shares: a window of micro-steps becomes streams, each runs forward and backward, and the step is one sum.

A thin subclass of transformers.Trainer. It knows nothing of any algorithm: subclasses turn a window of rows into micro-batches
(`window`) and a micro-batch into a loss (`loss`) that is already normalised over the whole window and all processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as transformers_logging

from posttrain.data.stream import PackItem, Stream, pack, split
from posttrain.errors import TrainingError, UserError
from posttrain.models.forward import StreamLogprobs, make_logprobs
from posttrain.models.head import gains_by_forecast
from posttrain.models.load import load_tokenizer
from posttrain.tracking.recorder import Recorder
from posttrain.tracking.terminal import TerminalView
from posttrain.trainers import checkpoints
from posttrain.trainers.config import BaseConfig
from posttrain.trainers.interrupt import Interrupt
from posttrain.trainers.memory import Thrift, Update
from posttrain.trainers.metrics import Metrics
from posttrain.trainers.starting import starting_model


class MicroBatch:
    """One stream and what its loss needs. Subclasses add (B, T) and (B,) tensors. A plain class: wrappers must not rebuild it."""

    keeps_groups = False  # whether the completions of a prompt meet in the loss

    def __init__(self, items: list[PackItem], device: torch.device) -> None:
        self.items = items  # with the numbers of their rows
        self.stream = pack(items).to(device)

    def of(self, items: list[PackItem]) -> MicroBatch:
        """The part of this micro-batch that consists of `items`."""
        raise AssertionError(f"{type(self).__name__} does not say what a part of it is")

    def smaller(self, max_tokens: int) -> list[MicroBatch]:
        """The same in micro-batches of at most `max_tokens`, as far as they can be cut."""
        return [self.of(part) for part in split(self.items, max_tokens, whole=self.keeps_groups)]


class BaseTrainer(Trainer):
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
    ) -> None:
        _refuse_devices(args)
        name = model if isinstance(model, str) else model.config._name_or_path
        model = starting_model(model, args, peft_config)
        self.tokenizer = processing_class if processing_class is not None else load_tokenizer(name, trust_remote_code=args.trust_remote_code)
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
            callbacks=[self.recorder, self.view, self.interrupt, *(callbacks or [])],
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("FSDP and DeepSpeed are not built yet; use plain data parallelism (`accelerate launch --multi_gpu`), or one device")
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(callback)
        self.prepare_forward(model)
        self.thrift = Thrift(args, model)
        self.token_budget = args.token_budget  # halved where it did not fit
        self._step_started: float | None = None  # None: the first step of the next log has not begun
        self._steps_before = 0  # optimizer steps done when it began
        self._resuming_from: Path | None = None
        self._rng_restored_from: str | None = None
        self._start = {"model_weights": checkpoints.weights_fingerprint(model), "data": checkpoints.rows_fingerprint(train_dataset)}

    # What subclasses say

    def window(self, micro_steps: list[Any]) -> list[MicroBatch]:
        """Everything that one optimizer step learns from on this process, in any number of micro-batches (also none)."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns from")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """A micro-batch's share of the update's loss, times the number of processes, which average their gradients."""
        raise AssertionError(f"{type(self).__name__} has no loss")

    def prepare_forward(self, model: nn.Module) -> None:
        """Find out, once, how a stream goes through `model`."""
        self._logprobs = make_logprobs(model)

    def state_to_resume(self) -> dict[str, Any]:
        """JSON state beyond weights, optimizer, scheduler and counters."""
        return {}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        """Take back what `state_to_resume` gave."""

    def save_tensors(self, directory: Path) -> None:
        """Write extra tensors (safetensors) into a checkpoint being made."""

    def load_tensors(self, directory: Path) -> None:
        """Take back what `save_tensors` wrote."""

    # Log-probs

    def logprobs(self, model: nn.Module, stream: Stream, temperature: float = 1.0, *, entropy_grad: bool = False, **wanted: Any) -> StreamLogprobs:
        """(B, T) log-probs and entropies of a stream; never a (B, T, V) tensor. `wanted`: want_argmax, want_sum_p2, scorer, expected_grad.

        A loss that differentiates the entropy says so with `entropy_grad`.
        """
        return self._logprobs(model, stream, temperature=temperature, entropy_grad=entropy_grad, **wanted)

    def expected_grad(self, shape: tuple[int, int], loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """(B, T) the gradient of `loss` in log-probs of that shape, if it does not depend on them: of an SFT loss, of a policy whose ratio is 1 by
        definition. With it a head that is trained in float32 is passed once instead of twice. None: it depends, or nothing would be gained.
        """
        if self.args.bf16 or self.args.fp16 or not torch.is_grad_enabled() or not gains_by_forecast(self.model):
            return None
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        slopes: list[torch.Tensor] = []
        for anywhere in (0.0, -1.0):
            stand_in = torch.full(shape, anywhere, dtype=dtype, device=self.args.device, requires_grad=True)
            slopes += torch.autograd.grad(loss(stand_in), stand_in)
        return slopes[0] if torch.equal(*slopes) and bool(slopes[0].any()) else None

    @contextlib.contextmanager
    def frozen(self, model: nn.Module) -> Iterator[nn.Module]:
        """The unwrapped module for passes without a gradient: eval mode (LoRA dropout too), same autocast as training."""
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
        """transformers' hook: a whole accumulation window in, exactly as many items out. The micro-batches are spread over them."""
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
        self._update = Update(self)
        items: list[dict[str, Any]] = [{"micro_batches": batches[index :: len(micro_steps)]} for index in range(len(micro_steps))]
        return items, None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Once, before the first window, whose rewards may draw from these generators; transformers calls it after that window as well."""
        if checkpoint is not None and self._rng_restored_from != checkpoint:
            self._rng_restored_from = checkpoint
            super()._load_rng_state(checkpoint)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward for each micro-batch of this item; gradients are synchronised on the last one of the window only."""
        model.train()
        batches = inputs["micro_batches"]
        is_last_item = self.accelerator.sync_gradients
        if is_last_item and not batches and self.args.world_size > 1:
            batches = [None]  # every process must join the reduction, with a zero that is connected to the graph
        with self.metrics.timed("time/update"):
            total = self._update.run(model, batches, sync=is_last_item)
        if is_last_item:
            self._fill_missing_gradients(model)
        return total

    def run(self, model: nn.Module, batches: list[Any], *, sync: bool) -> torch.Tensor:
        """Forward and backward of each; the gradients of processes meet after the last one of a window (`sync`)."""
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(batches):
            is_last = sync and index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model), self.thrift.tiles(model):
                with self.thrift.forward():
                    loss = self.loss(model, batch) if batch is not None else self._zero_loss(model)
                if not torch.isfinite(loss):
                    raise TrainingError(self._not_finite("loss", loss.item()))
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def notes(self) -> Callable[[], None]:
        """Takes back, when called, what an update has noted since now."""
        metrics = self.metrics.copy()

        def take_back() -> None:
            self.metrics.restore(metrics)
            self.recorder.forget_tokens(self.state.global_step + 1)

        return take_back

    def _zero_loss(self, model: nn.Module) -> torch.Tensor:
        stream = pack([PackItem([0], [[0]])]).to(self.args.device)
        return self.logprobs(model, stream).logps.sum() * 0.0

    def _fill_missing_gradients(self, model: nn.Module) -> None:
        """A window that was skipped because its gradient is zero must do what a zero gradient does (momentum, decay), not nothing."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' hook between backward and step. A finite loss may have a gradient that is not; with fp16 the scaler skips such a step."""
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

    # Checkpoints and resuming

    def _settings(self) -> dict[str, Any]:
        return checkpoints.settings_of(self.args, **self._start)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as safetensors, tokenizer, config. No pickled arguments."""
        if not self.args.should_save:
            return
        target = output_dir or self.args.output_dir
        assert target is not None
        with _without_progress_bars():  # they would tear the live view
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(target, state_dict=state_dict)
            self.tokenizer.save_pretrained(target)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(str(self.args.output_dir))
        target = output_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        with checkpoints.written_whole(target, main=main) as staging:
            self.accelerator.wait_for_everyone()
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            (staging / f"state-{self.args.process_index}.json").write_text(json.dumps(self.state_to_resume()))
            if main:
                if self.state.best_global_step:
                    self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{self.state.best_global_step}")
                self.state.stateful_callbacks["TrainerControl"] = self.control.state()  # type: ignore[index,call-overload]
                self.state.save_to_json(str(staging / "trainer_state.json"))
                self.save_tensors(staging)
                (staging / checkpoints.MANIFEST).write_text(json.dumps({"step": self.state.global_step, "settings": self._settings()}, indent=1))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        if main:
            checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers' `train`. `resume_from_checkpoint=True` takes the last complete checkpoint of output_dir.

        Raises UserError when there is none or its settings differ; KeyboardInterrupt after Ctrl-C, once the step is saved.
        """
        self._resuming_from, self._rng_restored_from = self._find_checkpoint(resume_from_checkpoint), None
        if self._resuming_from is not None:
            manifest = json.loads((self._resuming_from / checkpoints.MANIFEST).read_text())
            checkpoints.check_same(manifest["settings"], self._settings())
        if self.args.should_save and self.is_world_process_zero():
            self.view.plan(self.plan())
        try:
            if self._resuming_from is not None and self._steps_done(self._resuming_from) >= self._steps_in_all():
                return self._already_trained(self._resuming_from)
            result = super().train(resume_from_checkpoint=str(self._resuming_from) if self._resuming_from else None, **kwargs)
        finally:
            self.interrupt.restore()
            self.view.close()
            self.recorder.close()
        if self.interrupt.asked:
            raise KeyboardInterrupt
        return result

    def _steps_done(self, checkpoint: Path) -> int:
        return int(json.loads((checkpoint / checkpoints.MANIFEST).read_text())["step"])

    def _steps_in_all(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        updates_per_epoch = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * updates_per_epoch)

    def _already_trained(self, checkpoint: Path) -> TrainOutput:
        """Killed after the last checkpoint: only the end was missing. transformers would train one step too many."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.init_training_references(self, self.state.max_steps, self.state.num_train_epochs, None)
        for event in (self.callback_handler.on_train_begin, self.callback_handler.on_train_end):
            self.control = event(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    def plan(self) -> str:
        """One line: what a step consists of."""
        return f"{self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size} rows per step"

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        output_dir = str(self.args.output_dir)
        found = checkpoints.last_checkpoint(output_dir) if wanted is True else Path(str(wanted))
        if found is None or not (found / checkpoints.MANIFEST).is_file():
            raise UserError(f"no complete checkpoint in {output_dir if wanted is True else wanted}; start without resuming")
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The last hook of resuming, after weights and counters: our own state comes back here."""
        if checkpoint is not None:
            checkpoints.check_resumable(Path(checkpoint), self.args.world_size)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_state_to_resume(json.loads((Path(checkpoint) / f"state-{self.args.process_index}.json").read_text()))
        self.load_tensors(Path(checkpoint))


def _refuse_devices(args: BaseConfig) -> None:
    if args.n_gpu > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{args.n_gpu} GPUs are visible but no launcher started this: use `accelerate launch --multi_gpu ...`, or CUDA_VISIBLE_DEVICES=0 for one of them"
        )


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
