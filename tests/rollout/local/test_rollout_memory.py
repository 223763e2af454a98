"""A rollout that does not fit goes on with half as many rows and says the same; what it held is gone when it is over."""

import gc
import logging

import pytest
import torch

from posttrain.errors import TrainingError
from posttrain.memory.simulate.live import LiveStorages
from posttrain.rollout.local import layout as layout_module
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.local.layout import attend, attend_plainly


@pytest.fixture
def model(tiny):
    return tiny()


def limited_to(model, monkeypatch, rows):
    """Decoding more rows than so many runs out of memory."""
    forward, failures = model.forward, []

    def limited(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > rows:
            failures.append(kwargs["input_ids"].shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    return failures


def test_completions_are_the_same_with_half_the_rows(model, prompts, complete, requests_for, monkeypatch, caplog):
    longest = max(map(len, prompts))
    engine = LocalEngine(prefill_tokens=longest)
    many = requests_for(prompts * 4, temperature=1.0)
    everything, _ = complete(LocalEngine(), model, many)
    failures = limited_to(model, monkeypatch, max(longest, 2 * len(prompts)))
    with caplog.at_level(logging.WARNING):
        done, _ = complete(engine, model, many)
    assert failures
    assert {i: c.token_ids for i, c in done.items()} == {i: c.token_ids for i, c in everything.items()}
    assert engine.max_slots == 2 * len(prompts)
    assert f"{2 * len(prompts)} at once from here on" in caplog.text


def test_a_single_row_that_does_not_fit_is_an_error_with_advice(model, prompts, complete, requests_for, monkeypatch):
    limited_to(model, monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"out of memory while sampling a single completion .*load_in_4bit"):
        complete(LocalEngine(max_slots=1, prefill_tokens=8), model, requests_for(prompts))


def test_nothing_of_a_rollout_is_left_when_the_update_begins(model, prompts, requests_for):
    """Rollout and update never hold their memory at the same time: the peak is that of the larger, not the sum."""
    engine = LocalEngine()
    gc.collect()
    with LiveStorages() as live:
        live.label([*model.parameters(), *model.buffers()], "weights")
        before = live.device_bytes
        with engine.serving(model, version=0):
            for request in requests_for(prompts, max_new_tokens=12):
                engine.submit(request)
            held = []
            for _ in range(8):
                engine.step()
                held.append(live.device_bytes)
        gc.collect()
        assert max(held) > before + 10_000
        assert live.device_bytes == before


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_tiles_of_queries_is_the_same(monkeypatch, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = None if causal else torch.randn(2, 1, 9, 9)
    expected = attend(q, k, v, scaling=0.3, mask=mask, causal=causal)
    monkeypatch.setattr(layout_module, "DECODE_SCORES", 2 * 4 * 9 * 2)
    for ours, theirs in zip(attend_plainly(q, k, v, scaling=0.3, mask=mask, causal=causal), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
