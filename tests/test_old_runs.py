"""Runs that version 0.1.0 wrote, before the package's rooms were moved (2026-11-28): they still resume, and their records still open.

tests/old_runs/ holds a model, its rows, a reward and four runs of four steps, each with the checkpoint of its second step, its record and the
model it ended with. Another processor rounds differently, so what a resumed run ends with is compared to 1e-5 of what the old code ended with.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.tracking.reader import RunReader

STORED = Path(__file__).parent / "old_runs"
RUNS = {"sft": "sft", "dpo": "dpo", "grpo": "train", "ppo": "ppo"}  # command -> the recipe's section


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(STORED, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("command", RUNS)
def test_a_stored_run_goes_on_and_ends_as_it_did(folder, command):
    run = folder / command
    shutil.rmtree(run / "model")
    arguments = [command, str(folder / f"{command}.yaml"), f"--{RUNS[command]}.output_dir={run}", "--resume"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (stored,) = (STORED / command / "model").glob("*model.safetensors")
    expected, found = load_file(stored), load_file(run / "model" / stored.name)
    assert expected.keys() == found.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-5)
    began = load_file(run / "checkpoint-2" / stored.name)
    assert any(not torch.equal(began[name], weights) for name, weights in found.items()), "the resumed run trained nothing"
    assert steps_of(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("command", RUNS)
def test_the_record_of_a_stored_run_opens(folder, command):
    assert steps_of(folder / command) == [1, 2, 3, 4]
    page = folder / "report.html"
    result = CliRunner().invoke(app, ["report", str(folder / command), "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert "echarts" in page.read_text(encoding="utf-8")


def steps_of(run: Path) -> list[int]:
    return RunReader(run).steps()
