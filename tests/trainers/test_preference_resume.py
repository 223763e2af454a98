"""A preference run that goes on from a checkpoint ends in the same bits; one that is cut over processes in the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import weights_of
from small_preferences import start

from posttrain.errors import UserError

HERE = Path(__file__).parent
VARIANTS = {
    "dpo": ("dpo", {}),
    "dpo-synced": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo-ahead": ("dpo", {"precompute_ref_log_probs": True}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_to_the_same_bits(tmp_path, variant):
    kind, settings = VARIANTS[variant]
    settings = settings | {"per_device_train_batch_size": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    whole = start(kind, tmp_path, **settings)
    whole.train()
    again = start(kind, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(weights_of(again), weights_of(whole))
    logs = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, again)]
    assert logs[0] == logs[1]


def test_a_run_with_another_beta_is_not_a_continuation(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    start("dpo", tmp_path, **settings).train()
    with pytest.raises(UserError, match=r"beta: 0.1 -> 0.2"):
        start("dpo", tmp_path, beta=0.2, **settings).train(resume_from_checkpoint=True)


def run_world(processes, output):
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
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "ACCELERATE_USE_CPU": "true"}
    command = [*launch, str(HERE / "preference_world.py"), str(output), str(processes)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.long
def test_an_update_is_the_same_on_one_process_and_on_two(tmp_path):
    one, two = (run_world(processes, tmp_path / f"{processes}.pt") for processes in (1, 2))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name
