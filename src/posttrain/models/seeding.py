"""Weights that are made rather than loaded depend on a seed alone: adapters, heads, models from scratch, what a
checkpoint lacks.

transformers and PEFT draw them from the global random generators, whose state differs from process to process. Not for
what training draws: completions, orders and noise have generators of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch (on every device), numpy and Python begin at `seed`; on leaving they go on
    where they were."""
    numbers, array_numbers = random.getstate(), np.random.get_state()
    device_type = _accelerator()
    on_mps = torch.mps.get_rng_state() if device_type == "mps" else None  # which fork_rng asks by device number, and that it has none
    devices = range(torch.get_device_module(device_type).device_count()) if device_type not in (None, "mps") else ()
    try:
        with torch.random.fork_rng(devices, device_type=device_type or "cuda"):
            set_seed(seed)
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(array_numbers)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)


def _accelerator() -> str | None:
    """The type of device beside the CPU that this machine has."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type
