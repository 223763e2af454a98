"""What a training sets for its whole process. A stage must not find it in a later one: resumed, that begins in a
process without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def restored() -> Iterator[None]:
    """On leaving, the environment's variables and torch's switches (deterministic algorithms, TF32, cuDNN, default
    dtype) are as they were.

    CUDA reads some variables once, when it is first used: these stay until the process ends.
    """
    backends: Any = torch.backends  # whose fp32_precision (TF32) torch does not declare
    variables, dtype, precision = dict(os.environ), torch.get_default_dtype(), backends.fp32_precision
    deterministic, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        backends.fp32_precision = precision
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
