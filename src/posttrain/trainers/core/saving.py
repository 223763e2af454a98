"""A Trainer whose checkpoints are whole, hold all that decides the future, and are checked before a run goes on from one.

It knows nothing of windows and losses. What a trainer must keep beyond weights, optimizer, scheduler and counters it says in `state_to_resume` and
`save_tensors`; what was chosen by itself and changes the bits in `chosen`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging as transformers_logging

from posttrain.errors import EnvError, RewardError, TrainingError, UserError, is_full
from posttrain.tracking.recorder import Recorder
from posttrain.tracking.terminal import TerminalView
from posttrain.trainers.core import best, checkpoints, hub, manifest
from posttrain.trainers.core.config import BaseConfig
from posttrain.trainers.core.fingerprint import Fingerprint, of_weights
from posttrain.trainers.core.interrupt import Interrupt
from posttrain.trainers.core.ranks import gather_json, is_lost_process
from posttrain.trainers.core.switches import as_stored, memory_line

PUSHED = "pushed"  # within output_dir: what `push_to_hub` uploads


class SavingTrainer(Trainer):
    """Subclasses set the recorder, the view and the interrupt before, and `input_fingerprints` after they call the constructor of transformers."""

    args: BaseConfig
    recorder: Recorder
    view: TerminalView
    interrupt: Interrupt
    tokenizer: PreTrainedTokenizerBase
    push_in_progress: Any  # transformers' PushInProgress. None: nothing was uploaded yet
    input_fingerprints: dict[str, Fingerprint]  # "data", "rubric" (online), and "eval_data" where it decides what is kept
    _began_with: dict[str, Fingerprint] | None = None  # None: not trained yet
    _resuming_from: Path | None = None
    _rng_restored_from: str | None = None
    _saved_step: int | None = None  # of the newest checkpoint that this process knows

    @functools.cached_property
    def uploads(self) -> hub.Uploads:
        return hub.Uploads(self)

    @property
    def chosen(self) -> dict[str, Any]:
        """JSON values that were chosen by itself and change the bits. A checkpoint holds them: `manifest.read(checkpoint).chosen`."""
        return {}

    def take_chosen(self, chosen: Mapping[str, Any]) -> None:
        """Restore what `chosen` gave."""

    def use_switches(self) -> None:
        """Take the memory switches from the settings."""

    def state_to_resume(self) -> dict[str, Any]:
        """JSON state beyond weights, optimizer, scheduler and counters."""
        return {}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        """Restore what `state_to_resume` gave."""

    def save_tensors(self, directory: Path) -> None:
        """Write extra tensors (safetensors) into a checkpoint being made."""

    def load_tensors(self, directory: Path) -> None:
        """Load what `save_tensors` wrote."""

    def starting_weights(self) -> dict[str, Fingerprint]:
        """Of what is loaded as training begins, by its name in the manifest."""
        assert isinstance(self.model, torch.nn.Module)
        return {"model_weights": of_weights(self.model)}

    def close(self) -> None:
        """Called when a training ends, however it ends."""

    def plan(self) -> str:
        """One line: what a step consists of."""
        return f"{self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size} rows per step"

    # Writing

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights as safetensors, tokenizer, config. No pickled arguments."""
        if not self.args.should_save:
            return
        target = output_dir or self.args.output_dir
        assert target is not None
        with _without_progress_bars():  # they would tear the live view
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(target, state_dict=state_dict)
            self.tokenizer.save_pretrained(target)

    def push_to_hub(  # type: ignore[override]  # the further keywords are those of the installed version
        self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any
    ) -> Any:
        """As transformers', of the model, its tokenizer and its card alone: output_dir holds the run's record too, with
        every prompt and completion."""
        output_dir = Path(str(self.args.output_dir))
        staging = output_dir / PUSHED / output_dir.name  # whose name is that of the repository, if nobody gave one
        self.args.output_dir = str(staging)  # what transformers saves into, and uploads
        try:
            uploaded = super().push_to_hub(commit_message, blocking, **kwargs)
        finally:
            self.args.output_dir = str(output_dir)
        if blocking and self.is_world_process_zero():
            shutil.rmtree(staging.parent)  # otherwise the upload still reads it
        return uploaded

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All that transformers' hook of this name does, into a directory that appears when it is complete."""
        output_dir = Path(str(self.args.output_dir))
        target = output_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        self.store_flos()
        with checkpoints.written_whole(target, main=main) as staging:
            self.accelerator.wait_for_everyone()
            with checkpoints.by_all_or_none(self.args.device):
                self._write_checkpoint(staging, target)
            if main:
                manifest.write(staging, self.state.global_step, self._settings(), self.chosen)
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if main:
            checkpoints.rotate(output_dir, self.args.save_total_limit, self._spared())

    def _write_checkpoint(self, staging: Path, target: Path) -> None:
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        (staging / f"state-{self.args.process_index}.json").write_text(json.dumps(self.state_to_resume()), encoding="utf-8")
        self._name_best(target)
        if self.args.should_save:
            self.state.stateful_callbacks = self._states_of_callbacks()  # type: ignore[assignment]
            self.state.save_to_json(str(staging / "trainer_state.json"))
            self.save_tensors(staging)

    def _name_best(self, target: Path) -> None:
        """The best step's checkpoint, where there is one. `target` is the one being written."""
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            found = target.with_name(f"checkpoint-{self.state.best_global_step}")
            if found == target or found.is_dir():
                self.state.best_model_checkpoint = str(found)

    def _states_of_callbacks(self) -> dict[str, Any]:
        """By class; of several callbacks of a class a list, in their order, as they are read back."""
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        return {name: found[0] if len(found) == 1 else found for name, found in states.items()}

    def _spared(self) -> set[str]:
        """Checkpoints that rotation leaves: the best one, and those on their way to the hub."""
        return {Path(path).name for path in [self.state.best_model_checkpoint] if path} | self.uploads.under_way()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.uploads.push(Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for sentence in self.uploads.failures():
            self.say(f"warning: {sentence}")

    def _settings(self) -> dict[str, Any]:
        return manifest.settings_of(self.args, **{name: fingerprint.now for name, fingerprint in self._start().items()})

    def _start(self) -> dict[str, Fingerprint]:
        """What this trainer's first training began with."""
        if self._began_with is None:
            self._began_with = self.starting_weights() | self.input_fingerprints
        return self._began_with

    def say(self, sentence: str) -> None:
        """On the terminal, by the main process, and in the record."""
        if self.is_world_process_zero():
            self.view.plan(sentence)
            self.recorder.note("checkpoint", sentence)

    # Training and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers' `train`. `resume_from_checkpoint=True` takes the newest checkpoint of output_dir.

        Raises UserError when there is none, its files are damaged or its settings differ; TrainingError when the disk refuses, or another process of
        this training ended. Once the step is saved: KeyboardInterrupt after Ctrl-C, SystemExit after SIGTERM and SIGHUP.
        """
        best.check_settings(self.args, self.eval_dataset)
        self._start()
        self._resuming_from, self._rng_restored_from, self._saved_step = self._find_checkpoint(resume_from_checkpoint), None, None
        if self.args.should_save and self.is_world_process_zero():
            self.view.plan(self.plan(), memory_line(self.args))
        try:
            if self._resuming_from is not None and manifest.read(self._resuming_from).step >= self._steps_in_all():
                result = self._already_trained(self._resuming_from)
            else:
                result = super().train(resume_from_checkpoint=str(self._resuming_from) if self._resuming_from else None, **kwargs)
            self.interrupt.agree(self.args.device)
        except (TrainingError, RewardError, EnvError):
            raise
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            last = checkpoints.last_checkpoint(str(self.args.output_dir))
            raise TrainingError(
                "another process of this training ended, so this one cannot go on (what the other one said tells why); "
                + (f"resume from {last.name}" if last else "nothing is saved yet, so start it again")
            ) from error
        except OSError as error:
            if not is_full(error):
                raise
            last = checkpoints.last_checkpoint(str(self.args.output_dir))
            raise TrainingError(
                f"could not write {error.filename or 'the output'}: {error.strerror}. Free some space and resume; "
                + (f"{last.name} is whole" if last else "no checkpoint exists yet")
            ) from error
        finally:
            self.close()
            self.interrupt.restore()
            self.view.close()
            self.recorder.close()
        self.interrupt.leave()
        return result

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
        self._find_best_here()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        for event in (self.callback_handler.on_train_begin, self.callback_handler.on_train_end):
            self.control = event(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to go on from, its files checked by the processes that write, and the verdict shared by all."""
        if not wanted:
            return None
        output_dir = str(self.args.output_dir)
        found = checkpoints.newest(output_dir) if wanted is True else Path(str(wanted))
        if found is None or not found.is_dir():
            raise UserError(f"no complete checkpoint in {output_dir if wanted is True else wanted}; start without resuming")
        verdict, unsaid = None, []
        try:
            held = manifest.read(found)
            if as_stored(self.args, held.settings):
                self.use_switches()
            self.take_chosen(held.chosen)
            if held.step < self._steps_in_all():  # otherwise only the weights are read
                checkpoints.check_resumable(found, held, self.args.world_size)  # first: settings follow from the number of processes
            unsaid = manifest.check_same(held, self._comparable(held), self._start())
            if self.args.should_save:
                manifest.check_files(found, held)
            if held.files is None:
                unsaid = [f"{found.name} is of an earlier posttrain and holds no digests, so its files could not be checked", *unsaid]
        except manifest.ForeignFile as error:
            verdict = str(error)
        except manifest.DamagedCheckpoint as error:
            verdict = f"{error}; {checkpoints.where_to_go_on(found)}"
        except UserError as error:
            verdict = str(error)
        refusals = [said for said in gather_json(verdict, self.args.device) if said is not None]
        if refusals:
            raise UserError(refusals[0])
        for sentence in unsaid:
            self.say(sentence)
        return found

    def _comparable(self, held: manifest.Manifest) -> dict[str, Any]:
        """The settings of this run that a checkpoint can be compared with. posttrain 0.1 sampled new adapters without a seed, so nobody can begin
        with its weights again."""
        had_no_digests = held.files is None and type(self.model).__module__.startswith("peft.")
        return {name: value for name, value in self._settings().items() if not (had_no_digests and name == "model_weights")}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The last hook of resuming, after weights and counters: our own state comes back here."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_state_to_resume(json.loads((Path(checkpoint) / f"state-{self.args.process_index}.json").read_text(encoding="utf-8")))
        self.load_tensors(Path(checkpoint))
        self._find_best_here()

    def _find_best_here(self) -> None:
        """The best checkpoint may have moved with its run."""
        if self.state.best_model_checkpoint is not None:
            here = Path(str(self.args.output_dir)) / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(here) if here.is_dir() else self.state.best_model_checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Once, before the first window, whose rewards may draw from these generators; transformers calls it after that window as well."""
        if checkpoint is not None and self._rng_restored_from != checkpoint:
            self._rng_restored_from = checkpoint
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        best.check_callbacks(self.args, self.state.stateful_callbacks or {}, self.callback_handler.callbacks)  # type: ignore[arg-type]
        super()._load_callback_state()

    def _load_best_model(self) -> None:
        try:
            manifest.check_model(str(self.state.best_model_checkpoint))
        except manifest.DamagedCheckpoint as error:
            raise UserError(
                f"the best model cannot be loaded: {error}. The model of the last step is whole; resume with load_best_model_at_end=False"
            ) from error
        super()._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        unknown = best.unknown_metric(self.args.metric_for_best_model, metrics)
        if unknown is not None:
            self._save_checkpoint(self.model, trial)
            raise UserError(f"{unknown} Step {self.state.global_step} is saved: resume with another one.")
        return super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """transformers' hook after a step, and once more when the loop over an epoch ends."""
        step = self.state.global_step
        if self.interrupt.agreed and self._saved_step == step and not float(self.state.epoch or 0).is_integer():
            return  # a signal ended the loop within the epoch: an evaluation here would count for the best model, and the uninterrupted run has none
        was_long = self.control.should_evaluate or self.control.should_save
        if self.control.should_evaluate:
            self._saved_step = None  # what was saved holds no result of this evaluation
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if was_long and self.interrupt.agree(self.args.device):  # asked for meanwhile: not one more step
            self.control.should_training_stop = True
            if self._saved_step != step:
                self._save_checkpoint(self.model, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """A training that a signal ended goes on later: no model is chosen yet. transformers would also remove all checkpoints but the best one, where
        `save_total_limit` is 1; that happens here only at a run's end, and a checkpoint that is half removed has another name."""
        goes_on = self.interrupt.agree(self.args.device) != 0
        limit, chooses = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit, self.args.load_best_model_at_end = None, chooses and not goes_on
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, chooses
        if self.args.should_save and limit == 1 and not goes_on and self.state.best_model_checkpoint is not None:
            checkpoints.keep_only(Path(self.state.best_model_checkpoint), str(self.args.output_dir))
        return result


class RunDirectory(TrainerCallback):
    """What changes in the directory once nothing refuses to train there: leftovers of a process that was killed go, and so do the names of checkpoints
    that another continuation wrote. Called after the recorder, which refuses where another training writes."""

    def __init__(self, trainer: SavingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoints.tidy(str(args.output_dir))
        came_from = self._trainer._resuming_from
        if came_from is not None and came_from.parent.resolve() == Path(str(args.output_dir)).resolve():
            for path in checkpoints.abandon_later(came_from):
                self._trainer.say(f"this run goes on from {came_from.name}, so a later checkpoint of another continuation is now called {path.name}")


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
