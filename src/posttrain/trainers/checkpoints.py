"""Checkpoints that are whole or absent: written beside, flushed, then renamed into place. Nothing in them is a pickle but torch's own tensor files.

Also what a resumed run is checked against: its settings, its data, its model.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from posttrain.errors import TrainingError, UserError
from posttrain.text import redacted

MANIFEST = "posttrain.json"  # written last: a checkpoint without it is not one

# Settings that may differ between a run and its continuation: they do not touch what is computed.
MAY_CHANGE = {
    "output_dir", "max_steps", "num_train_epochs", "logging_steps", "logging_dir", "logging_strategy", "logging_first_step", "save_steps", "save_strategy",
    "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "eval_on_start", "eval_delay", "report_to", "run_name", "disable_tqdm", "log_level",
    "log_level_replica", "log_completions", "num_completions_to_print", "log_unique_prompts", "record_tokens_of", "record_megabytes", "resume_from_checkpoint",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "num_generations_eval", "per_device_eval_batch_size", "dataloader_num_workers",
    "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_token", "project", "trackio_space_id", "skip_memory_metrics", "local_rank",
    "reward_timeout", "reward_on_error", "reward_retries", "env_on_error", "memory_check", "activation_offloading",
}  # fmt: skip


@contextlib.contextmanager
def whole(target: Path, *, main: bool = True) -> Iterator[Path]:
    """A directory to write into that becomes `target` on leaving, or vanishes if anything was raised.

    Every process may write into it; `main` makes, flushes and renames it.
    """
    staging = target.parent / f".writing-{target.name}"
    try:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        yield staging
        if main:
            _flush(staging)
            if target.exists():
                remove(target)
            staging.rename(target)
            _flush_directory(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def written_whole(target: Path, *, main: bool) -> Iterator[Path]:
    """As `whole`, in a run's directory. Raises TrainingError when the disk is full or refuses."""
    try:
        with whole(target, main=main) as staging:
            yield staging
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error).lower():
            raise
        last = last_checkpoint(target.parent)
        raise TrainingError(
            f"could not write {target.name}: {error}. Free some space (or set save_total_limit) and resume; {f'{last.name} is whole' if last else 'no earlier checkpoint exists'}."
        ) from error


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    found = checkpoints(output_dir)
    return found[-1] if found else None


def rotate(output_dir: str | Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest nor the best one (`keep`)."""
    if not limit or limit <= 0:
        return
    found = checkpoints(output_dir)
    spared = {found[-1].name} | ({Path(keep).name} if keep else set()) if found else set()
    for path in found[: max(0, len(found) - limit)]:
        if path.name not in spared:
            remove(path)


def remove(directory: Path) -> None:
    """Renamed first: what is half deleted must not look whole."""
    gone = directory.with_name(f".deleting-{directory.name}")
    if gone.exists():
        shutil.rmtree(gone)
    directory.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def check_resumable(checkpoint: Path, processes: int) -> None:
    """Refuse a checkpoint of more or fewer processes, and one without the optimizer: a continuation would make a new one, in silence."""
    if len(list(checkpoint.glob("state-*.json"))) != processes:
        raise UserError(f"{checkpoint} was written by another number of processes; resume with as many as it was started with")
    if not (checkpoint / "optimizer.pt").is_file():
        raise UserError(
            f"{checkpoint} holds weights without the optimizer (save_only_model), so no run can go on from it; give it as `model` to a new one"
        )


def settings_of(args: Any, **more: Any) -> dict[str, Any]:
    """What a continuation must have in common with the run, as JSON values. Secrets are left out: a run may go on with another token."""
    held = {name: value for name, value in args.to_dict().items() if name not in MAY_CHANGE and not name.startswith(("hub_", "push_to_hub"))}
    return redacted(json.loads(json.dumps(held | more, default=str)), dropped=True)


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a continuation under other settings, by name."""
    saved = redacted(saved, dropped=True)  # older versions kept some of them
    changed = [name for name in saved.keys() | now.keys() if name in saved and name in now and saved[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name}: {_short(saved[name])} -> {_short(now[name])}" for name in sorted(changed))
        raise UserError(
            f"cannot resume: this run was started with other settings ({listed}). Put them back, or start a new run in another output_dir."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rows_fingerprint(rows: Any) -> str:
    """A digest of the data: the number of rows and up to 2,000 of them, evenly spread; of a stream the first 20."""
    count = len(rows) if isinstance(rows, Sized) else None
    if count is None:
        return hashlib.sha256(repr(list(itertools.islice(rows, 20))).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    digest = hashlib.sha256(str(count).encode())
    for index in range(0, count, max(1, count // 2000)):
        digest.update(repr(rows[index]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """A digest of the starting weights: every parameter's name, shape and 16 of its values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:16].float().cpu().tolist()
        digest.update(f"{name}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()[:16]
