"""`posttrain reward-model`, then `ppo` and `rloo` on what it saved, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app

RECIPE = """
model:
  from_scratch: {{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8}}
  tokenizer: {{vocab_size: 300}}
data: {{train: rows.jsonl, prompt: "Q: {{question}} A:", chosen: " {{good}}", rejected: " {{bad}}", answer: "{{good}}"}}
rubric: [judge/model, {{reward: arithmetic, weight: 0.5}}]
reward: {{output_dir: {folder}/judge, max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, learning_rate: 1e-3}}
ppo: &settings {{output_dir: {folder}/run, max_steps: 2, per_device_train_batch_size: 4, max_completion_length: 5, use_cpu: true, learning_rate: 1e-3}}
rloo: *settings
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"what is {a}+{b}?", "good": str(a + b), "bad": "many"} for a in range(3) for b in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_reward_model_is_trained_and_climbed(folder):
    judged = call("reward-model", folder / "recipe.yaml")
    assert judged.exit_code == 0, judged.output
    assert json.loads((folder / "judge" / "model" / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    for command in ("ppo", "rloo"):
        result = call(command, folder / "recipe.yaml", "--overwrite")
        assert result.exit_code == 0, result.output
        assert (folder / "run" / "model" / "model.safetensors").is_file()
        metrics = json.loads((folder / "run" / "summary.json").read_text())["metrics"]
        assert "rewards/model/mean" in metrics


def test_values_may_have_a_model_of_their_own(folder):
    assert call("reward-model", folder / "recipe.yaml", "--reward.max_steps=1").exit_code == 0
    result = call("ppo", folder / "recipe.yaml", f"--ppo.value_model_path={folder}/judge/model", "--ppo.max_steps=1")
    assert result.exit_code == 0, result.output


def test_mistakes_are_a_sentence(folder):
    missing = call("ppo", folder / "recipe.yaml")  # the reward model was not trained yet
    assert (missing.exit_code, "judge/model" in missing.output) == (2, True), missing.output
    renamed = call("ppo", folder / "recipe.yaml", "--ppo.response_length=53")
    assert (renamed.exit_code, "max_completion_length" in renamed.output) == (2, True), renamed.output
    unknown = call("reward-model", folder / "recipe.yaml", "--reward.center_reward=0.1")
    assert "Did you mean reward.center_rewards_coefficient?" in unknown.output, unknown.output
