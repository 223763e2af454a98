"""The bytes of a job, term by term: while it trains and while it samples. `peak` is the larger of both, since neither
holds its memory during the other.

Counted is what torch would hold, in a later step of a run. What an allocator adds by rounding and gaps is not in it,
but for the holes that glibc keeps on a CPU: they are no few percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from posttrain.memory.job import BYTES, OPTIMIZERS, TrainingJob
from posttrain.memory.shapes import Shape
from posttrain.memory.step import prefill, training_step
from posttrain.sizes import CACHE_TOKENS, DECODE_SCORES, PREFILL_TOKENS, nf4_bytes

CUDA_CONTEXT = 2**29  # bytes that a process takes of a GPU before it has a tensor: about half a GiB
CPU_HOLES = 0.35  # of what a step takes and gives back: measured, benchmarks/plan_accuracy.py

TRAINING = (
    "weights", "adapters", "gradients", "optimizer", "reference", "checkpoints", "activations", "weight_casts", "logprob_tiles", "optimizer_step",
    "holes", "context",
)  # fmt: skip
ROLLOUT = (
    "weights", "adapters", "optimizer", "reference", "inference_copy", "kv_prompts", "kv_completions", "prefill", "sampling", "context",
)  # fmt: skip
WORKING = ("checkpoints", "activations", "weight_casts", "logprob_tiles", "optimizer_step")
HOST = ("checkpoints_host", "optimizer_host")


@dataclass(frozen=True)
class Plan:
    """Bytes. The terms of a phase are what is live at its peak, so they add up to it."""

    job: TrainingJob
    training: dict[str, int]
    rollout: dict[str, int]  # all zero where nothing is sampled
    host: dict[str, int]

    @property
    def train_peak(self) -> int:
        return sum(self.training.values())

    @property
    def rollout_peak(self) -> int:
        return sum(self.rollout.values())

    @property
    def peak(self) -> int:
        return max(self.train_peak, self.rollout_peak)

    @cached_property
    def above(self) -> int:
        """What a training step needs beside what is always there."""
        return sum(self.training[name] for name in WORKING)

    def as_json(self) -> dict[str, Any]:
        """Every term in bytes, under names that stay."""
        return {
            "training": self.training,
            "rollout": self.rollout,
            "host": self.host,
            "train_peak": self.train_peak,
            "rollout_peak": self.rollout_peak,
            "host_peak": sum(self.host.values()),
            "peak": self.peak,
        }


def plan(job: TrainingJob) -> Plan:
    """Milliseconds; needs no torch."""
    always = always_there(job)
    working = training_step(job)
    paged = job.optim.startswith("paged")
    host = {"checkpoints_host": working.host, "optimizer_host": always["optimizer"] if paged else 0}
    if paged:
        always["optimizer"] = 0
    training = dict.fromkeys(TRAINING, 0) | always | working.parts
    if job.device == "cpu":
        training["holes"] = int(CPU_HOLES * sum(training[name] for name in WORKING))
    rollout = dict.fromkeys(ROLLOUT, 0)
    if job.is_online:
        rollout |= always | _sampling(job)
    return Plan(job, training, rollout, host)


def always_there(job: TrainingJob) -> dict[str, int]:
    """What does not depend on how long the texts are."""
    shape = job.shape
    trained, itemsize = shape.parameters, BYTES[job.dtype]
    adapters = 0
    if job.lora_r is not None:
        trained, itemsize = job.adapter_weights, BYTES[job.adapter_dtype]
        adapters = trained * itemsize
    return {
        "weights": weight_bytes(shape, job.dtype, job.load_in_4bit) + job.keep_in_16bit,
        "adapters": adapters,
        "optimizer": int(trained * OPTIMIZERS[job.optim][0 if itemsize == 4 else 1]) + _embedding_state(job),
        "reference": weight_bytes(shape, job.dtype, False) if job.has_reference and job.lora_r is None else 0,
        "context": CUDA_CONTEXT if job.device == "cuda" else 0,
    }


def _embedding_state(job: TrainingJob) -> int:
    """What an 8-bit optimizer takes more: transformers has it keep the state of embeddings in 32 bits."""
    if job.lora_r is not None or "8bit" not in job.optim:
        return 0
    in_8_bits, moments = OPTIMIZERS[job.optim][0], 1 if "lion" in job.optim else 2
    return int(job.shape.embedding_weights * (4 * moments - in_8_bits))


def weight_bytes(shape: Shape, dtype: str, in_4bit: bool) -> int:
    """In 4 bits are the linear layers; embedding, head, norms and biases stay."""
    if not in_4bit:
        return shape.parameters * BYTES[dtype]
    packed = shape.layers * sum(nf4_bytes(linear.weights) for linear in shape.linears)
    return packed + (shape.parameters - shape.linear_weights) * BYTES[dtype]


def _sampling(job: TrainingJob) -> dict[str, int]:
    shape, a = job.shape, job.arithmetic
    size = a.autocast or a.stored  # of keys, values and logits
    rows = min(job.max_concurrent_completions, job.rows)
    prompts = -(-rows // job.generations)
    per_token = 2 * shape.layers * shape.kv * size
    scores = 0 if job.device == "cpu" else 12 * rows * shape.heads * job.completion_length  # float32, three times: plain attention
    piece = min(PREFILL_TOKENS, prompts * job.prompt_length)
    plain = 0 if job.device == "cpu" else 16 * min(DECODE_SCORES, shape.heads * piece * job.prompt_length)
    # The prompts are computed before there are completions, and logits are drawn from after the layers are done.
    before = prefill(job, piece) + plain
    drawing = max(rows * shape.vocab * (2 * size + 12), scores)
    return {
        "inference_copy": _inference_copy(job),
        "kv_prompts": per_token * capacity(prompts, 1) * capacity(job.prompt_length, CACHE_TOKENS),
        "kv_completions": per_token * capacity(rows, 1) * capacity(job.completion_length - 1, CACHE_TOKENS),  # the last token is never fed
        "prefill": max(0, before - drawing),
        "sampling": drawing,
    }


def _inference_copy(job: TrainingJob) -> int:
    """Under autocast, weights in float32 are cast once for a whole rollout."""
    a, shape = job.arithmetic, job.shape
    if a.autocast is None:
        return 0
    stored = shape.parameters - (shape.linear_weights if job.load_in_4bit else 0)
    copied = stored - shape.small_weights if a.stored == 4 else 0
    adapters = job.adapter_weights if a.adapter == 4 else 0
    return (copied + adapters) * a.autocast


def capacity(needed: int, first: int) -> int:
    """What posttrain.rollout.local.cache makes room for: `first`, doubled until it is enough."""
    size = first
    while size < needed:
        size *= 2
    return size
