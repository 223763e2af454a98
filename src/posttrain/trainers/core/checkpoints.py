"""Checkpoints that are whole or absent: written beside, flushed, then renamed into place. Nothing in them is a pickle
but torch's own tensor files.

Which there are, how old ones go, and what a process that was killed left behind. What one consists of is in `manifest`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from posttrain.errors import TrainingError, UserError
from posttrain.trainers.core.manifest import MANIFEST, DamagedCheckpoint, Manifest, check_files, read
from posttrain.trainers.core.ranks import gather_json, world_size

ABANDONED = "abandoned-"  # before the name of a checkpoint that is later than the one its run went on from
# What a process that was killed leaves behind: what it was writing, and what it was deleting.
LEFTOVERS = (
    ".writing-checkpoint-*", ".deleting-checkpoint-*", ".writing-model", ".deleting-model", ".writing-reference.safetensors", ".recipe.yaml.tmp",
    ".summary.json.tmp", ".deleting-abandoned-checkpoint-*",
)  # fmt: skip


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A directory to write into that becomes `target` on leaving, or vanishes if anything was raised. Raises OSError
    where the disk refuses."""
    try:
        with _staged(target, main=True) as staging:
            yield staging
    except Exception as error:
        if isinstance(error, OSError) or not is_failed_write(error):
            raise
        raise OSError(f"could not write {target}: {reason(error)}") from error


@contextlib.contextmanager
def _staged(target: Path, *, main: bool) -> Iterator[Path]:
    """Every process may write into it; `main` makes, flushes and renames it."""
    staging = target.parent / f".writing-{target.name}"
    try:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        yield staging
        if main:
            _flush(staging)
            replaced = _out_of_the_way(target) if target.exists() else None
            staging.rename(target)
            _flush_directory(target.parent)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def written_whole(target: Path, *, main: bool) -> Iterator[Path]:
    """As `whole`, in a run's directory: every process may write into it; `main` makes, flushes and renames it.

    Raises TrainingError when the disk is full or refuses.
    """
    try:
        with _staged(target, main=main) as staging:
            yield staging
    except Exception as error:
        if not is_failed_write(error):
            raise
        last = last_checkpoint(target.parent)
        raise TrainingError(
            f"could not write {target.name}: {reason(error)}. Free some space (or set save_total_limit) and resume; {f'{last.name} is whole' if last else 'no earlier checkpoint exists'}."
        ) from error


@contextlib.contextmanager
def by_all_or_none(device: torch.device) -> Iterator[None]:
    """Every process writes its part within; what one of them could not write is raised by all, so that none waits for
    it."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1 or not is_failed_write(error):
            raise
        failure = error
    said = gather_json(None if failure is None else reason(failure), device)
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise OSError(f"process {rank}: {text}")


def is_failed_write(error: BaseException) -> bool:
    """Whether the disk refused. Libraries say it in many ways: torch by any RuntimeError from its writer, tokenizers by
    a bare Exception."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    if isinstance(error, RuntimeError):
        frames = traceback.extract_tb(error.__traceback__)
        return any(frame.filename.replace("\\", "/").endswith("torch/serialization.py") for frame in frames)
    return re.search(r"\(os error \d+\)", str(error)) is not None


def reason(error: BaseException) -> str:
    """The first line of what is wrong. torch says of a full disk only at which byte it stands."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the disk refuses, it may be full ({text})" if isinstance(error, RuntimeError) else text


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb" if os.name == "posix" else "r+b") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
        elif path.is_dir():  # of a second adapter
            _flush_directory(path)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def named_so(output_dir: str | Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest first, whatever is in them."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in named_so(output_dir) if (path / MANIFEST).is_file()]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    found = checkpoints(output_dir)
    return found[-1] if found else None


def newest(output_dir: str | Path) -> Path | None:
    """The one to go on from. It may be damaged, which `read` and `check_files` say: an older one is never taken in its
    place unasked."""
    found = named_so(output_dir)
    return found[-1] if found else None


def where_to_go_on(damaged: Path) -> str:
    """A sentence for whoever cannot go on from this checkpoint: the one before it that is whole. Digests those that it
    looks at."""
    for earlier in reversed(named_so(damaged.parent)):
        if _number(earlier) >= _number(damaged):
            continue
        try:
            check_files(earlier, read(earlier))
        except DamagedCheckpoint:
            continue
        return f"{earlier.name} before it is whole: move {damaged.name} elsewhere and resume, or give train(resume_from_checkpoint={str(earlier)!r})"
    return "no earlier checkpoint there is whole: start over, in another output_dir or with --overwrite"


def _number(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else 0


def rotate(output_dir: str | Path, limit: int | None, spared: Collection[str] = ()) -> None:
    """Delete the oldest checkpoints until there are `limit`, but neither the newest nor those of the names in
    `spared`."""
    if not limit or limit <= 0:
        return
    found = checkpoints(output_dir)
    left = len(found)
    for path in found[:-1]:
        if left > limit and path.name not in spared:
            remove(path)
            left -= 1


def keep_only(best: Path, output_dir: str | Path) -> None:
    """Delete all checkpoints but this one, which must be among them."""
    found = named_so(output_dir)
    if best.resolve() in [path.resolve() for path in found]:
        for path in found:
            if path.resolve() != best.resolve():
                remove(path)


def tidy(output_dir: str | Path) -> None:
    """Remove what a process left that was killed while it wrote or deleted. Only for the one that trains there now."""
    for path in [path for pattern in LEFTOVERS for path in Path(output_dir).glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def abandon_later(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints that are later than the one a run goes on from: they are of another continuation. Returns
    their new names."""
    renamed = []
    for path in named_so(checkpoint.parent):
        if _number(path) > _number(checkpoint):
            aside = path.with_name(ABANDONED + path.name)
            if aside.exists():
                remove(aside)
            path.rename(aside)
            renamed.append(aside)
    return renamed


def remove(directory: Path) -> None:
    """Renamed first: what is half deleted must not look whole."""
    shutil.rmtree(_out_of_the_way(directory), ignore_errors=True)


def _out_of_the_way(directory: Path) -> Path:
    gone = directory.with_name(f".deleting-{directory.name}")
    if gone.exists():
        shutil.rmtree(gone)
    directory.rename(gone)
    return gone


def check_resumable(checkpoint: Path, manifest: Manifest, processes: int) -> None:
    """Refuse a checkpoint of more or fewer processes, and one without the optimizer: a continuation would make a new
    one, in silence."""
    names = set(manifest.files) if manifest.files is not None else {path.name for path in checkpoint.iterdir()}
    if sum(name.startswith("state-") and name.endswith(".json") for name in names) != processes:
        raise UserError(f"{checkpoint} was written by another number of processes; resume with as many as it was started with")
    if "optimizer.pt" not in names:
        raise UserError(
            f"{checkpoint} holds weights without the optimizer (save_only_model), so no run can go on from it; give it as `model` to a new one"
        )
