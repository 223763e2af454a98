"""What a plan is about: a model, how it is trained, how long its texts are. Values only, under the names of the
trainers' settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.memory.layer import Arithmetic
from posttrain.memory.shapes import Shape
from posttrain.sizes import MICRO_BATCH_TOKENS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ATTENTION = {"cpu": "fused", "cuda": "chunked"}  # posttrain.ops.prefix_attention

# Optimizer -> bytes of state for a weight in float32, in 16 bits. torch's keep their state in the dtype of the weight.
OPTIMIZERS = {
    "adamw_torch": (8.0, 4.0),
    "adamw_torch_fused": (8.0, 4.0),
    "adamw_8bit": (2 + 8 / 256, 2 + 8 / 256),  # bitsandbytes: two bytes, two float32 scales a block of 256
    "adamw_bnb_8bit": (2 + 8 / 256, 2 + 8 / 256),
    "paged_adamw_32bit": (8.0, 8.0),
    "paged_adamw_8bit": (2 + 8 / 256, 2 + 8 / 256),
    "lion_8bit": (1 + 4 / 256, 1 + 4 / 256),
    "sgd": (0.0, 0.0),
}


def loaded_dtype(stored: str, autocast: str | None, beside_adapters: bool) -> str:
    """Of weights whose dtype nobody has set: float32, which an optimizer can update; frozen beside adapters they stay
    in the 16 bits of their checkpoint where that is the precision that the run computes in."""
    return stored if beside_adapters and stored == autocast else "float32"


@dataclass(frozen=True)
class TrainingJob:
    """One run on one device. Lengths are the longest that may occur, since memory is decided by them."""

    shape: Shape
    prompt_length: int  # P, tokens
    completion_length: int  # R, tokens
    generations: int = 8  # G, completions of a prompt. 1 and not online: rows of text, as in SFT
    rollout_size: int | None = None  # completions of one rollout; None: one group
    is_online: bool = True  # it samples what it learns from
    keeps_groups: bool = False  # the completions of a prompt meet in the loss, so all of them are in one micro-batch
    lora_r: int | None = None  # None: every weight is trained
    lora_targets: tuple[str, ...] | None = None  # names of the linear layers that have adapters; None: all
    load_in_4bit: bool = False
    keep_in_16bit: int = 0  # bytes that linear layers which are not quantised take more
    dtype: str = "float32"  # of the weights that are not in 4 bits
    adapter_dtype: str = "float32"
    bf16: bool = True  # autocast
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    tile_rows: int | None = None
    max_tokens_per_micro_batch: int | None = None
    max_concurrent_completions: int = 256
    has_reference: bool = False  # a frozen copy beside a model that is trained whole
    has_known_gradient: bool = False  # that of the log-probs does not depend on them: in SFT, and on-policy without a KL term in the loss
    device: str = "cuda"
    attention: str | None = None  # "fused": by a kernel; "chunked": under explicit masks. None: as it is on that device
    emulates_bf16: bool = False  # a CPU that computes bf16 weights in float32

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("adapter_dtype", self.adapter_dtype)):
            if value not in BYTES:
                raise UserError(f"{name}={value!r}: use one of {', '.join(BYTES)}")
        if self.device not in ATTENTION:
            raise UserError(f"device={self.device!r}: use one of {', '.join(ATTENTION)}")
        if self.optim not in OPTIMIZERS:
            raise UserError(f"optim={self.optim!r} is not known to the plan; it knows {', '.join(OPTIMIZERS)}.{did_you_mean(self.optim, OPTIMIZERS)}")
        if self.load_in_4bit and self.lora_r is None:
            raise UserError("4-bit weights cannot be trained, only adapters beside them; give --lora-r too")
        lengths = {"prompt_length": self.prompt_length, "completion_length": self.completion_length, "generations": self.generations}
        for name, length in lengths.items():
            if length < 1:
                raise UserError(f"{name}={length}: use 1 or more")

    @property
    def context(self) -> int:
        """Tokens of the longest single row."""
        return self.prompt_length + self.completion_length

    @property
    def rows(self) -> int:
        """Completions of one rollout."""
        return self.rollout_size or self.generations

    @property
    def rows_in_stream(self) -> int:
        """Completions of a prompt that one micro-batch holds at most: as many as the token budget lets in, at least
        one."""
        if self.keeps_groups:
            return self.generations
        budget = self.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS
        return max(1, min(self.generations, (budget - self.prompt_length) // self.completion_length))

    @property
    def adapter_weights(self) -> int:
        return 0 if self.lora_r is None else self.shape.adapter_weights(self.lora_r, self.lora_targets)

    @property
    def streams(self) -> tuple[int, int]:
        """Tokens and trained targets of the largest micro-batch: groups side by side up to the budget, or one prompt
        with its completions."""
        budget, rows = self.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS, self.rows_in_stream
        tokens = self.prompt_length + rows * self.completion_length
        groups = max(1, min(budget // tokens, self.rows // rows))
        return groups * tokens, groups * rows * self.completion_length

    @property
    def micro_batches(self) -> int:
        """Of a rollout, which is an update's where one rollout feeds one; of an update where the data hold completions."""
        return -(-self.rows * self.completion_length // self.streams[1])

    @property
    def gradient_bytes(self) -> int:
        """Of all that is trained, once they are there."""
        return self.shape.parameters * BYTES[self.dtype] if self.lora_r is None else self.adapter_weights * BYTES[self.adapter_dtype]

    @property
    def arithmetic(self) -> Arithmetic:
        stored = BYTES[self.dtype]
        autocast = 2 if self.bf16 and not self.emulates_bf16 else None
        return Arithmetic(
            stored=stored,
            autocast=autocast,
            four_bits=self.load_in_4bit,
            trains_weights=self.lora_r is None,
            rank=self.lora_r,
            targets=self.lora_targets,
            adapter=BYTES[self.adapter_dtype],
            is_fused=(self.attention or ATTENTION[self.device]) == "fused",
            attention_work=4 if self.emulates_bf16 else None,
            is_bridged=self.rows_in_stream > 1,
            tile_rows=self.tile_rows,
        )

    @property
    def passes_head_once(self) -> bool:
        """Of a head that is trained: posttrain.ops.linear_logprobs makes its gradients in the forward."""
        a = self.arithmetic
        return self.has_known_gradient and a.trains_weights and a.stored == 4 and a.autocast is None

    def but(self, **changes: Any) -> TrainingJob:
        return replace(self, **changes)
