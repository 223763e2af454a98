"""Which memory switches are chosen where nobody sets them: the cheapest set that fits, and never one that the user has set."""

import itertools

import pytest

from posttrain.memory import TrainingJob, find_shape, plan
from posttrain.memory.choice import AUTOMATIC, HEADROOM, choose, least, smallest_card, update_time

GIB = 2**30
METHODS = {"full": {}, "lora": {"lora_r": 32, "dtype": "bfloat16"}, "qlora": {"lora_r": 32, "dtype": "bfloat16", "load_in_4bit": True}}
CHECKPOINTS, OFFLOAD, TILES = "gradient_checkpointing", "activation_offloading", "tile_rows"
BUDGET, AT_ONCE = "max_tokens_per_micro_batch", "max_concurrent_completions"
# (model, method, tokens of a row) -> for cards of 8, 16, 24, 40 and 80 GiB what is switched on; None: no set is enough.
TABLE = {
    ("qwen2.5-0.5b", "full", 1024): (None, {BUDGET}, set(), set(), set()),
    ("qwen2.5-0.5b", "lora", 1024): (set(), set(), set(), set(), set()),
    ("qwen2.5-0.5b", "lora", 8192): ({CHECKPOINTS}, set(), set(), set(), set()),
    ("qwen2.5-0.5b", "qlora", 8192): ({CHECKPOINTS}, set(), set(), set(), set()),
    ("qwen2.5-1.5b", "full", 1024): (None, None, None, {BUDGET}, set()),
    ("qwen2.5-1.5b", "full", 8192): (None, None, None, {CHECKPOINTS}, set()),
    ("qwen2.5-1.5b", "lora", 1024): ({CHECKPOINTS}, {BUDGET}, set(), set(), set()),
    ("qwen2.5-1.5b", "qlora", 1024): ({BUDGET}, set(), set(), set(), set()),
    ("llama-3.1-8b", "full", 1024): (None, None, None, None, None),
    ("llama-3.1-8b", "lora", 1024): (None, None, {CHECKPOINTS}, {BUDGET}, set()),
    ("llama-3.1-8b", "lora", 8192): (None, None, {CHECKPOINTS, AT_ONCE}, {CHECKPOINTS}, set()),
    ("llama-3.1-8b", "qlora", 1024): ({CHECKPOINTS, OFFLOAD, BUDGET, AT_ONCE}, {CHECKPOINTS}, {BUDGET}, set(), set()),
    ("llama-3.1-8b", "qlora", 8192): (None, {CHECKPOINTS, AT_ONCE}, {CHECKPOINTS}, {CHECKPOINTS}, set()),
    ("llama-3.1-8b", "qlora", 20480): (None, {CHECKPOINTS, OFFLOAD, AT_ONCE}, {CHECKPOINTS, AT_ONCE}, {CHECKPOINTS, AT_ONCE}, {CHECKPOINTS}),
}  # fmt: skip


def job(model, method, tokens, **settings):
    return TrainingJob(find_shape(model), 512, tokens - 512, **METHODS[method] | settings)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: " ".join(map(str, case)))
def test_what_is_switched_on_by_card(case):
    for size, expected in zip((8, 16, 24, 40, 80), TABLE[case], strict=True):
        choice = choose(job(*case), AUTOMATIC, size * GIB)
        assert choice.fits == (expected is not None), size
        if expected is not None:
            assert set(choice.settings) == expected, size
            assert choice.plan.peak <= size * GIB * (1 - HEADROOM)


@pytest.mark.parametrize("size", [18.5, 19.5, 20.5, 23, 30, 44])
def test_no_cheaper_set_of_switches_fits(size):
    """Against every set there is, one by one."""
    plain = job("llama-3.1-8b", "lora", 2048)
    chosen = choose(plain, AUTOMATIC, int(size * GIB)).job
    fitting = [
        one
        for checkpoints, offload, rows, budget in itertools.product((False, True), (False, True), (None, 2048), (None, 2048))
        if (checkpoints or not offload)
        and plan(one := plain.but(gradient_checkpointing=checkpoints, activation_offloading=offload, tile_rows=rows, max_tokens_per_micro_batch=budget)).train_peak
        <= size * GIB * (1 - HEADROOM)
    ]  # fmt: skip
    assert update_time(chosen) == min(map(update_time, fitting))


def test_where_nothing_fits_it_is_the_set_that_needs_least():
    plain = job("llama-3.1-8b", "full", 8192)
    chosen = choose(plain, AUTOMATIC, 8 * GIB)
    assert not chosen.fits
    everything = plain.but(
        gradient_checkpointing=True, activation_offloading=True, tile_rows=2048, max_concurrent_completions=1, max_tokens_per_micro_batch=8192
    )
    assert chosen.plan.peak == plan(everything).peak
    assert least(plain, AUTOMATIC) == chosen.job


def test_what_the_user_has_set_stays_as_it_is():
    plain = job("llama-3.1-8b", "qlora", 20480, gradient_checkpointing=True, tile_rows=512, max_concurrent_completions=4)
    automatic = [OFFLOAD, BUDGET]
    for size in (4, 16, 80):
        chosen = choose(plain, automatic, size * GIB)
        assert (chosen.job.gradient_checkpointing, chosen.job.tile_rows, chosen.job.max_concurrent_completions) == (True, 512, 4)
        assert set(chosen.settings) <= set(automatic)
    off = choose(job("llama-3.1-8b", "qlora", 20480), [TILES, AT_ONCE], 16 * GIB)
    assert (off.job.gradient_checkpointing, off.job.activation_offloading) == (False, False)


def test_nothing_is_switched_on_for_an_unknown_amount_of_memory():
    plain = job("llama-3.1-8b", "full", 8192)
    assert choose(plain, AUTOMATIC, None).job == plain


def test_offloading_needs_room_on_the_host():
    plain = job("llama-3.1-8b", "qlora", 20480)
    with_host, without = choose(plain, AUTOMATIC, 16 * GIB, 64 * GIB), choose(plain, AUTOMATIC, 16 * GIB, GIB)
    assert with_host.job.activation_offloading
    assert not without.job.activation_offloading
    assert without.job.tile_rows == 2048  # what is left
    assert without.fits


def test_nothing_coarser_is_ever_chosen():
    for size in (1, 8, 24):
        chosen = choose(job("llama-3.1-8b", "lora", 8192), AUTOMATIC, size * GIB).job
        assert (chosen.adapter_dtype, chosen.optim, chosen.dtype, chosen.load_in_4bit) == ("float32", "adamw_torch_fused", "bfloat16", False)


def test_the_published_task_fits_a_common_card():
    """Llama 3.1 8B in 4 bits, 20,480 tokens, 8 completions; and in 16 bits with 1,024."""
    size, choice = smallest_card(job("llama-3.1-8b", "qlora", 20480), AUTOMATIC)
    assert (size, choice.fits) == (16, True)
    assert choice.plan.train_peak <= 14 * GIB
    size, choice = smallest_card(job("llama-3.1-8b", "lora", 1024), AUTOMATIC)
    assert choice.fits
    assert choice.plan.train_peak <= 19 * GIB


def test_the_line_names_switches_bytes_and_price():
    line = choose(job("llama-3.1-8b", "qlora", 20480), AUTOMATIC, 16 * 10**9).line()
    assert "gradient checkpointing + activation offloading + one completion at once" in line
    assert "of 14.9 GiB (training " in line
    assert "times as long" in line
    assert "8 rounds" in line
