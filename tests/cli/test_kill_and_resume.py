"""Runs of the command line that are killed and resumed end as the one that nobody interrupted. benchmarks/kill_and_resume.py does the killing:
real processes, whose random generators begin somewhere else each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"


def killed(tmp_path, *options):
    output = tmp_path / "found.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--folder", str(tmp_path / "runs"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert output.is_file(), done.stderr[-3000:]
    return json.loads(output.read_text())["runs"]


def assert_all_the_same(found):
    for run in found:
        assert run["failures"] == [], run
        assert run["twice_the_same"], run
        assert run["same"] == run["runs"] > 0


@pytest.mark.long
def test_lora_runs_are_resumed_to_the_same_bits(tmp_path):
    """Adapters alone, beside a value head, and beside a reward head. Each is compared with a run in a fresh interpreter."""
    assert_all_the_same(killed(tmp_path, "--methods", "grpo", "ppo", "reward-model", "--kinds", "lora", "--moments", "1"))


@pytest.mark.slow
def test_every_method_and_kind_of_training_is_resumed_to_the_same_bits(tmp_path):
    assert_all_the_same(killed(tmp_path, "--moments", "4", "--jobs", "2"))


@pytest.mark.slow
def test_runs_in_fresh_interpreters_only_are_resumed_to_the_same_bits(tmp_path):
    assert_all_the_same(killed(tmp_path, "--methods", "sft", "grpo", "--kinds", "lora", "--moments", "3", "--start", "fresh"))
