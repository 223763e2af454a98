"""Another package adds a training method, a loss, a reward and an engine, and the command line knows them. No file of posttrain is touched.

The package is the code of docs/extending.md, written into a folder with the metadata that an installer would write; what is asked of it is asked in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
PACKAGE = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
ENTRY_POINTS = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0]).replace(
    '"', ""
)
RECIPE = """
model: {from_scratch: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8},
        tokenizer: {vocab_size: 290}}
data: {train: rows.jsonl}
"""
COMMON = "use_cpu: true, learning_rate: 1e-2, save_strategy: 'no', max_steps: 2"
FOCAL = f"{RECIPE}focal: {{{COMMON}, per_device_train_batch_size: 4, gamma: 1.5}}\n"
GRPO = f"""{RECIPE}rubric: ["extras:ones"]
engine: {{kind: counting}}
train: {{{COMMON}, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 5, loss_type: sequence-wise}}
"""
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from posttrain.cli.main import app
for words in json.load(open("commands.json")):
    result = CliRunner().invoke(app, words)
    print(json.dumps({"words": words, "code": result.exit_code, "output": result.output, "error": repr(result.exception)}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command said, by its words."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "extras.py").write_text(PACKAGE)
    metadata = folder / "extras-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extras\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    rows = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "focal.yaml").write_text(FOCAL)
    (folder / "grpo.yaml").write_text(GRPO)
    commands = [
        ["--help"],
        ["focal", "focal.yaml", "--focal.output_dir=run"],
        ["focal", "focal.yaml", "--focal.gama=1"],
        ["plan", "focal.yaml", "--trainer", "focal"],
        ["data", "preview", "focal.yaml", "--kind", "focal"],
        ["report", "run", "--output", "report.html"],
        ["grpo", "grpo.yaml", "--train.output_dir=online"],
        ["grpo", "grpo.yaml", "--train.output_dir=other", "--train.loss_type=sequence-wize"],
        ["grpo", "grpo.yaml", "--train.output_dir=other", "--engine.kind=countin"],
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return folder, {" ".join(one["words"]): one for one in told}


def test_a_method_with_the_name_of_a_command_is_left_out_and_named(monkeypatch):
    from importlib.metadata import EntryPoint

    from posttrain import methods

    points = [EntryPoint("plan", "extras:FocalTrainer", methods.GROUP), EntryPoint("focal", "extras:FocalTrainer", methods.GROUP)]
    monkeypatch.setattr(methods, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="'plan' .* has the name of a command or a section"):
        assert list(methods.Methods()) == [*methods._BUILT_IN, "focal"]


def said(answers, words):
    answer = answers[1][words]
    assert answer["code"] == 0, answer
    return answer["output"]


def test_the_command_line_lists_a_method_of_another_package(answers):
    assert "focal" in said(answers, "--help")


def test_it_trains_by_a_recipe_of_its_own_section(answers):
    output = said(answers, "focal focal.yaml --focal.output_dir=run")
    assert "step 2/2" in output
    assert (answers[0] / "run" / "model" / "model.safetensors").is_file()
    assert "gamma: 1.5" in (answers[0] / "run" / "recipe.yaml").read_text()


def test_its_settings_are_checked_like_others(answers):
    refused = answers[1]["focal focal.yaml --focal.gama=1"]
    assert refused["code"] == 2
    assert "focal.gama is not a setting of focal fine-tuning. Did you mean focal.gamma?" in " ".join(refused["output"].split())


def test_plan_and_preview_know_it(answers):
    assert "training" in said(answers, "plan focal.yaml --trainer focal")
    assert "completion" in said(answers, "data preview focal.yaml --kind focal")


def test_its_record_makes_a_report(answers):
    said(answers, "report run --output report.html")
    page = (answers[0] / "report.html").read_text(encoding="utf-8")
    assert "focal" in page


def test_a_loss_a_reward_and_an_engine_of_another_package_train(answers):
    output = said(answers, "grpo grpo.yaml --train.output_dir=online")
    assert "ones" in output
    assert "the engine of another package" in output


@pytest.mark.parametrize(("given", "near"), [("--train.loss_type=sequence-wize", "sequence-wise"), ("--engine.kind=countin", "counting")])
def test_a_name_that_is_nearly_right_is_told_the_nearest_one(answers, given, near):
    refused = answers[1][f"grpo grpo.yaml --train.output_dir=other {given}"]
    assert refused["code"] == 2
    assert near in refused["output"]


def test_the_page_tells_which_models_take_streams(answers, monkeypatch):
    from transformers import GPT2Config, Qwen3Config

    monkeypatch.syspath_prepend(str(answers[0]))
    import extras

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    assert extras.can_stream(Qwen3Config(vocab_size=50, **small)) is None
    assert "dropout" in extras.can_stream(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
