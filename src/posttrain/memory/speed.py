"""How long a step takes at least: its arithmetic at a card's full rate, and its reading of memory at full bandwidth.

A lower bound, not a prediction: no run reaches either rate, and what is launched one kernel at a time stays far below.
What it is good for is comparing settings, and telling hours from weeks. S tokens of all streams, P, R, G as in
`job.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.memory.estimate import weight_bytes
from posttrain.memory.job import TrainingJob


@dataclass(frozen=True)
class Least:
    """Of one rollout and the update it feeds: multiplications and additions, bytes read, and the least seconds of
    both."""

    update_flops: float
    update_seconds: float
    rollout_bytes: float
    rollout_seconds: float


def least_time(job: TrainingJob, tflops: float, bandwidth: float) -> Least:
    """tflops: 10^12 operations a second in the precision that is used; bandwidth: 10^9 bytes a second."""
    flops, read = update_flops(job), rollout_bytes(job)
    return Least(flops, flops / (tflops * 1e12), read, read / (bandwidth * 1e9))


def update_flops(job: TrainingJob) -> float:
    """2 a weight and token in each direction: forward, gradients of inputs, gradients of weights where they are
    trained, and the forward again under gradient checkpointing, the linear layers' in tiles too; attention over half of
    the pairs; the head over the trained tokens, its logits made again in the backward of one that is trained, unless
    its gradient is known."""
    shape, groups = job.shape, job.rows / job.generations
    parts = -(-job.generations // job.rows_in_stream)  # a split group repeats its prompt
    tokens = groups * (parts * job.prompt_length + job.generations * job.completion_length)
    targets = job.rows * job.completion_length
    again = 1 if job.gradient_checkpointing else 0
    linear_again = 1 if job.gradient_checkpointing or (job.tile_rows is not None and job.tile_rows < job.streams[0]) else 0
    of_weights = 1 if job.lora_r is None else 0
    linear = 2 * tokens * (shape.linear_weights * (2 + linear_again + of_weights) + job.adapter_weights * (3 + linear_again))
    length = job.prompt_length + job.completion_length
    pairs = 0.0  # of all layers: a completion's queries are those of a whole row without the prompt's
    for window in shape.windows:
        prompt = _pairs(job.prompt_length, window)
        pairs += groups * parts * prompt + job.rows * (_pairs(length, window) - prompt)
    attention = 4 * pairs * shape.q * (1 + again + 2.5)  # the backward of a fused kernel: five products of the forward's two
    head = 2 * targets * shape.vocab * shape.hidden * (2 + (2 - job.passes_head_once) * of_weights)
    return linear + attention + head


def _pairs(length: int, window: int | None) -> float:
    """Of queries with the keys that they see: all before them, or the last `window`."""
    seen = length if window is None else min(window, length)
    return seen**2 / 2 + (length - seen) * seen


def rollout_bytes(job: TrainingJob) -> float:
    """Every token reads all weights once for all rows that are decoded together, and each row its own cache, the
    prompt's once a group."""
    if not job.is_online:
        return 0.0
    shape, size = job.shape, job.arithmetic.autocast or job.arithmetic.stored
    weights = weight_bytes(shape, "bfloat16" if size == 2 else job.dtype, job.load_in_4bit)
    if not shape.tied:  # of an embedding that is no head, a row a token
        weights -= shape.embedding_weights * size
    together = min(job.max_concurrent_completions, job.rows)
    rounds = -(-job.rows // together)
    cache = 2 * shape.layers * shape.kv * size
    prompts = -(-together // job.generations)
    per_token = weights + cache * (prompts * job.prompt_length + together * job.completion_length / 2)
    return float(rounds * job.completion_length * per_token)
