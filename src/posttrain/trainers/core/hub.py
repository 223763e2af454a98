"""Uploads while training, as transformers makes them: the model at each save, and with `hub_strategy` the checkpoint
too.

Only the model's files go to the root of the repository, straight from the checkpoint. transformers copies them into
output_dir and uploads all that lies there, with its pickled arguments; here that would be the run's record, with every
prompt and completion.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers import trainer as transformers_trainer  # its hub client is looked up where it stands
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from posttrain.trainers.core.manifest import MANIFEST, NOT_THE_MODEL


class Uploads:
    """The uploads of one trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._checkpoints: set[str] = set()  # names of those whose files the upload in progress reads

    def push(self, checkpoint: Path) -> None:
        """Begin to upload a complete checkpoint, in the background, unless the upload before is still going on
        (`hub_always_push`: even then)."""
        trainer, args = self.trainer, self.trainer.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {trainer.state.global_step}' if by_steps else f'epoch {int(trainer.state.epoch or 0)}'}"
        shared: dict[str, Any] = {"repo_id": trainer.hub_model_id, "folder_path": str(checkpoint), "token": args.hub_token, "run_as_future": True}
        shared |= {"revision": args.hub_revision}
        api = transformers_trainer.hf_api()
        jobs = [api.upload_folder(**shared, commit_message=message, ignore_patterns=[*NOT_THE_MODEL, MANIFEST])]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(api.upload_folder(**shared, path_in_repo=place, commit_message=message + ", checkpoint"))
        if busy:
            trainer.push_in_progress.jobs.extend(jobs)  # type: ignore[attr-defined]
            self._checkpoints.add(checkpoint.name)
        else:
            trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type, assignment]
            self._checkpoints = {checkpoint.name}

    def under_way(self) -> set[str]:
        """Names of checkpoints whose files an upload may still read."""
        going_on = self.trainer.args.push_to_hub and self.trainer.push_in_progress is not None and not self.trainer.push_in_progress.is_done()
        return self._checkpoints if going_on else set()

    def failures(self) -> list[str]:
        """What the hub said to uploads that are over."""
        if not self.trainer.args.push_to_hub or self.trainer.push_in_progress is None:
            return []
        jobs = [job for job in self.trainer.push_in_progress.jobs if isinstance(job, Future) and job.done() and not job.cancelled()]
        errors = [error for error in (job.exception() for job in jobs) if error is not None]
        return [f"an upload to {self.trainer.hub_model_id} failed: {type(e).__name__}: {' '.join(str(e).split())[:200]}" for e in errors]
