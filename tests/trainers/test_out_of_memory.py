"""An update that does not fit is restarted in micro-batches of half the size: same weights, same numbers in the log, and a note of it."""

import logging

import pytest
import torch
from small import build_float64_model, build_model, build_tokenizer, weights_of

from posttrain import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from posttrain.errors import TrainingError

PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(8)]
TEXTS = [{"text": f"{a}+{b}={a + b}"} for a in range(4) for b in range(4)]


def too_small_for(trainer, tokens, where="backward"):
    """Streams over so many tokens run out of memory: in the loss, or when half of the gradients are there."""
    loss, times = trainer.loss, []

    def limited(model, batch):
        if len(batch.stream) <= tokens:
            return loss(model, batch)
        times.append(len(batch.stream))
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        result = loss(model, batch)
        early = next(parameter for name, parameter in model.named_parameters() if "0" in name and parameter.ndim == 2)  # in the first layer
        handle = early.register_hook(lambda gradient: _run_out(handle))
        return result

    trainer.loss = limited
    return times


def _run_out(handle):
    handle.remove()
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")


def numbers(trainer):
    skipped = {"step_time", "tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    return [{key: value for key, value in log.items() if key not in skipped and not key.startswith("time/")} for log in trainer.state.log_history]


def assert_same_numbers(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_grpo_update_is_repeated_in_halves(make_trainer, tokenizer, caplog, where, accumulation):
    def run(limit):
        size = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
        model = build_float64_model(tokenizer)
        trainer = make_trainer(model=model, max_steps=3, optim="sgd", entropy_coef=0.01, use_adaptive_entropy=True, beta=0.1, **size)
        times = too_small_for(trainer, limit, where)
        trainer.train()
        return weights_of(trainer), numbers(trainer), times, trainer

    expected, logs, _, _ = run(10**9)
    with caplog.at_level(logging.WARNING):
        weights, halved_logs, times, trainer = run(60)
    assert len(times) == 1  # the next updates know
    assert torch.allclose(weights, expected, rtol=1e-9, atol=1e-11)
    assert_same_numbers(halved_logs, logs)
    assert trainer.token_budget == times[0] // 2
    assert f"micro-batches have at most {times[0] // 2} tokens from here on" in caplog.text


@pytest.mark.parametrize(
    ("kind", "config", "rows"),
    [
        (SFTTrainer, SFTConfig, TEXTS),
        (DPOTrainer, DPOConfig, PAIRS),
        (KTOTrainer, KTOConfig, PAIRS),
        (ORPOTrainer, ORPOConfig, PAIRS),
        (RewardTrainer, RewardConfig, PAIRS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_trainer_can_cut_its_micro_batches(tmp_path, kind, config, rows):
    def run(limit):
        tokenizer = build_tokenizer()
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 2,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "optim": "sgd",
        }
        trainer = kind(build_model(tokenizer), args=config(**settings, per_device_train_batch_size=8), train_dataset=rows, processing_class=tokenizer)
        times = too_small_for(trainer, limit)
        trainer.train()
        return weights_of(trainer), numbers(trainer), times

    expected, logs, _ = run(10**9)
    weights, halved_logs, times = run(45)
    assert times
    assert torch.allclose(weights, expected, rtol=1e-4, atol=1e-6)
    assert_same_numbers(halved_logs, logs)


def test_what_does_not_fit_in_halves_either_is_an_error_with_advice(make_trainer):
    trainer = make_trainer()
    too_small_for(trainer, 1)
    with pytest.raises(TrainingError, match=r"also in micro-batches of .*Tried|also in micro-batches of .* try gradient_checkpointing=True"):
        trainer.train()


def test_a_single_completion_that_does_not_fit_cannot_be_cut(make_trainer):
    trainer = make_trainer(max_tokens_per_micro_batch=1)
    too_small_for(trainer, 1)
    with pytest.raises(TrainingError, match="cannot be split: try gradient_checkpointing=True, tile_rows=2048"):
        trainer.train()
