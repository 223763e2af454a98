"""`posttrain dpo`, `kto`, `orpo` and `cpo`, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app

RECIPE = """
model:
  from_scratch: {{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8}}
  tokenizer: {{vocab_size: 300}}
data: {{train: rows.jsonl, prompt: "Q: {{question}} A:", chosen: " {{good}}", rejected: " {{bad}}"}}
eval: {{data: rows.jsonl, every: 1, samples: 2}}
dpo: &settings {{output_dir: {folder}/run, max_steps: 2, save_steps: 1, per_device_train_batch_size: 2, use_cpu: true, learning_rate: 1e-3}}
kto: *settings
orpo: *settings
cpo: *settings
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"what is {a}+{b}?", "good": str(a + b), "bad": "many"} for a in range(3) for b in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["dpo", "kto", "orpo", "cpo"])
def test_a_run_leaves_a_model_and_evaluates_on_the_way(folder, command):
    result = call(command, folder / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert (folder / "run" / "model" / "model.safetensors").is_file()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert {"eval_loss", "eval_rewards/margins"} <= summary["metrics"].keys()


def test_resume_goes_on_and_overwrite_computes_the_reference_again(folder):
    ahead = "--dpo.precompute_ref_log_probs=true"
    assert call("dpo", folder / "recipe.yaml", ahead, "--dpo.max_steps=1").exit_code == 0
    assert (folder / "run" / "reference.safetensors").is_file()
    assert "holds an earlier run" in call("dpo", folder / "recipe.yaml", ahead).output
    resumed = call("dpo", folder / "recipe.yaml", ahead, "--resume")
    assert resumed.exit_code == 0, resumed.output
    other_data = call("dpo", folder / "recipe.yaml", ahead, "--overwrite", "--data.rejected= few")
    assert other_data.exit_code == 0, other_data.output


def test_a_dry_run_writes_nothing(folder):
    result = call("dpo", folder / "recipe.yaml", "--dry-run", "--dpo.precompute_ref_log_probs=true")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "rows.jsonl"]


def test_mistakes_are_a_sentence(folder):
    wrong = call("dpo", folder / "recipe.yaml", "--dpo.bta=0.2")
    assert (wrong.exit_code, "Did you mean dpo.beta?" in wrong.output) == (2, True), wrong.output
    unread = call("dpo", folder / "recipe.yaml", "--dpo.discopop_tau=0.2")
    assert "dpo: discopop_tau=0.2 is not read by sigmoid" in unread.output
