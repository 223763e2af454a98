"""What is simulated, and what comes out: values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from posttrain.errors import UserError

OPTIMIZERS = ("adamw", "adamw_8bit")
ATTENTIONS = ("fused", "chunked")
KEPT = ("weights", "adapters", "gradients", "optimizer")  # what is there between the micro-batches too


@dataclass(frozen=True)
class Job:
    """One micro-batch of training, the later ones of a run: gradients and the optimizer's state are there already.

    The stream is one prompt with its completions. Other settings have the names and meanings of the trainers'.
    """

    prompt_tokens: int
    completion_tokens: tuple[int, ...]  # the length of every completion in the micro-batch
    lora_rank: int | None = 32  # adapters on all linears. None: every weight is trained
    load_in_4bit: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the weights that are not in 4 bits
    adapter_dtype: torch.dtype = torch.float32
    mixed_precision: bool = True  # bf16 autocast, as trainers have it where the device can
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    tile_rows: int | None = None
    attention: str = (
        "fused"  # a kernel that keeps q, k, v, its output and log-sum-exp; or "chunked": ops.prefix_plain, as on every device but the CPU now
    )
    device: str = "cuda"  # whose dtypes and sizes of tiles are taken

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer={self.optimizer!r}: {' and '.join(OPTIMIZERS)} can be simulated")
        if self.attention not in ATTENTIONS:
            raise UserError(f"attention={self.attention!r}: {' and '.join(ATTENTIONS)} can be simulated")
        if self.load_in_4bit and self.lora_rank is None:
            raise UserError("4-bit weights cannot be trained, only adapters beside them; set lora_rank")

    @property
    def tokens(self) -> int:
        """Of the stream."""
        return self.prompt_tokens + sum(self.completion_tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes. `parts` say what the device held at its peak: weights, adapters, gradients, optimizer, checkpoints (what the forward leaves for the
    backward, the layers' inputs above all) and rest."""

    device: int  # at the peak
    host: int  # at its own peak: what was offloaded
    parts: Mapping[str, int]

    @property
    def above(self) -> int:
        """What the step takes for itself: the peak without weights, adapters, gradients and optimizer."""
        return self.device - sum(self.parts.get(name, 0) for name in KEPT)
