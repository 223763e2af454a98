"""The manifest of a checkpoint, posttrain.json: the step, what the run was told, and a digest of every file. Written
last, checked before anything is read.

Manifests of posttrain 0.1 hold a step and settings only: their files are looked at as far as their formats allow, and
that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from posttrain import __version__
from posttrain.errors import UserError
from posttrain.secrets import redacted
from posttrain.trainers.core.fingerprint import Fingerprint

MANIFEST = "posttrain.json"  # a checkpoint without it is not one
SELF = "manifest_sha256"  # of the manifest itself, as it stands without this line
_BLOCK = 2**20
_THREADS = 4
# What a continuation needs, and a model that is loaded to be used does not.
NOT_THE_MODEL = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "state-*.json", "trainer_state.json", "reference.safetensors", "value.safetensors",
)  # fmt: skip

# Settings that may differ between a run and its continuation: they do not touch what is computed.
MAY_CHANGE = {
    "output_dir", "max_steps", "num_train_epochs", "logging_steps", "logging_dir", "logging_strategy", "logging_first_step", "save_steps", "save_strategy",
    "save_total_limit", "save_only_model", "eval_steps", "eval_strategy", "eval_on_start", "eval_delay", "report_to", "run_name", "disable_tqdm", "log_level",
    "log_level_replica", "log_completions", "num_completions_to_print", "log_unique_prompts", "record_tokens_of", "record_megabytes", "resume_from_checkpoint",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "num_generations_eval", "per_device_eval_batch_size", "dataloader_num_workers",
    "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_token", "project", "trackio_space_id", "skip_memory_metrics", "local_rank",
    "reward_timeout", "reward_on_error", "reward_retries", "env_on_error", "memory_check", "activation_offloading",
    "gradient_checkpointing", "activation_checkpointing",
    "restore_callback_states_from_checkpoint",
}  # fmt: skip
# What a run began with, in words.
BEGAN_WITH = {
    "data": "other training rows",
    "eval_data": "other evaluation rows",
    "rubric": "another rubric",
    "model_weights": "other weights at its start",
    "value_weights": "other weights of the value model at its start",
}


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is not what was saved. The message names the checkpoint and the file."""


class ForeignFile(DamagedCheckpoint):
    """A file lies in a checkpoint that was not saved with it. The message says to remove it."""


@dataclass(frozen=True)
class Manifest:
    step: int
    settings: dict[str, Any]  # with the fingerprints of what the run began with
    versions: dict[str, str] = field(default_factory=dict)  # empty: of posttrain 0.1
    chosen: dict[str, Any] = field(default_factory=dict)  # what was chosen by itself and changes the bits
    files: dict[str, tuple[int, str]] | None = None  # path within the checkpoint -> bytes, sha256. None: of posttrain 0.1


def settings_of(args: Any, **more: Any) -> dict[str, Any]:
    """What a continuation must have in common with the run, as JSON values. `more`: fingerprints. Secrets are left out:
    a run may go on with another token."""
    held = {name: value for name, value in args.to_dict().items() if name not in MAY_CHANGE and not name.startswith(("hub_", "push_to_hub"))}
    return redacted(json.loads(json.dumps(held | more, default=str)), dropped=True)


def write(directory: Path, step: int, settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Digest every file of a checkpoint that is complete but for its manifest, and write that."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # hashing does not hold the interpreter
        digests = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)
    }
    values = {"step": step, "versions": versions(), "settings": settings, "chosen": json.loads(json.dumps(chosen)), "files": files}
    (directory / MANIFEST).write_text(_rendered(values), encoding="utf-8")


def versions() -> dict[str, str]:
    return {"posttrain": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}


def read(checkpoint: Path) -> Manifest:
    """Raises DamagedCheckpoint where the manifest is missing, no manifest, changed since it was written, or of another
    checkpoint."""
    try:
        text = (checkpoint / MANIFEST).read_bytes().decode("utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        is_old = SELF not in values and "files" not in values
        settings = values["settings"]
        manifest = Manifest(int(values["step"]), dict(settings)) if is_old else _new(values)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{checkpoint} is no complete checkpoint: {MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} is damaged ({type(error).__name__}: {_first_line(error)})") from error
    if not is_old and text != _rendered({name: value for name, value in values.items() if name != SELF}):
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} is damaged: it was changed since it was written")
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if number and int(number[1]) != manifest.step:
        raise DamagedCheckpoint(f"{checkpoint}: {MANIFEST} is that of another checkpoint, of step {manifest.step}")
    return manifest


def _new(values: dict[str, Any]) -> Manifest:
    files = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in values["files"].items()}
    return Manifest(int(values["step"]), dict(values["settings"]), dict(values["versions"]), dict(values["chosen"]), files)


def _rendered(values: Mapping[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(values, indent=1).encode()).hexdigest()
    return json.dumps({**values, SELF: own}, indent=1)


def check_files(checkpoint: Path, manifest: Manifest, *, only_model: bool = False) -> None:
    """Raises DamagedCheckpoint for the first file that is missing, cut, changed, or was not saved with the others
    (hidden ones aside).

    only_model: those that a model is loaded from, whatever lies beside them.
    """
    if manifest.files is None:
        if not only_model:
            _check_formats(checkpoint, manifest)
        return
    wanted = {name: said for name, said in manifest.files.items() if not (only_model and is_of_the_run(name))}
    for name, (size, _) in wanted.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{checkpoint}: {name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{checkpoint}: {name} is damaged: it has {path.stat().st_size:,} bytes of {size:,}")
    if not only_model:
        there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        for name in sorted(there - manifest.files.keys() - {MANIFEST}):
            if not any(part.startswith(".") for part in name.split("/")):
                raise ForeignFile(f"{checkpoint}: {name} was not saved with this checkpoint; remove it, or put it elsewhere, and resume")
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _digest(checkpoint, name), wanted)
        for (name, (_, expected)), digest in zip(wanted.items(), digests, strict=True):
            if digest != expected:
                raise DamagedCheckpoint(f"{checkpoint}: {name} is damaged: it is not what was saved (its sha256 differs from the one in {MANIFEST})")


def is_of_the_run(name: str) -> bool:
    """Whether a file of a checkpoint belongs to the run and not to its model."""
    return any(Path(name).match(pattern) for pattern in NOT_THE_MODEL)


def check_model(directory: str | Path) -> None:
    """Before a model is loaded to be used: where the directory is a checkpoint, are the model's files those that were
    saved?

    Any other directory, and a checkpoint whose manifest has no digests, passes. Raises DamagedCheckpoint.
    """
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        try:
            values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            has_digests = "files" in values
        except (OSError, ValueError, TypeError) as error:
            raise DamagedCheckpoint(f"{directory}: {MANIFEST} is damaged ({type(error).__name__}: {_first_line(error)})") from error
        if has_digests:
            check_files(directory, read(directory), only_model=True)


def _digest(checkpoint: Path, name: str) -> str:
    try:
        return _sha256(checkpoint / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {name} cannot be read ({error.strerror or error})") from error


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _check_formats(checkpoint: Path, manifest: Manifest) -> None:
    """What can be said without digests: JSON is JSON, archives have the checksums that they hold, tensors have their
    length, counters agree."""
    for name in ("trainer_state.json", "scheduler.pt", "optimizer.pt"):
        if not (checkpoint / name).is_file() and (checkpoint / "optimizer.pt").is_file():
            raise DamagedCheckpoint(f"{checkpoint}: {name} is missing")
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if (bad := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {bad} differs")
            elif path.suffix == ".safetensors":
                with safe_open(str(path), framework="pt"):
                    pass
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{checkpoint}: {path.name} is damaged ({type(error).__name__}: {_first_line(error)})") from error
    state = checkpoint / "trainer_state.json"
    step = json.loads(state.read_text(encoding="utf-8")).get("global_step") if state.is_file() else None
    if step != manifest.step:
        raise DamagedCheckpoint(f"{checkpoint}: trainer_state.json is that of another checkpoint, of step {step}")


def check_same(saved: Manifest, now: Mapping[str, Any], began_with: Mapping[str, Fingerprint]) -> list[str]:
    """Refuse a continuation under other settings, rows or weights, by name. Returns sentences about what could not be
    compared."""
    held = redacted(saved.settings, dropped=True)  # older versions kept some secrets
    changed = {name for name in held.keys() & now.keys() if held[name] != now[name]}
    for name, fingerprint in began_with.items():
        if held.get(name) == fingerprint.sampled:  # of a checkpoint that knew no other
            changed.discard(name)
    if changed:
        listed = ", ".join(f"{name}: {_short(held[name])} -> {_short(now[name])}" for name in sorted(changed - BEGAN_WITH.keys()))
        parts = [f"other settings ({listed})"] if listed else []
        parts += [
            f"{words} ({_other_rewards(held[name], now[name]) if name == 'rubric' else repr(name)})"
            for name, words in BEGAN_WITH.items()
            if name in changed
        ]
        raise UserError(
            f"cannot resume: this run was started with {' and with '.join(parts)}. Put them back, or start a new run in another output_dir."
        )
    unknown = sorted((held.keys() ^ now.keys()) - {"eval_data"})
    return [f"not compared with the checkpoint, which another version wrote: {', '.join(unknown)}"] if unknown else []


def _other_rewards(before: str, now: str) -> str:
    """Which rewards, weights, functions or settings differ, in words."""
    old, new = json.loads(before), json.loads(now)
    parts = [f"without the reward '{name}'" for name in old if name not in new] + [f"the reward '{name}' is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        for what, was, then in zip(("weight", "function", "settings"), old[name], new[name], strict=True):
            parts += [f"{what} of '{name}': {_short(was)} -> {_short(then)}"] if was != then else []
    return ", ".join(parts) or "in another order"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
