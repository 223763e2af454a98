"""Shared-prefix attention against softmax under a dense (S, S) mask in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from posttrain.ops import prefix_plan
from posttrain.ops.prefix_attention import prefix_attention
from posttrain.ops.prefix_plain import prefix_attention_plain
from posttrain.ops.prefix_plan import PrefixPlan

CPU = torch.device("cpu")
SCALING = 0.3
GROUPS = {  # [(prompt length, completion lengths)]
    "ragged": [(5, [3, 7, 1]), (2, [4, 4]), (9, [6])],
    "one completion each": [(4, [3]), (4, [3])],
    "empty completions": [(3, [0, 2, 0]), (4, [0]), (1, [1])],
    "large and small": [(70, [30, 2, 90]), (1, [2]), (20, [40, 40, 41])],
    "ragged prompts side by side": [(5, [6, 5]), (6, [6, 4]), (7, [3, 9]), (5, [11])],
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


def dense(segments, window=None):
    """The definition, place by place."""
    owner = {}  # place -> (segment, position)
    for index, (start, length, prompt) in enumerate(segments):
        for step in range(length):
            owner[start + step] = (index, step + (0 if prompt is None else segments[prompt][1]))

    def sees(query, key):
        (segment, position), (key_segment, key_position) = owner[query], owner[key]
        return key_segment in (segment, segments[segment][2]) and key_position <= position and (window is None or position - key_position < window)

    mask = torch.tensor([[sees(query, key) for key in range(len(owner))] for query in range(len(owner))])

    def attend(q, k, v):
        repeats = q.shape[1] // k.shape[1]
        heads = [
            torch.softmax((SCALING * q[:, h] @ k[:, h // repeats].T).masked_fill(~mask, -torch.inf), -1) @ v[:, h // repeats]
            for h in range(q.shape[1])
        ]
        return torch.stack(heads, 1)

    return attend


def draw(tokens, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def values_and_grads(attend, q, k, v):
    out = attend(q, k, v)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), direction)]


def fused(segments, window=None):
    plan = PrefixPlan(segments, CPU)
    return lambda q, k, v: prefix_attention(q, k, v, plan, scaling=SCALING, window=window)


def plain(segments, window=None):
    chunks = PrefixPlan(segments, CPU).chunks(window)
    return lambda q, k, v: prefix_attention_plain(q, k, v, chunks, scaling=SCALING)


def assert_near(ours, reference, tolerance):
    for got, wanted in zip(ours, reference, strict=True):
        assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    ("path", "scores_per_task"), [(fused, 10**9), (fused, 0), (fused, 300), (plain, 0)], ids=["whole", "by segment", "mixed", "plain"]
)
def test_values_and_gradients_equal_a_dense_mask(path, scores_per_task, name, monkeypatch):
    monkeypatch.setattr(prefix_plan, "SCORES_PER_TASK", scores_per_task)
    segments, tokens = segments_of(GROUPS[name])
    inputs = draw(tokens)
    assert_near(values_and_grads(path(segments), *inputs), values_and_grads(dense(segments), *inputs), 1e-12)


@pytest.mark.parametrize("window", [1, 3, 8, 200])
@pytest.mark.parametrize("name", ["ragged", "large and small", "empty completions"])
def test_a_sliding_window_hides_the_far_past_of_the_prompt_too(name, window):
    segments, tokens = segments_of(GROUPS[name])
    inputs = draw(tokens)
    assert_near(values_and_grads(fused(segments, window), *inputs), values_and_grads(dense(segments, window), *inputs), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("path", [fused, plain])
def test_lower_precisions_stay_within_their_rounding(path, dtype, tolerance):
    segments, tokens = segments_of(GROUPS["large and small"])
    low = draw(tokens, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    ours = values_and_grads(path(segments), *low)
    assert {x.dtype for x in ours} == {dtype}
    assert_near(ours, values_and_grads(dense(segments), *exact), tolerance)


def test_siblings_do_not_see_each_other_nor_another_group():
    segments, tokens = segments_of([(3, [4, 5]), (2, [3])])
    q, k, v = draw(tokens)
    before = fused(segments)(q, k, v)
    changed = slice(3, 7)  # the first completion
    q2, k2, v2 = (x.detach().clone() for x in (q, k, v))
    for x in (q2, k2, v2):
        x[changed] += 1.0
    after = fused(segments)(q2, k2, v2)
    untouched = [place for place in range(tokens) if place not in range(3, 7)]
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[changed], after[changed])


def test_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr(prefix_plan, "SCORES_PER_TASK", 0)
    segments, tokens = segments_of([(2, [2, 1]), (1, [1])])
    inputs = draw(tokens, heads=2, kv_heads=1, size=3)
    assert torch.autograd.gradcheck(fused(segments), inputs)


def test_inputs_may_come_in_different_dtypes_and_inside_autocast():
    segments, tokens = segments_of(GROUPS["ragged"])
    q, k, v = draw(tokens, dtype=torch.float32)
    half = v.detach().bfloat16().requires_grad_()
    reference = dense(segments)(q.detach().double(), k.detach().double(), half.detach().double())
    assert fused(segments)(q, k, half).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(segments)(q, k, half)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (q.grad.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)
    assert (out.double() - reference).abs().max() < 3e-2


def test_a_checkpointed_call_has_the_same_gradients():
    segments, tokens = segments_of(GROUPS["large and small"])
    inputs = draw(tokens)
    attend = fused(segments)
    ours = values_and_grads(lambda *x: checkpoint(attend, *x, use_reentrant=False), *inputs)
    for a, b in zip(ours, values_and_grads(attend, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [None, 4])
def test_both_paths_run_on_fake_tensors(window):
    segments, tokens = segments_of(GROUPS["large and small"])
    with FakeTensorMode():
        for path in (fused, plain):
            q, k, v = (torch.empty(tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
            out = path(segments, window)(q, k, v)
            out.sum().backward()
            assert out.shape == (tokens, 4, 8)
            assert k.grad.shape == k.shape


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_memory_grows_with_the_stream_not_its_square():
    segments, tokens = segments_of([(200, [100] * 16)] * 2)
    inputs = draw(tokens, dtype=torch.float32)
    with Largest() as seen:
        values_and_grads(fused(segments), *inputs)
    assert seen.elements <= 2 * tokens * 4 * 8
    assert seen.elements < tokens * tokens / 10


def test_many_tiny_groups_share_a_kernel_call():
    segments, _ = segments_of([(5 + n % 6, [3 + n % 4] * 4) for n in range(64)])
    plan = PrefixPlan(segments, CPU)
    assert len(plan.own) + len(plan.bridges) <= 3


def test_a_window_longer_than_every_row_changes_no_bit():
    segments, tokens = segments_of(GROUPS["ragged"])
    inputs = draw(tokens)
    for a, b in zip(values_and_grads(fused(segments, 15), *inputs), values_and_grads(fused(segments), *inputs), strict=True):
        assert torch.equal(a, b)
