"""The reference's log-probs, computed once and kept as safetensors beside a key: of which data, which weights and which
settings they are.

A file whose key differs is refused, never used and never overwritten: it may have cost hours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from posttrain.errors import TrainingError, UserError

FILE = "reference.safetensors"


def load(path: Path, key: dict[str, str]) -> list[list[float]]:
    """What was saved under `key`. Raises UserError for a file of other data, weights or settings, or one that cannot be
    read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            held, logps = file.metadata() or {}, file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and the reference's log-probs are computed again") from error
    changed = [name for name, value in key.items() if held.get(name) != value]
    if changed:
        raise UserError(
            f"{path} holds reference log-probs of other {' and '.join(changed)}; delete it to compute them again, or use another output_dir"
        )
    return logps.tolist()


def save(path: Path, key: dict[str, str], logps: list[list[float]]) -> None:
    """Whole or not at all. Raises TrainingError where the disk refuses."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": torch.tensor(logps, dtype=torch.float64)}, str(beside), metadata=key)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise TrainingError(f"could not write {path}: {error}. Free some space and start again") from error


def digest_of_data(token_ids: Iterable[object]) -> str:
    """Of everything that goes through the model."""
    digest = hashlib.sha256()
    for ids in token_ids:
        digest.update(json.dumps(ids).encode())
    return digest.hexdigest()[:32]


def digest_of_weights(model: nn.Module) -> str:
    """Of every weight, whole."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
