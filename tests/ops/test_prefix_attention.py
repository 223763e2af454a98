"""Shared-prefix attention against softmax over a dense (S, S) mask in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

from posttrain.ops.prefix_attention import prefix_attention
from posttrain.ops.prefix_plain import cut, prefix_attention_plain
from posttrain.ops.prefix_plan import PrefixPlan

CPU = torch.device("cpu")
GROUPS = {  # [(prompt length, completion lengths)]
    "ragged": [(5, [3, 7, 1]), (2, [4, 4]), (9, [6])],
    "one completion each": [(4, [3]), (4, [3])],
    "empty completions": [(3, [0, 2, 0]), (4, [0]), (1, [1])],
    "lengths in several tiles": [(70, [30, 2, 90]), (1, [2]), (20, [40, 40, 41])],
    "several ragged prompts in one tile": [(5, [6, 5]), (6, [6, 4]), (7, [3, 9]), (5, [11])],
    "equal groups": [(4, [5, 5]), (4, [5, 5]), (4, [5, 5])],
}


def segments_of(groups):
    segments, place = [], 0
    for prompt_length, completions in groups:
        prompt = len(segments)
        segments.append((place, prompt_length, None))
        place += prompt_length
        for length in completions:
            segments.append((place, length, prompt))
            place += length
    return segments, place


def dense(q, k, v, segments, *, scaling, window=None):
    """One query at a time, one head at a time, over the keys that the definition names."""
    owner = {}  # place -> (segment, position)
    for index, (start, length, prompt) in enumerate(segments):
        for step in range(length):
            owner[start + step] = (index, step + (0 if prompt is None else segments[prompt][1]))
    repeats = q.shape[1] // k.shape[1]
    rows = []
    for place in range(q.shape[0]):
        segment, position = owner[place]
        visible = [
            other
            for other, (key_segment, key_position) in owner.items()
            if (key_segment == segment or key_segment == segments[segment][2])
            and key_position <= position
            and (window is None or position - key_position < window)
        ]
        rows.append(
            torch.stack([torch.softmax(scaling * k[visible, h // repeats] @ q[place, h], 0) @ v[visible, h // repeats] for h in range(q.shape[1])])
        )
    return torch.stack(rows)


def draw(tokens, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def values_and_grads(function, q, k, v):
    out = function(q, k, v)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, (q, k, v), direction)]


def fused(segments, window=None):
    plan = PrefixPlan(segments, CPU)
    return lambda q, k, v: prefix_attention(q, k, v, plan, scaling=0.3, window=window)


def plain(segments, window=None):
    chunks = cut(segments, window, CPU)
    return lambda q, k, v: prefix_attention_plain(q, k, v, chunks, scaling=0.3)


def assert_near(ours, reference, tolerance):
    for got, wanted in zip(ours, reference, strict=True):
        assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("path", [fused, plain])
@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_equal_a_dense_mask(path, name):
    segments, tokens = segments_of(GROUPS[name])
    inputs = draw(tokens)
    reference = values_and_grads(lambda q, k, v: dense(q, k, v, segments, scaling=0.3), *inputs)
    assert_near(values_and_grads(path(segments), *inputs), reference, 1e-12)


@pytest.mark.parametrize("window", [1, 3, 8, 200])
@pytest.mark.parametrize("name", ["ragged", "lengths in several tiles", "empty completions"])
def test_a_sliding_window_hides_the_far_past_of_the_prompt_too(name, window):
    segments, tokens = segments_of(GROUPS[name])
    inputs = draw(tokens)
    reference = values_and_grads(lambda q, k, v: dense(q, k, v, segments, scaling=0.3, window=window), *inputs)
    assert_near(values_and_grads(fused(segments, window), *inputs), reference, 1e-12)
