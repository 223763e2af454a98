"""What a run began with, as digests: every value of every row and of every parameter. A resumed run is compared with
them.

A digest carries the version of its recipe ("2:..."). Those without one are of version 1, which read a sample only; a
checkpoint that holds them is still compared the way it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

VERSION = "2"
STREAMED = 20  # rows of a stream that are digested: nobody knows how many there are, and reading them may be expensive
_AT_ONCE = 1000  # rows of an Arrow table that become Python objects together
_THREADS = 8
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Fingerprint(NamedTuple):
    """now: of everything. sampled: as version 1 made it, for checkpoints of that time."""

    now: str
    sampled: str


def of_rows(rows: Any) -> Fingerprint:
    """Of all rows, in their order; of a stream its first ones. About a second for 100,000 rows of 400 characters."""
    count = len(rows) if isinstance(rows, Sized) else None
    digest = hashlib.sha256(str(count).encode())
    for row in _each(rows) if count is not None else itertools.islice(rows, STREAMED):
        digest.update(_text(row).encode() + b"\n")
    return Fingerprint(f"{VERSION}:{digest.hexdigest()[:32]}", _sampled_rows(rows, count))


def of_weights(model: torch.nn.Module) -> Fingerprint:
    """Of every parameter's name, shape, type and bytes. About 1.3 s a GB and thread on a processor with SHA
    instructions."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # hashing does not hold the interpreter
        parts = list(pool.map(lambda named: _parameter(*named), model.named_parameters()))
    return Fingerprint(f"{VERSION}:{hashlib.sha256(''.join(parts).encode()).hexdigest()[:32]}", _sampled_weights(model))


def _parameter(name: str, parameter: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
    plain = parameter.detach().as_subclass(torch.Tensor)  # packed weights are of a class whose moves between devices repack them
    digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _each(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows; of a `datasets.Dataset` many at a time, which is five times as fast."""
    if "datasets" not in sys.modules or not isinstance(rows, sys.modules["datasets"].Dataset):
        yield from rows
        return
    for batch in rows.iter(batch_size=_AT_ONCE):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _text(row: Any) -> str:
    try:
        return _ENCODER.encode(row)
    except (TypeError, ValueError):  # keys that JSON lacks
        return _ADDRESS.sub("", repr(row))


def _plain(value: Any) -> Any:
    """What JSON lacks: records by their fields, arrays as lists, sets in order, anything else by its type and what it
    says of itself, but for its address."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        return value.tolist()
    if isinstance(value, (set, frozenset)):  # whose order is another one in every process
        return [type(value).__name__, sorted(map(_text, value))]
    return [type(value).__name__, _ADDRESS.sub("", repr(value))]


_ENCODER = json.JSONEncoder(default=_plain)


# Version 1


def _sampled_rows(rows: Any, count: int | None) -> str:
    if count is None:
        return hashlib.sha256(repr(list(itertools.islice(rows, 20))).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    digest = hashlib.sha256(str(count).encode())
    for index in range(0, count, max(1, count // 2000)):
        digest.update(repr(rows[index]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _sampled_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:16].float().cpu().tolist()
        digest.update(f"{name}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()[:16]
