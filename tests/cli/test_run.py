"""Recipes with stages: each trains on the model before it, what is done is not done again, and a stage goes on where it was."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.stages import read_stages
from posttrain.errors import UserError

RECIPE = """
model: {from_scratch: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8},
        tokenizer: {vocab_size: 290}}
data: {train: rows.jsonl}
stages:
  - sft: {sft: {max_steps: 3, per_device_train_batch_size: 4, use_cpu: true, learning_rate: 1e-2}}
  - reward-model: {reward: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}}
  - grpo: {rubric: ["rewards.py:length", "stage:reward-model"],
           train: {max_steps: 3, save_steps: 1, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 5, use_cpu: true, learning_rate: 1e-2}}
"""
REWARDS = """
import os

def length(completions):
    if os.path.exists(os.path.join(os.path.dirname(__file__), "broken")) and os.path.exists(os.path.join(os.path.dirname(__file__), "all/3-grpo/checkpoint-1")):
        raise RuntimeError("oops")
    return [-len(text) / 10 for text in completions]
"""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{a}+1=", "completion": str(a + 1), "chosen": str(a + 1), "rejected": str(a)} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "all.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def run(folder):
    def run(*options, output="all"):
        return CliRunner().invoke(app, ["run", str(folder / "all.yaml"), "--output", str(folder / output), *options])

    return run


def save_base(folder):
    from posttrain.cli.build import make_model, make_tokenizer
    from posttrain.cli.recipe import ModelSection, TokenizerSection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    section = ModelSection(from_scratch=sizes, tokenizer=TokenizerSection(vocab_size=290))
    tokenizer = make_tokenizer(section, [{"text": "1+2="}])
    make_model(section, tokenizer, SimpleNamespace(seed=0)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_stages_run_in_order_and_a_broken_one_goes_on_where_it_was(folder, run):
    """One story: a stage breaks in its second step; it is mended; the end is as if nothing had happened."""
    (folder / "broken").touch()
    broken = run()
    assert broken.exit_code == 2
    assert "oops" in broken.stderr
    assert (folder / "all" / "3-grpo" / "checkpoint-1").is_dir()
    written = {path: path.stat().st_mtime_ns for path in (folder / "all" / "1-sft").rglob("*.safetensors")}

    again = run()
    assert again.exit_code == 2
    assert "1-sft is done already; go on with --resume" in again.stderr

    (folder / "broken").unlink()
    resumed = run("--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "stage 1 of 3, sft: done before" in resumed.output
    assert {path: path.stat().st_mtime_ns for path in (folder / "all" / "1-sft").rglob("*.safetensors")} == written
    assert not same(weights(folder / "all" / "1-sft"), weights(folder / "all" / "3-grpo"))  # it started from the policy, and moved
    scorer = json.loads((folder / "all" / "2-reward-model" / "model" / "config.json").read_text())
    assert scorer["architectures"] == ["Qwen3ForSequenceClassification"]

    through = run(output="through")
    assert through.exit_code == 0, through.output
    assert same(weights(folder / "all" / "3-grpo"), weights(folder / "through" / "3-grpo"))
    assert "all stages are done" in run("--resume").output

    changed = run("--resume", "--sft.max_steps=4")
    assert changed.exit_code == 2
    assert "the stage 'sft' was done with another recipe" in changed.stderr


def test_adapters_of_a_stage_are_merged_for_the_next(folder, run):
    save_base(folder)
    (folder / "all.yaml").write_text(
        f"model: {{name: {folder}/base, lora: {{r: 2, alpha: 4}}}}\ndata: {{train: rows.jsonl}}\nstages:"
        + RECIPE.partition("stages:")[2].partition("  - reward-model")[0]
        + "  - dpo: {dpo: {max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}}\n"
    )
    result = run()
    assert result.exit_code == 0, result.output
    for stage in ("1-sft", "2-dpo"):
        assert (folder / "all" / stage / "model" / "adapter_config.json").is_file()
        assert (folder / "all" / stage / "merged" / "model.safetensors").is_file()
    base = json.loads((folder / "all" / "2-dpo" / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder / "all" / "1-sft" / "merged")
    assert "the adapters were merged into float32 weights: KL" in result.output


def test_a_reward_model_of_adapters_is_the_reward_of_a_later_stage(folder, run):
    save_base(folder)
    stages = RECIPE.partition("stages:")[2].replace("train: {max_steps: 3", "train: {max_steps: 1")
    (folder / "all.yaml").write_text(
        f"model: {{name: {folder}/base, lora: {{r: 2, alpha: 4}}}}\ndata: {{train: rows.jsonl}}\nstages:{stages}"
        '  - ppo: {rubric: ["stage:reward-model"], model: {name: base}, from: start,'
        " ppo: {max_steps: 1, per_device_train_batch_size: 4, max_completion_length: 5, use_cpu: true, value_model_path: stage:reward-model}}\n"
    )
    result = run()
    assert result.exit_code == 0, result.output
    assert (folder / "all" / "2-reward-model" / "model" / "adapter_config.json").is_file()
    for stage in ("3-grpo", "4-ppo"):
        assert "rewards/model/mean" in json.loads((folder / "all" / stage / "summary.json").read_text())["metrics"]


def test_a_dry_run_checks_the_data_of_every_stage_and_writes_nothing(folder, run):
    result = run("--dry-run")
    assert result.exit_code == 0, result.output
    assert "reward-model: a reward model, from sft, into" in result.output
    assert "grpo: GRPO, from sft, into" in result.output  # a reward model is no policy to start from
    assert not (folder / "all").exists()
    (folder / "all.yaml").write_text(RECIPE.replace("  - grpo: {rubric", "  - grpo: {data: {prompt: '{question}'}, rubric"))
    wrong = run("--dry-run")
    assert wrong.exit_code == 2
    assert "stage 'grpo': the template of 'prompt' asks for the column 'question'" in wrong.stderr


def test_starting_over_removes_nothing_before_the_recipe_was_checked(folder, run):
    kept = folder / "all" / "1-sft" / "model" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("an afternoon")
    (folder / "all" / "1-sft" / "stage.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"question": "1+1="}')
    wrong = run("--overwrite")
    assert wrong.exit_code == 2
    assert "stage 'sft'" in wrong.stderr
    assert kept.read_text() == "an afternoon"


def stages_of(folder, text, *overrides):
    (folder / "own.yaml").write_text("model: {name: base}\ndata: {train: rows.jsonl}\nstages:\n" + text)
    return read_stages(str(folder / "own.yaml"), overrides, str(folder / "own"))


def test_a_template_that_an_earlier_stage_sets_is_there_for_the_data_of_a_later_one(folder, run):
    from posttrain.data.tokenizer import train_bpe

    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "completion": "2"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_bpe(["1+1=2"], 290)
    tokenizer.chat_template = None
    (folder / "base").mkdir()
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 64}')
    head = f"model: {{name: {folder}/base}}\ndata: {{train: rows.jsonl}}\nstages:\n"
    (folder / "all.yaml").write_text(head + "  - sft: {sft: {chat_template_path: plain}}\n  - grpo: {rubric: [arithmetic]}\n")
    assert run("--dry-run").exit_code == 0
    (folder / "all.yaml").write_text(head + "  - sft\n  - grpo: {rubric: [arithmetic]}\n")
    assert "no chat template" in run("--dry-run").stderr


def test_sections_are_laid_over_those_of_the_recipe(folder):
    one, two = stages_of(folder, "  - sft: {data: {prompt: '{q}'}}\n  - dpo: {model: {dtype: bfloat16}, dpo: {beta: 0.2}}\n")
    assert one.recipe({}).data.prompt == "{q}"
    assert one.recipe({}).data.train == str(folder / "rows.jsonl")
    recipe = two.recipe({"sft": "/models/sft"})
    assert (recipe.model.name, recipe.model.dtype, recipe.dpo["beta"], recipe.data.prompt) == ("/models/sft", "bfloat16", 0.2, None)


def test_a_setting_goes_to_the_stages_that_have_its_section(folder):
    one, two = stages_of(folder, "  - sft: {sft: {max_steps: 1}}\n  - dpo\n", "sft.max_steps=7", "data.prompt={q}")
    assert one.recipe({}).sft["max_steps"] == 7
    assert two.recipe({}).sft == {}
    assert [stage.recipe({}).data.prompt for stage in (one, two)] == ["{q}", "{q}"]


def test_names_tell_stages_of_one_kind_apart_and_say_where_to_start(folder):
    stages = stages_of(folder, "  - sft: {name: first}\n  - sft: {name: second}\n  - dpo: {from: first}\n  - kto: {from: start}\n")
    assert [(stage.name, stage.start) for stage in stages] == [("first", "start"), ("second", "first"), ("dpo", "first"), ("kto", "start")]
    assert [stage.directory.name for stage in stages] == ["1-first", "2-second", "3-dpo", "4-kto"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("  - sft\n  - sft\n", "two are called 'sft'"),
        ("  - stf\n", "stf is no trainer; use one of .* Did you mean sft"),
        ("  - {sft: {}, dpo: {}}\n", "number 1 must be a trainer with its sections"),
        ("  - dpo: {from: sft}\n", "the stage 'dpo' needs 'sft', which is no earlier stage"),
        ("  - grpo: {rubric: ['stage:reward-model']}\n", "needs 'reward-model', which is no earlier stage"),
        ("  - sft: {sft: {max_lenght: 5}}\n", "Did you mean sft.max_length"),
        ("  - sft: {dta: {}}\n", "dta is not a setting"),
        ("  - sft: {model: {name: null, from_scratch: {}, tokenizer: {}, lora: {}}}\n", "adapters on random weights"),
    ],
)
def test_what_is_wrong_with_stages_is_said_before_any_is_trained(folder, text, sentence):
    with pytest.raises(UserError, match=sentence):
        stages_of(folder, text)


def test_a_recipe_with_stages_is_not_for_a_single_command(folder):
    result = CliRunner().invoke(app, ["sft", str(folder / "all.yaml")])
    assert result.exit_code == 2
    assert "has stages: run all of them with `posttrain run" in " ".join(result.stderr.split())
    (folder / "all.yaml").write_text(RECIPE.partition("stages:")[0])
    result = CliRunner().invoke(app, ["run", str(folder / "all.yaml")])
    assert "has no list of stages" in result.stderr


def test_the_data_of_a_stage_can_be_previewed(folder):
    result = CliRunner().invoke(app, ["data", "preview", str(folder / "all.yaml"), "--stage", "reward-model", "-n", "1"])
    assert result.exit_code == 0, result.output
    assert "chosen: ⟦1⟧" in result.output


def test_the_packaged_recipe_can_be_read():
    assert [stage.name for stage in read_stages("align", (), None)] == ["sft", "reward-model", "ppo"]


def test_what_a_stage_sets_for_its_process_is_gone_in_the_next(folder, run, monkeypatch):
    monkeypatch.delenv("HCCL_DETERMINISTIC", raising=False)
    (folder / "rewards.py").write_text(
        "import os, torch\n"
        "def length(completions):\n"
        "    assert not torch.are_deterministic_algorithms_enabled() and 'HCCL_DETERMINISTIC' not in os.environ\n"
        "    return [-len(text) / 10 for text in completions]\n"
    )
    (folder / "all.yaml").write_text(RECIPE.replace("max_steps: 3, per_device_train_batch_size: 4, use", "full_determinism: true, max_steps: 1, use"))
    result = run()
    assert result.exit_code == 0, result.output


def test_a_finished_stage_hands_on_the_same_whatever_the_process_drew(folder, run):
    """Killed at a border, before anything of the next stage was written: the process that goes on has drawn other numbers than one that trained."""
    save_base(folder)
    (folder / "all.yaml").write_text(
        f"model: {{name: {folder}/base, lora: {{r: 2, alpha: 4, dropout: 0.1}}}}\ndata: {{train: rows.jsonl}}\nstages:"
        + RECIPE.partition("stages:")[2].partition("  - reward-model")[0]
        + "  - dpo: {dpo: {max_steps: 2, save_steps: 1, per_device_train_batch_size: 2, use_cpu: true, learning_rate: 1e-2}}\n"
    )
    assert run().exit_code == 0
    whole = {path.relative_to(folder / "all"): path.read_bytes() for path in (folder / "all").rglob("*.safetensors") if "checkpoint" not in str(path)}
    assert len(whole) == 4
    for removed in ("2-dpo", "1-sft/stage.json", "1-sft/merged"):
        torch.seed()
        path = folder / "all" / removed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(folder / "all" / "2-dpo", ignore_errors=True)
        result = run("--resume")
        assert result.exit_code == 0, result.output
        assert {name: (folder / "all" / name).read_bytes() for name in whole} == whole, removed


def test_a_stage_that_kept_no_checkpoint_is_done_again_where_its_end_is_missing(folder, run):
    """A single run would not be: it is refused, since its model would be gone."""
    (folder / "all.yaml").write_text(RECIPE.partition("  - reward-model")[0].replace("sft: {max_steps: 3", "sft: {save_strategy: 'no', max_steps: 3"))
    assert run().exit_code == 0
    first = weights(folder / "all" / "1-sft")
    (folder / "all" / "1-sft" / "stage.json").unlink()
    result = run("--resume")
    assert result.exit_code == 0, result.output
    assert same(weights(folder / "all" / "1-sft"), first)
    assert (folder / "all" / "1-sft" / "stage.json").is_file()


def test_a_folder_of_stages_may_move(folder, run):
    (folder / "all.yaml").write_text(RECIPE.replace("{rubric:", "{from: sft, rubric:"))
    assert run("--train.max_steps=1").exit_code == 0
    (folder / "all").rename(folder / "moved")
    shutil.rmtree(folder / "moved" / "3-grpo")
    result = run("--resume", "--train.max_steps=1", output="moved")
    assert result.exit_code == 0, result.output
    assert result.output.count("done before") == 2
    changed = run("--resume", "--sft.max_steps=4", output="moved")
    assert "the stage 'sft' was done with another recipe" in changed.stderr


def test_a_stage_that_an_earlier_version_finished_is_done(folder):
    """Its digest held the places of folders."""
    stage = read_stages(str(folder / "all.yaml"), [], str(folder / "all"))[0]
    (stage.directory / "model").mkdir(parents=True)
    (stage.directory / "model" / "config.json").write_text("{}")
    digest = hashlib.sha256(stage.recipe({}).to_yaml().encode()).hexdigest()[:16]
    assert str(stage.directory) in stage.recipe({}).to_yaml()
    (stage.directory / "stage.json").write_text(json.dumps({"model": "model", "digest": digest}))
    assert stage.model_if_done({}) == str(stage.directory / "model")
