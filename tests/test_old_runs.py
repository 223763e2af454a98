"""Runs that version 0.1.0 wrote, before the package's rooms were moved (2026-11-28): they still resume, and their records still open.

tests/old_runs/ holds a model, its rows, a reward and four runs of four steps, each with the checkpoint of its second step, its record and the
model it ended with. Another processor rounds differently, so what a resumed run ends with is compared to 1e-5 of what the old code ended with.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.stages import read_stages
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


RECIPE_OF_STAGES = """
model: {name: someone/model, lora: {r: 8}}
data: {train: "someone/data:main:train", prompt: "{question}", answer: "{answer|after:####}"}
stages:
  - sft: {data: {completion: "{answer}"}, sft: {max_steps: 2, learning_rate: 1e-5}}
  - reward-model: {data: {chosen: "{good}", rejected: "{bad}"}, reward: {max_steps: 2}}
  - dpo: {data: {chosen: "{good}", rejected: "{bad}"}, dpo: {max_steps: 2, beta: 0.2}}
  - grpo: {rubric: [gsm8k], train: {max_steps: 2, num_generations: 4}}
"""


def test_a_stage_that_the_old_code_finished_is_known_as_done(tmp_path):
    (tmp_path / "all.yaml").write_text(RECIPE_OF_STAGES)
    stages = read_stages(str(tmp_path / "all.yaml"), [], str(tmp_path / "out"))
    marked = {"sft": "934a1449b103c643", "reward-model": "3014a40d0e992e69", "dpo": "43c9220b5487a844", "grpo": "ef33e9ba8bdbab2a"}
    for stage in stages:
        stage.directory.mkdir(parents=True)
        (stage.directory / "model").mkdir()
        (stage.directory / "model" / "adapter_config.json").write_text("{}")
        (stage.directory / "stage.json").write_text(json.dumps({"model": "model", "digest": marked[stage.name]}))  # as the old code wrote it
    assert [stage.name for stage in stages if stage.model_if_done({}) is None] == []
