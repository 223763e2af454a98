"""Per-token numbers as bytes: little-endian, standard library only, the same on every machine.

Log-probs keep float32, because small differences between two of them matter. The rest is for looking at, in float16. A
ratio is kept as its distance from 1: there float16 is as fine as 6e-8, where it would otherwise be blind below 1e-3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_HALF_MAX = 65504.0  # the largest float16; larger magnitudes are kept as this one, NaN as NaN


def pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def unpack_ids(blob: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(blob) // 4}i", blob))


def pack_floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def unpack_floats(blob: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(blob) // 4}f", blob))


def pack_halves(values: Sequence[float] | None, offset: float = 0.0) -> bytes | None:
    """None stays None: the quantity was not computed."""
    if values is None:
        return None
    return struct.pack(f"<{len(values)}e", *(min(max(value - offset, -_HALF_MAX), _HALF_MAX) for value in values))


def unpack_halves(blob: bytes | None, offset: float = 0.0) -> list[float] | None:
    if blob is None:
        return None
    return [value + offset for value in struct.unpack(f"<{len(blob) // 2}e", blob)]
