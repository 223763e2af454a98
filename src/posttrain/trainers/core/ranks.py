"""Talk between data-parallel processes: JSON over a byte tensor (nothing is pickled), and one process's share of a
list."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """Every process's `value`, in rank order, on all of them. `value` must survive JSON."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def highest(value: int, device: torch.device) -> int:
    """The largest of all processes' values."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether it says that another process is gone. gloo, which CPUs use, raises a plain RuntimeError with its own name
    in it."""
    if world_size() == 1:
        return False
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer")
    )
