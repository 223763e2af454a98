"""A training step on the tape: embedding, layers, last norm, the log-probs of the targets, and all of it backwards.

The step is a later one of a run: the optimizer's state is there already; and so are gradients, where an update has
several micro-batches. S tokens, N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from posttrain.memory.job import BYTES, TrainingJob
from posttrain.memory.layer import Arithmetic, Layer
from posttrain.memory.shapes import Shape
from posttrain.memory.tape import GRADIENTS, Storage, Tape, Tensor
from posttrain.sizes import LOGIT_ELEMENTS, LOGIT_ROWS, WHOLE_ROWS

TILES = "logprob_tiles"


@dataclass(frozen=True)
class Working:
    """Bytes that a step needs beside weights, adapters and optimizer: by part at the peak, and on the host."""

    parts: dict[str, int]
    host: int


@lru_cache(maxsize=256)
def training_step(job: TrainingJob) -> Working:
    """The largest micro-batch of the job, and the optimizer step after it."""
    tokens, targets = job.streams
    t = Tape(offloads=job.activation_offloading and job.device != "cpu", is_first=job.micro_batches == 1)
    loss = _forward(t, job, tokens, targets)
    assert loss.slot is not None
    t.backward(loss.slot, Storage(t.memory, loss.size))
    parts = {name: size for name, size in t.memory.peak_parts.items() if size}
    if job.micro_batches > 1:
        parts[GRADIENTS] = job.gradient_bytes
    update = {GRADIENTS: job.gradient_bytes, "optimizer_step": _optimizer_scratch(job)}  # when the optimizer steps, all gradients are there
    if sum(parts.values()) < sum(update.values()):
        parts = update
    return Working(parts, t.host)


def _optimizer_scratch(job: TrainingJob) -> int:
    """Fused kernels and bitsandbytes work in place. torch's plain AdamW makes the root of its second moments, on a GPU
    of all weights at once."""
    if job.optim != "adamw_torch":
        return 0
    if job.device == "cuda":
        return job.gradient_bytes
    shape, itemsize = job.shape, BYTES[job.dtype if job.lora_r is None else job.adapter_dtype]
    widest = max(shape.linears, key=lambda linear: linear.weights)
    largest = max(shape.embedding_weights, widest.weights) if job.lora_r is None else job.lora_r * max(widest.inputs, widest.outputs)
    return 2 * largest * itemsize


def _forward(t: Tape, job: TrainingJob, tokens: int, targets: int) -> Tensor:
    shape, a = job.shape, job.arithmetic
    angles = [Storage(t.memory, 2 * tokens * shape.head_dim * a.stored) for _ in set(shape.windows)]
    trained = (shape.linear_weights * a.stored if a.trains_weights else job.adapter_weights * a.adapter) // shape.layers
    x = _embed(t, shape, a, tokens)
    casts: list[Storage] = []  # autocast keeps those of weights that are trained, until the forward ends
    for window in shape.windows:
        layer = Layer(shape, a, tokens, window)
        x = _checkpointed(t, layer, x, trained) if job.gradient_checkpointing else layer(t, x)
        casts.append(Storage(t.memory, _kept_casts(job), "weight_casts"))
    x = Layer(shape, a, tokens, None).norm(t, x)
    picked = t.op(targets * shape.hidden, x.itemsize, x)
    del x
    logps = _log_probs(t, job, picked)
    del casts, angles
    return logps


def _embed(t: Tape, shape: Shape, a: Arithmetic, tokens: int) -> Tensor:
    grad = shape.embedding_weights * a.stored if a.trains_weights else 0
    after = grad if shape.tied else 0  # the sum with the head's, which waited for it
    return t.op(
        tokens * shape.hidden, a.stored, weight_grad=grad, weights=grad, after=after, trains=a.trains_weights, is_tied=shape.tied and a.trains_weights
    )


def _checkpointed(t: Tape, layer: Layer, x: Tensor, trained: int) -> Tensor:
    """Keeps x, and computes the layer again in its backward. trained: bytes of its weights' gradients."""
    x.storage.relabel("checkpoints")
    forward, backward = layer_peaks(layer.shape, layer.a, layer.tokens, layer.window)
    return t.op(x.elements, x.itemsize, x, saves=(x,), work=forward, back_work=backward, weights=trained, trains=True)


@lru_cache(maxsize=256)
def layer_peaks(shape: Shape, a: Arithmetic, tokens: int, window: int | None) -> tuple[int, int]:
    """What a layer takes beside its input and output: in a forward that keeps nothing, and in one that is followed by
    its backward beside its input and the gradients of both ends."""
    layer = Layer(shape, a, tokens, window)
    t = Tape(recording=False)
    x = t.tensor(tokens * shape.hidden, a.stored)
    out = layer(t, x)
    forward = t.memory.peak - x.size - out.size
    t = Tape()
    x = t.tensor(tokens * shape.hidden, a.stored, wants_grad=True)
    grad = Storage(t.memory, x.size)  # of the output: it was there before the layer is computed again
    slot = layer(t, x).slot
    assert slot is not None
    t.backward(slot, grad)
    return forward, t.memory.peak - 3 * x.size


def _kept_casts(job: TrainingJob) -> int:
    """Of one layer."""
    a = job.arithmetic
    if a.autocast is None:
        return 0
    if a.trains_weights:
        return job.shape.linear_weights // job.shape.layers * a.autocast if a.stored == 4 else 0
    return job.adapter_weights // job.shape.layers * a.autocast if a.adapter == 4 else 0


def _log_probs(t: Tape, job: TrainingJob, hidden: Tensor) -> Tensor:
    shape, a, targets = job.shape, job.arithmetic, hidden.elements // job.shape.hidden
    forward, backward = _head_scratch(job, targets, hidden.itemsize)
    grad = shape.vocab * shape.hidden * a.stored if a.trains_weights else 0
    saves = (hidden, Storage(t.memory, 2 * targets * 4))
    return t.op(
        targets, 4, hidden, saves=saves, work=forward, back_work=backward, weight_grad=grad,
        weights=0 if shape.tied else grad,  # a tied weight's gradient is kept once, by the embedding
        trains=a.trains_weights, is_tied=shape.tied and a.trains_weights, label=TILES,
    )  # fmt: skip


def log_prob_scratch(job: TrainingJob) -> int:
    """What the log-probs of a micro-batch take for themselves, whether or not the peak falls into them."""
    return max(_head_scratch(job, job.streams[1], job.arithmetic.stored))


def _head_scratch(job: TrainingJob, targets: int, itemsize: int) -> tuple[int, int]:
    """posttrain.ops.linear_logprobs on hidden (N, D) of that itemsize: scratch of its forward and of its backward.

    Of a frozen head the forward makes the gradient's direction, which is kept instead of the hidden states; of one that
    is passed once, all gradients.
    """
    shape, a = job.shape, job.arithmetic
    if job.passes_head_once:
        in_cache = max(1, min(targets, LOGIT_ELEMENTS[job.device] // shape.vocab))
        at_once = max(in_cache, min(targets, WHOLE_ROWS))
        gradients = (shape.vocab + targets) * shape.hidden
        return (gradients + (at_once + in_cache) * shape.vocab + 6 * targets) * 4, 0
    size = 4 if job.emulates_bf16 else a.autocast or itemsize  # of what is multiplied
    rows = min(targets, LOGIT_ROWS[job.device])
    columns = min(shape.vocab, max(64, LOGIT_ELEMENTS[job.device] // rows // 64 * 64))
    elements, tile = targets * shape.hidden, rows * columns
    operand = elements * size if size != itemsize else 0
    slice_of_weight = columns * shape.hidden * size if size != a.stored else 0
    rounding = 0 if size == 4 else tile * size  # products in 16 bits on their way to float32
    forward = operand + 6 * targets * 4 + 2 * tile * 4 + slice_of_weight + rounding
    wide = elements * 4  # gradients gather in float32
    if not a.trains_weights:
        gathering = slice_of_weight + rounding + (rows * shape.hidden * size if size != 4 else 0)
        ending = (elements * itemsize if itemsize != 4 else 0) + rows * shape.hidden * (4 if size == 4 else size + 4)
        return operand + 6 * targets * 4 + wide + 2 * tile * 4 + max(gathering, ending), 0
    scaled = elements * size
    making = operand + wide + (scaled if size != 4 else 0)
    shares = rows * shape.hidden * size if size != 4 else 0
    head_work = columns * shape.hidden * 8 if a.stored != 4 else 0
    before = rounding if tile < targets * shape.vocab else 0  # the gradient of the tile before, until the next one's is made
    tiles = operand + scaled + wide + 2 * tile * 4 + slice_of_weight + rounding + max(before, shares, head_work)
    return forward, max(making, tiles)


def prefill(job: TrainingJob, tokens: int) -> int:
    """A forward of `tokens` prompt tokens that keeps nothing, beside the cache."""
    shape = job.shape
    a = job.arithmetic
    stream = tokens * shape.hidden * a.stored
    angles = 2 * tokens * shape.head_dim * a.stored
    layer = max(layer_peaks(shape, a, tokens, window)[0] for window in set(shape.windows))
    return 2 * stream + angles + layer
