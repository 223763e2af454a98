"""What a training run leaves in its directory: `run.sqlite` (every step) and `summary.json` (how it ended).

A callback of transformers' Trainer, of the main process alone: elsewhere every method does nothing. What belongs to a
step is held back until the step is over and then written at once. Before training begins there is no store, so nothing
is kept of it.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain import __version__
from posttrain.io import write_whole
from posttrain.tracking.events import CollectedGroup, CompletionKey, RunStore, StepRecord, TokenDetail
from posttrain.tracking.schema import FILE_NAME, SUMMARY_NAME
from posttrain.types import Group

Floats = Sequence[float] | torch.Tensor


class Recorder(TrainerCallback):
    """Per-token details are kept of the first `token_groups` groups that a step collects, under the size cap told in
    `events.py`."""

    def __init__(self, *, token_groups: int = 4, max_token_bytes: int = 512 * 2**20) -> None:
        self.token_groups = token_groups
        self.max_token_bytes = max_token_bytes
        self._path: Path | None = None  # None: not the main process, or training has not begun
        self._store: RunStore | None = None  # None: not training now
        self._pending: dict[int, StepRecord] = {}
        self._named: set[int] = set()  # token ids whose text this process has recorded
        self._step = 0  # optimizer steps done
        self._started = 0.0  # a clock reading such that clock - _started is the run's training time, earlier parts included

    def groups(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]], prompts: Sequence[str]) -> None:
        """The scored groups that `step` (global_step + 1 at collection) begins with; further calls for a step add to
        it. `prompts`: decoded."""
        if self._store is not None:
            collected = [CollectedGroup(*parts) for parts in zip(groups, advantages, prompts, strict=True)]
            self._record(step).groups.extend(collected)

    def name_tokens(self, step: int, token_ids: Iterable[int], say: Callable[[int], str]) -> None:
        """What the ids of recorded rollouts say, so that a run can be read without its tokenizer. `say` is asked once
        for every id."""
        if self._store is not None:
            new = set(token_ids) - self._named
            self._record(step).vocabulary.update({token: say(token) for token in new})
            self._named |= new

    def wants_tokens(self, key: CompletionKey) -> bool:
        """Whether `tokens` would keep this rollout: lets the trainer skip the copy to the host."""
        return self._store is not None and key.group < self.token_groups

    def tokens(
        self,
        step: int,
        key: CompletionKey,
        *,
        logps: Floats,
        ratio: Floats | None = None,
        entropy: Floats | None = None,
        kl: Floats | None = None,
        advantage: Floats | None = None,
    ) -> None:
        """What the update of `step` saw at each of the R tokens of the rollout collected as `key` (an earlier step's,
        when batches are reused)."""
        if self.wants_tokens(key):
            rest = [None if values is None else _floats(values) for values in (ratio, entropy, kl, advantage)]
            detail = TokenDetail(CompletionKey(*key), _floats(logps), *rest)
            self._record(step).details.append(detail)

    def forget_tokens(self, step: int) -> None:
        """An update of `step` is restarted: what it saw so far is forgotten."""
        if step in self._pending:
            self._pending[step].details.clear()

    def note(self, kind: str, text: str) -> None:
        """An event in words, written at once under the step in progress."""
        if self._store is not None:
            self._store.note(self._step + 1, kind, text)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.close()  # an earlier training of this trainer may have been interrupted
        self._named.clear()
        assert args.output_dir is not None
        directory = Path(args.output_dir)
        self._path, self._step = directory / FILE_NAME, state.global_step
        self._store = store = RunStore(self._path, max_token_bytes=self.max_token_bytes)
        (directory / SUMMARY_NAME).unlink(missing_ok=True)  # it told how another run, or an earlier part of this one, ended
        if state.global_step == 0:
            store.clear()
        else:
            store.truncate_after(state.global_step)
            store.note(state.global_step, "resume", f"resumed after step {state.global_step} of {state.max_steps}")
        method = type(args).__name__.removesuffix("Config")
        progress = {"method": method, "max_steps": state.max_steps, "started_at": time.time()}
        store.write_meta({"config": args.to_dict(), "versions": versions(), "world_size": args.world_size, **progress})
        self._started = time.perf_counter() - store.last()[1]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if not control.should_log:  # otherwise its scalars come next, and all goes into one transaction
            self._commit(state.global_step, {})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keeps the numbers among the logs, and how much memory this process has."""
        scalars = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, numbers.Real)}
        if self._store is not None:
            self._commit(state.global_step, scalars | (memory() if "loss" in scalars else {}))
        elif self._path is not None:  # an evaluation after training
            with closing(RunStore(self._path)) as store:
                store.write(StepRecord(state.global_step, scalars, seconds=store.last()[1]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._store is None:
            return
        self._commit(state.global_step, {})
        summary = {
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "seconds": round(self._seconds(), 3),
            "metrics": self._store.last_scalars(),
            "reward_failures": self._store.sums("rewards/*/failed_*") | self._store.sums("rewards/*/retried"),  # over the whole run
            "episodes_dropped": self._store.sums("episodes/dropped").get("episodes/dropped", 0.0),
            "best_metric": state.best_metric,
            "best_checkpoint": state.best_model_checkpoint,
            "versions": versions(),
        }
        write_json(self._store.path.with_name(SUMMARY_NAME), summary)
        self.close()

    def close(self) -> None:
        """Close the store, also after training failed or was interrupted: another process may go on with the run
        then."""
        self._pending.clear()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _record(self, step: int) -> StepRecord:
        return self._pending.setdefault(step, StepRecord(step))

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _commit(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write what is held of steps up to `step`. What was collected for a later one waits for its own end."""
        if self._store is None:
            return
        self._record(step).scalars = scalars
        for due in sorted(held for held in self._pending if held <= step):
            record = self._pending.pop(due)
            record.seconds = self._seconds()
            self._store.write(record)


def memory() -> dict[str, float]:
    """GiB that the process has in main memory now (where the system tells it), and the most that tensors have held on
    the GPU so far."""
    held = {}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="utf-8") as file:
            held["memory/process_gib"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    if torch.cuda.is_available():
        held["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return held


def versions() -> dict[str, str]:
    """What a run must be compared with when it does not reproduce."""
    return {
        "posttrain": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed into place. NaN and infinities, which JSON lacks, become
    null."""
    write_whole(path, json.dumps(_json(values), indent=2, allow_nan=False) + "\n")


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _floats(values: Floats) -> Sequence[float]:
    return values.detach().float().flatten().tolist() if isinstance(values, torch.Tensor) else values
