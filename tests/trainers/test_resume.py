"""A run killed anywhere goes on to the same bits, and its record has neither gaps nor doubles."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
pytestmark = pytest.mark.long
MOMENTS = [
    ("rollout", 12),
    ("reward", 3),
    ("backward", 5),
    ("before the optimizer step", 5),
    ("after the optimizer step", 4),
    ("after the log", 7),
    ("log half written", 30),
    ("checkpoint half written", 2),
    ("before the rename", 2),
    ("after the checkpoint", 1),
    ("while an old checkpoint is deleted", 1),
]


def run(output_dir, moment="never", times=1, algorithm="grpo"):
    command = [sys.executable, str(HERE / "killed_run.py"), str(output_dir), moment, str(times), algorithm]
    done = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, env={**__import__("os").environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    )
    return done


def record_of(output_dir):
    """Every deterministic row of the run's record."""
    with sqlite3.connect(output_dir / "run.sqlite") as store:
        timing = ("time/", "memory/", "step_time", "tokens_per_second", "train_", "total_flos", "epoch")
        scalars = [row for row in store.execute("SELECT step, name, value FROM scalars ORDER BY step, name") if not row[1].startswith(timing)]
        details = store.execute("SELECT * FROM token_details ORDER BY step, grp, idx, updated_at").fetchall()
        completions = store.execute("SELECT step, grp, idx, text, reward, advantage FROM rollouts ORDER BY 1, 2, 3").fetchall()
    return scalars, completions, details


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("whole")
    done = run(output_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output_dir / "final" / "model.safetensors"), record_of(output_dir)


def ends_in_the_same_bits(whole, output_dir, moment, times, algorithm):
    killed = run(output_dir, moment, times, algorithm)
    assert killed.returncode == -signal.SIGKILL, f"never reached {moment!r}: {killed.stderr[-2000:]}"
    resumed = run(output_dir, algorithm=algorithm)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    weights, (scalars, completions, details) = whole
    now = load_file(output_dir / "final" / "model.safetensors")
    assert all((now[name] == weights[name]).all() for name in weights)
    now_scalars, now_rollouts, now_details = record_of(output_dir)
    assert now_rollouts == completions
    assert now_scalars == scalars
    assert now_details == details


@pytest.mark.parametrize(("moment", "times"), MOMENTS, ids=[moment.replace(" ", "-") for moment, _ in MOMENTS])
def test_a_run_killed_anywhere_ends_in_the_same_bits(uninterrupted, tmp_path, moment, times):
    ends_in_the_same_bits(uninterrupted, tmp_path, moment, times, "grpo")


@pytest.fixture(scope="module", params=["ppo", "ppo-two-models"])
def uninterrupted_ppo(tmp_path_factory, request):
    output_dir = tmp_path_factory.mktemp(request.param)
    done = run(output_dir, algorithm=request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, (load_file(output_dir / "final" / "model.safetensors"), record_of(output_dir))


# Half-way through a rollout's updates, so that frozen values, advantages and returns must come back, and the values' weights with their moments.
@pytest.mark.parametrize(("moment", "times"), [("backward", 5), ("checkpoint half written", 2), ("after the checkpoint", 1)])
def test_a_killed_ppo_run_ends_in_the_same_bits(uninterrupted_ppo, tmp_path, moment, times):
    algorithm, whole = uninterrupted_ppo
    ends_in_the_same_bits(whole, tmp_path, moment, times, algorithm)
