"""The memory switches of a run around its forward and backward, and what is left to switch on where that is not
enough."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from posttrain.models.load import is_quantised
from posttrain.models.tiles import check_tiles, tiled
from posttrain.ops.offload import offloading
from posttrain.sizes import AUTO_TILE_ROWS
from posttrain.trainers.core.config import BaseConfig


class MemorySwitches:
    """`activation_offloading` and `tile_rows` of one run, which are definite by then (switches.py)."""

    def __init__(self, args: BaseConfig, model: nn.Module) -> None:
        self.device = args.device
        self.tile_rows: int | None = args.tile_rows  # type: ignore[assignment]
        if self.tile_rows is not None:
            check_tiles(model, strict="tile_rows" not in args.chosen)
        self.offloads = bool(args.activation_offloading)

    def forward(self) -> AbstractContextManager[object]:
        """Around the forward of a micro-batch only."""
        return offloading(self.device) if self.offloads else nullcontext()

    def tiles(self, model: nn.Module) -> AbstractContextManager[object]:
        """Around the forward of a micro-batch and its backward."""
        return nullcontext() if self.tile_rows is None else tiled(model, self.tile_rows)


def advice(args: BaseConfig, switches: MemorySwitches, model: nn.Module) -> str:
    """What is left to switch on, in the order of what it costs."""
    left = [
        (not args.gradient_checkpointing, "gradient_checkpointing=True"),
        (switches.tile_rows is None, f"tile_rows={AUTO_TILE_ROWS}"),
        (not switches.offloads and args.device.type != "cpu", "activation_offloading=True"),
        (not str(args.optim).endswith("8bit"), "optim='adamw_8bit'"),
        (type(model).__module__.split(".")[0] != "peft", "LoRA (model.lora, or peft_config)"),
        (not is_quantised(model), "4-bit weights (load_in_4bit) beside adapters"),
        (True, "shorter prompts or completions"),
    ]
    return f"try {', '.join(what for is_left, what in left if is_left)}; `posttrain plan` says what each of them saves"
