"""An update does not depend on how it is cut: micro-batches, accumulation, skipped zero-signal groups, checkpointing, processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import build_float64_model, weights_of

from posttrain.trainers.grpo import GRPOTrainer

HERE = Path(__file__).parent


def coarse(completions, **kwargs):
    """Few different values, so that some groups carry no signal."""
    return [float("1" in text) for text in completions]


@pytest.fixture
def train(make_trainer, tokenizer):
    def run(**settings):
        model = build_float64_model(tokenizer)
        trainer = make_trainer(model=model, max_steps=3, optim="sgd", lr_scheduler_type="constant", learning_rate=0.5, **settings)
        trainer.train()
        return weights_of(trainer)

    return run


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo"])
def test_an_update_is_the_same_for_every_micro_batch_split(train, loss_type):
    settings = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.01, "num_iterations": 2, "epsilon_high": 0.3}
    whole = train(**settings)
    for budget in (1, 25):
        assert torch.allclose(train(max_tokens_per_micro_batch=budget, **settings), whole, rtol=1e-9, atol=1e-11)


def test_an_update_is_the_same_for_every_accumulation(train):
    whole = train(per_device_train_batch_size=16)
    for size in (8, 4, 2):
        assert torch.allclose(train(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size), whole, rtol=1e-9, atol=1e-11)


def test_skipping_groups_without_signal_changes_nothing(train, make_trainer, make_model, monkeypatch):
    def run():
        trainer = make_trainer(reward=coarse, model=make_model(), max_steps=4)
        trainer.train()
        return weights_of(trainer), [log for log in trainer.state.log_history if "frac_reward_zero_std" in log]

    skipping, logs = run()
    assert any(log["frac_reward_zero_std"] > 0 for log in logs), "the reward must leave some groups without signal"
    monkeypatch.setattr(GRPOTrainer, "has_gradient", lambda self, row: True)
    assert torch.allclose(run()[0], skipping, rtol=0, atol=2e-6)


@pytest.mark.parametrize("zero_signal_groups", ["drop", "resample"])
def test_a_rollout_of_which_no_group_is_left_is_a_step_of_nothing(make_trainer, zero_signal_groups):
    trainer = make_trainer(reward=lambda completions, **_: [1.0] * len(completions), zero_signal_groups=zero_signal_groups, max_resampling_rounds=1)
    before = weights_of(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert torch.equal(weights_of(trainer), before)


def test_a_step_without_any_signal_still_decays_and_counts(make_trainer):
    trainer = make_trainer(reward=lambda completions, **kwargs: [1.0] * len(completions), weight_decay=0.5, max_steps=1, max_grad_norm=0.0)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.train()
    assert torch.allclose(trainer.model.model.layers[0].mlp.up_proj.weight, before * (1 - 0.5 * 1e-2), atol=1e-7)


def test_gradient_checkpointing_changes_nothing(train):
    assert torch.allclose(train(gradient_checkpointing=True), train(), rtol=1e-9, atol=1e-11)


def test_ratio_is_one_before_the_first_update_and_the_engine_agrees(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio" in log]
    assert all(log["ratio"] == 1.0 for log in logs)
    assert all(log["sampling/logp_difference/max"] < 1e-4 for log in logs)


def test_a_masked_truncated_completion_teaches_nothing(make_trainer):
    trainer = make_trainer(mask_truncated_completions=True, max_steps=1, weight_decay=0.0)
    trainer.sampling = replace(trainer.sampling, stop_token_ids=())
    before = weights_of(trainer)
    trainer.train()
    assert torch.equal(weights_of(trainer), before)


def run_world(processes, output, algorithm):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]  # gloo, since only CPUs are used
    command = [*launch, str(HERE / "world_run.py"), str(output), str(processes), algorithm]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "rloo"])
def test_an_update_is_the_same_on_one_process_and_on_two(tmp_path, algorithm):
    one, two = (run_world(processes, tmp_path / f"{processes}.pt", algorithm) for processes in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-5 if name.startswith("log ") else 0, atol=1e-6), name
