"""Unsloth's published comparison (February 2025), term by term: GRPO on Llama 3.1 8B, 20K tokens, 8 completions, 510.8
GB against 54.33 GB.

Every term is computed from what is known of its making, beside what was printed. "GB" in it means GiB but for one term,
and 20K is 20,480. The two largest terms are extrapolations: straight lines through tables of the longest contexts that
fit a card (in fine-tuning, one row at a time) carried to the 163,840 tokens of all eight completions in one backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.memory.estimate import Plan, plan
from posttrain.memory.job import TrainingJob
from posttrain.memory.shapes import find_shape
from posttrain.memory.step import log_prob_scratch

GIB = 2**30
TOKENS, COMPLETIONS = 20_480, 8
ALL_TOKENS = TOKENS * COMPLETIONS
# The longest contexts of Llama 3.1 8B in 4 bits that were published for cards of so many GB; the smallest card fits
# nothing the standard way.
CARDS = (8, 12, 16, 24, 40, 48, 80)
STANDARD_CONTEXTS = (None, 932, 2551, 5789, 12264, 15502, 28454)
FRUGAL_CONTEXTS = (2972, 21848, 40724, 78475, 153977, 191728, 342733)


@dataclass(frozen=True)
class PublishedTerm:
    """One line of the table, in the units that were printed."""

    term: str
    standard: float
    standard_printed: float
    frugal: float
    frugal_printed: float
    formula: str
    is_extrapolated: bool
    ours: float  # GiB, of `our_job`


def our_job() -> TrainingJob:
    """The same task with every switch on: a 4-bit base, adapters of rank 32 on all linear layers."""
    return TrainingJob(
        find_shape("llama-3.1-8b"),
        prompt_length=480,
        completion_length=TOKENS - 480,
        generations=COMPLETIONS,
        lora_r=32,
        load_in_4bit=True,
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        optim="adamw_8bit",
        gradient_checkpointing=True,
        activation_offloading=True,
        tile_rows=2048,
        max_concurrent_completions=1,
    )


def table(job: TrainingJob | None = None) -> list[PublishedTerm]:
    """The terms; their sum is the last row. `ours` is the plan of `job`, which trains and samples in turn: its last row
    is the larger phase."""
    ours = plan(job or our_job())
    shape = ours.job.shape
    logits = 2 * 2 * COMPLETIONS * TOKENS * shape.vocab / GIB
    cache = 2 * 2 * shape.layers * TOKENS * shape.kv / GIB
    copy = shape.parameters * 2 / 1e9
    standard, frugal = (_at(ALL_TOKENS, *line_through(contexts)) for contexts in (STANDARD_CONTEXTS, FRUGAL_CONTEXTS))
    rows = [
        PublishedTerm(
            "training",
            standard,
            414,
            frugal,
            42,
            "a line through maximal contexts, carried to 163,840 tokens",
            True,
            (ours.train_peak - ours.training["logprob_tiles"]) / GIB,
        ),
        PublishedTerm(
            "logits of GRPO", logits, 78.3, logits / COMPLETIONS, 9.8, "2 x 2 B x 8 x 20,480 x 128,256; by 8", False, log_prob_scratch(ours.job) / GIB
        ),
        PublishedTerm("copy for inference", copy, 16, 0, 0, "8.03e9 x 2 B, in GB of 10^9", False, ours.rollout["inference_copy"] / GIB),
        PublishedTerm("KV cache", cache, 2.5, cache, 2.5, "2 x 2 B x 32 x 20,480 x 1,024: one completion", False, _cache(ours)),
    ]
    total = PublishedTerm(
        "together",
        sum(row.standard for row in rows),
        510.8,
        sum(row.frugal for row in rows),
        54.33,
        "sums; ours: the larger of training and sampling",
        True,
        ours.peak / GIB,
    )
    return [*rows, total]


def line_through(contexts: tuple[int | None, ...]) -> tuple[float, float]:
    """GB = first + tokens * slope, by least squares. The published points lie within 0.0011 GB of it: they are a
    formula themselves."""
    points = [(tokens, size) for tokens, size in zip(contexts, CARDS, strict=True) if tokens is not None]
    mean_tokens, mean_size = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((tokens - mean_tokens) * (size - mean_size) for tokens, size in points) / sum((tokens - mean_tokens) ** 2 for tokens, _ in points)
    return mean_size - slope * mean_tokens, slope


def _at(tokens: int, first: float, slope: float) -> float:
    return first + tokens * slope


def _cache(ours: Plan) -> float:
    return (ours.rollout["kv_prompts"] + ours.rollout["kv_completions"]) / GIB
