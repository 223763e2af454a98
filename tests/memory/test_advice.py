from dataclasses import replace

import pytest

from posttrain.errors import UserError
from posttrain.memory import TrainingJob, find_shape, plan
from posttrain.memory.advice import STEP, largest_context, largest_model, refuse_what_cannot_fit, savings, way_to_fit, with_every_switch
from posttrain.memory.cards import _available, as_text, read_size
from posttrain.memory.known import KNOWN
from posttrain.memory.published import CARDS, FRUGAL_CONTEXTS, STANDARD_CONTEXTS, line_through, table
from posttrain.memory.speed import rollout_bytes, update_flops

GIB = 2**30
LORA = TrainingJob(find_shape("qwen2.5-1.5b"), 200, 4000, lora_r=16, gradient_checkpointing=True)


def test_what_a_switch_saves_is_the_difference_of_two_plans():
    before = plan(LORA)
    found = savings(LORA)
    assert found
    for saving in found:
        after = plan(saving.job)
        assert (saving.saves_training, saving.saves_rollout) == (before.train_peak - after.train_peak, before.rollout_peak - after.rollout_peak)


def test_settings_are_written_as_one_sets_them():
    settings = [saving.setting for saving in savings(LORA)]
    assert "model.load_in_4bit=true" in settings
    assert any(setting.startswith("max_concurrent_completions=") for setting in settings)
    assert not any("gradient_checkpointing" in setting for setting in settings)  # it is on


@pytest.mark.parametrize("limit", [8 * GIB, 10 * GIB, 14 * GIB])
def test_the_way_to_fit_fits_and_none_of_its_switches_is_idle(limit):
    job = TrainingJob(find_shape("qwen2.5-7b"), 200, 8000, lora_r=16, load_in_4bit=True, dtype="bfloat16")
    way = way_to_fit(job, limit)
    assert plan(way[-1].job).peak <= limit
    assert len(way) < len(savings(job)) or len(way) == 1
    peaks = [plan(job).peak, *(plan(saving.job).peak for saving in way)]
    assert peaks == sorted(peaks, reverse=True)


def test_what_fits_needs_no_change():
    assert way_to_fit(LORA, plan(LORA).peak) == []


def test_what_no_switch_makes_fit_has_no_way():
    assert way_to_fit(LORA, GIB // 2) is None


@pytest.mark.parametrize("limit", [12 * GIB, 24 * GIB, 80 * GIB])
def test_the_largest_context_is_the_largest(limit):
    tokens = largest_context(LORA, limit)

    def peak(tokens):
        prompt = min(LORA.prompt_length, tokens // 2)
        return plan(LORA.but(prompt_length=prompt, completion_length=tokens - prompt)).peak

    assert peak(tokens) <= limit < peak(tokens + STEP)


def test_weights_alone_may_be_too_much_for_any_context():
    assert largest_context(LORA, GIB) is None


def test_the_largest_model_is_the_largest_that_fits():
    found = largest_model(with_every_switch(LORA), 12 * GIB)
    job = with_every_switch(LORA)
    larger = [name for name in KNOWN if find_shape(name).parameters > found.parameters]
    assert plan(job.but(shape=found)).peak <= 12 * GIB
    assert larger
    assert all(plan(job.but(shape=find_shape(name))).peak > 12 * GIB for name in larger)


def test_a_refusal_names_both_sizes_and_the_fix():
    peak = plan(LORA).peak
    with pytest.raises(UserError) as caught:
        refuse_what_cannot_fit(LORA, peak // 2, "the GPU")
    sentence = str(caught.value)
    assert as_text(peak) in sentence
    assert as_text(peak // 2) in sentence
    assert "set " in sentence
    assert "memory_check=false" in sentence


def test_a_refusal_without_a_way_says_what_would_be_small_enough():
    with pytest.raises(UserError, match="take a smaller model"):
        refuse_what_cannot_fit(LORA, GIB // 4, "the GPU")


def test_what_is_within_the_tolerance_is_said_and_not_refused():
    peak = plan(LORA).peak
    assert "may just fit" in refuse_what_cannot_fit(LORA, int(peak * 0.95), "the GPU")
    assert refuse_what_cannot_fit(LORA, peak, "the GPU") is None


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("15.5 GiB", int(15.5 * GIB)), ("16", 16 * 10**9), ("512mib", 2**29)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "16TB", "-3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="16GB"):
        read_size(text)


def test_a_container_has_no_more_than_its_limit(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    assert _available(meminfo, tmp_path) == 8000000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert _available(meminfo, tmp_path) == 8000000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert _available(meminfo, tmp_path) == 4000
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 600\nactive_file 100\n")
    assert _available(meminfo, tmp_path) == 4600  # files that were read can be read again
    (tmp_path / "memory.current").write_text("7000\n")
    assert _available(meminfo, tmp_path) == 0
    assert _available(tmp_path / "none", tmp_path) is None


def test_the_published_comparison_is_reproduced_to_the_printed_digits():
    rows = {row.term: row for row in table()}
    assert rows["KV cache"].standard == rows["KV cache"].frugal == 2.5  # exactly
    assert rows["logits of GRPO"].standard == 78.28125
    assert round(rows["logits of GRPO"].standard, 1) == 78.3
    assert round(rows["logits of GRPO"].frugal, 1) == 9.8
    assert round(rows["copy for inference"].standard) == 16
    assert int(rows["training"].standard) == 414
    assert int(rows["training"].frugal) == 42
    terms = [row for row in rows.values() if row.term != "together"]
    assert sum(row.standard_printed for row in terms) == pytest.approx(510.8)
    assert sum(row.frugal_printed for row in terms) == pytest.approx(54.33, abs=0.05)
    assert rows["together"].standard == pytest.approx(510.8, rel=2e-3)
    assert rows["together"].frugal == pytest.approx(54.33, rel=2e-3)


def test_the_two_largest_terms_are_points_on_lines():
    for contexts in (STANDARD_CONTEXTS, FRUGAL_CONTEXTS):
        first, slope = line_through(contexts)
        misses = [abs(first + slope * tokens - size) for tokens, size in zip(contexts, CARDS, strict=True) if tokens is not None]
        assert max(misses) < 1.5e-3
    assert [row.term for row in table() if row.is_extrapolated] == ["training", "together"]


def test_ours_is_below_the_frugal_column():
    rows = {row.term: row for row in table()}
    assert rows["together"].ours < 54.33 / 4
    assert rows["training"].ours < 42 / 4
    assert rows["copy for inference"].ours == 0


def test_the_arithmetic_of_an_update_is_that_of_six_a_weight_and_token():
    """2 N S forward, 4 N S backward (Kaplan et al. 2020, section 2.1), where the texts are short and the vocabulary small."""
    shape = find_shape("mistral-7b-v0.1")
    job = TrainingJob(shape, 1, 63, generations=1)
    body = update_flops(job) / (6 * 64 * shape.linear_weights)
    assert body == pytest.approx(1, abs=0.05)
    again = update_flops(job.but(gradient_checkpointing=True)) / update_flops(job)
    assert again == pytest.approx(4 / 3, abs=0.02)


def test_a_window_spares_attention_what_lies_before_it():
    shape = find_shape("gemma-3-1b")
    length, window = 3000, next(window for window in shape.windows if window is not None)
    seen = [min(query + 1, window if limit else length) for limit in shape.windows for query in range(length)]
    wide, narrow = (update_flops(TrainingJob(one, 1, length - 1, generations=1)) for one in (replace(shape, windows=(None,) * shape.layers), shape))
    spared = 4 * (shape.layers * length**2 / 2 - sum(seen)) * shape.q * 3.5
    assert wide - narrow == pytest.approx(spared, rel=0.01)


def test_decoding_more_rows_at_once_reads_the_weights_less_often():
    job = TrainingJob(find_shape("llama-3.1-8b"), 100, 1000, generations=8, rollout_size=64)
    assert rollout_bytes(job) < 0.5 * rollout_bytes(job.but(max_concurrent_completions=8))
