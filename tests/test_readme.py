"""What the README shows works: its Python runs (with a tiny local model in place of the large one), its recipe reads, its commands exist."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.main import get_command

from posttrain.cli.build import fill, make_rubric
from posttrain.cli.main import app
from posttrain.cli.recipe import SECTION_NAMES, read_recipe
from posttrain.data.prompts import to_tasks
from posttrain.data.sources import load_rows
from posttrain.data.tokenizer import train_bpe
from posttrain.types import Completion, Group, StopReason

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def block_with(language, text):
    return next(block for block in blocks(language) if text in block)


FIRST = block_with("python", "trainer.train()")
REWARDS = block_with("python", "@verifier")


def run(source, name):
    namespace = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)
    return namespace


@pytest.fixture
def tiny_model(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_bpe([f"What is {a} + {a}? Answer: {a}" for a in range(50)], 300)
    tokenizer.chat_template = None
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def replaced(source, changes):
    for old, new in changes.items():
        assert old in source, f"the README no longer says {old}"
        source = source.replace(old, new)
    return source


def test_its_fifteen_lines_are_fifteen():
    assert sum(bool(line.strip()) for line in FIRST.splitlines()) == 15


def test_its_fifteen_lines_train_and_the_record_can_be_read(tiny_model, tmp_path, capsys):
    changes = {
        '"Qwen/Qwen2.5-0.5B"': repr(str(tiny_model)),
        '"runs/sums': f'"{(tmp_path / "sums").as_posix()}',
        "= GRPOConfig(": "= GRPOConfig(max_steps=1, use_cpu=True, save_strategy='no', ",
        "range(50)": "range(6)",
    }
    trainer = run(replaced(FIRST, changes), "readme")["trainer"]
    assert trainer.state.global_step == 1
    assert (tmp_path / "sums" / "model" / "config.json").is_file()
    capsys.readouterr()
    reading = block_with("python", "RunReader(")
    run(replaced(reading, {'"runs/sums"': repr(str(tmp_path / "sums"))}), "readme_record")
    assert capsys.readouterr().out.count("has_number") == 16


def test_its_rewards_score_a_group():
    rubric = run(REWARDS, "readme_rewards")["rubric"]
    tasks = to_tasks([{"prompt": "What is 2 + 2?", "answer": "4"}])
    completions = [Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text) for text in ("4", " five")]
    rubric.score([Group(tasks[0], completions)])
    assert [completion.scores["exact"] for completion in completions] == [1.0, 0.0]
    assert completions[0].reward == pytest.approx(2.0 - 0.001 + 1.0)


def test_its_recipe_reads_and_its_rewards_fit_its_rows(tmp_path):
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "2 + 2", "solution": "two and two #### 4"}) + "\n")
    recipe = read_recipe(str(tmp_path / "my.yaml"))
    rubric = make_rubric(recipe)
    assert dict(zip(rubric.names, rubric.weights, strict=True)) == {"exact": 2.0, "number_detected": 1.0}
    rows = fill(load_rows(recipe.data.train), recipe.data, type("Tokenizer", (), {"chat_template": None}), rubric)
    assert rows[0]["answer"] == "4"
    from posttrain import GRPOConfig

    settings = recipe.train | {"output_dir": str(tmp_path / "run"), "use_cpu": True}
    assert GRPOConfig(**settings).prompts_per_generation == 4


def test_all_its_python_is_covered_here():
    rest = [block for block in blocks("python") if block not in (FIRST, REWARDS) and "RunReader(" not in block]
    assert len(rest) == 1
    run(rest[0], "readme_import")


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.startswith("posttrain")])
def test_each_command_it_shows_exists(line):
    _, name, *arguments = shlex.split(line.partition("#")[0])
    command = get_command(app).commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for argument in arguments:
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            assert option in known or option.removeprefix("--").partition(".")[0] in SECTION_NAMES


def test_its_measured_block_is_what_the_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("readme", None)
    import readme

    assert readme.filled(TEXT, readme.read_results()) == TEXT, "run: python benchmarks/readme.py"
    page = readme.PAGE.read_text(encoding="utf-8")
    assert readme.filled(page, readme.read_results(), readme.TABLES) == page, "run: python benchmarks/readme.py"


def test_its_measured_block_shows_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("readme", None)
    import readme

    machine = {"processor": "Some CPU", "threads": 2, "bf16_instructions": False, "versions": {"torch": "2.13.0"}, "date": "2026-01-02"}
    case = {"prompt": 250, "completion": 256, "generations": 16, "steps": 3, "precision": "bf16"}
    sides = [
        {
            "side": "posttrain",
            "date": "2026-01-01",
            "case": case,
            "steps_s": [5.0] * 3,
            "step_s": 5.0,
            "generation_s": 2.0,
            "peak_bytes": 2**28,
            "computed_in": "float32",
            "versions": {},
        },
        {
            "side": "trl",
            "case": case,
            "steps_s": [40.0] * 3,
            "step_s": 40.0,
            "generation_s": 10.0,
            "peak_bytes": 2**30,
            "computed_in": "bfloat16",
            "versions": {"trl": "1.16.0"},
        },
    ]
    exam = {"accuracy": 0.5, "interval": [0.456, 0.544], "questions": 500}
    demo = {"seed": 0, "before": exam, "after": exam | {"accuracy": 0.99, "interval": [0.977, 0.996]}, "seconds": 100.0}
    text = readme.filled(TEXT, {"grpo_vs_trl": {"hardware": machine, "runs": sides}, "demo": {"hardware": machine, "runs": [demo]}})
    assert "| 250 / 256 | 40.00 → 5.00 (8.0x) | 10.00 → 2.00 (5.0x) | 1024 → 256 (4.0x) |" in text
    assert "| 0 | 50.0 % [45.6, 54.4] | 99.0 % [97.7, 99.6] | 100 |" in text
    assert "Some CPU, 2 threads, without bf16 instructions, torch 2.13.0, 2026-01-02" in text
    assert "Nothing is claimed yet" not in text


def test_each_kind_of_result_has_its_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("readme", None)
    import readme

    machine = {"processor": "Some CPU", "threads": 2, "bf16_instructions": False, "versions": {"torch": "2.13.0"}, "date": "2026-01-02"}

    def sides(case, ours, trl):
        shared = {"case": case, "versions": {"trl": "1.16.0"}, "computed_in": "float32", "steps_s": [1.0] * 5}
        return {"hardware": machine, "text": "some.jsonl", "runs": [shared | {"side": "posttrain"} | ours, shared | {"side": "trl"} | trl]}

    pairs = {"lora": True, "pairs": 4, "prompt": 1024, "shortest": 64, "longest": 256, "steps": 3, "precision": "bf16"}
    dpo = sides(pairs, {"step_s": 2.0, "peak_bytes": 2**29}, {"step_s": 8.0, "peak_bytes": 2**30})
    dpo["float32"] = sides(pairs, {"step_s": 2.0, "peak_bytes": 2**29}, {"step_s": 5.0, "peak_bytes": 2**30})
    text = {"variant": "plain", "rows": 16, "steps": 3, "precision": "bf16"}
    sft = sides(text, {"tokens_per_second": 3000.0, "peak_bytes": 2**29}, {"tokens_per_second": 2000.0, "peak_bytes": 2**30})
    run = {
        "algorithm": "rloo",
        "seed": 1,
        "before": 0.5,
        "right": 499,
        "questions": 500,
        "seconds": 99.6,
        "processor_seconds": 88.2,
        "peak_mb_above_start": 250.2,
    }
    block = readme.block({"dpo_vs_trl": dpo, "sft_vs_trl": sft, "online_compare": {"hardware": machine, "steps": 150, "runs": [run]}})
    assert "| LoRA | 8.00 → 2.00 (4.0x) | 1024 → 512 (2.0x) |" in block
    assert "Median of 5 steps" in block
    assert "With float32 asked of both (5 steps): LoRA 2.5x faster, peak 2.0x smaller." in block
    assert "| posttrain | plain | 3,000 | 1.50 | 512 |" in block
    assert "| RLOO | 1 | 50.0% | 99.8% | 88 | 250 |" in block
