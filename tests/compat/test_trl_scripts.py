"""Flat command lines and YAML files, as `trl METHOD` takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import build_model, build_tokenizer

from posttrain.cli.flat import is_flat
from posttrain.compat.trl.scripts import train
from posttrain.errors import UserError

ROWS = {
    "sft": [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)],
    "dpo": [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "0"} for a in range(8)],
    "grpo": [{"prompt": f"{a}+1=", "solution": str(a + 1)} for a in range(8)],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for method, rows in ROWS.items():
        for split in ("train", "test"):
            (tmp_path / method).mkdir(exist_ok=True)
            (tmp_path / method / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return tmp_path


def words(folder: Path, method: str, *more: str) -> list[str]:
    common = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / method), "--output_dir", str(folder / "out")]
    return [*common, "--max_steps", "1", "--use_cpu", "true", "--save_strategy", "no", "--per_device_train_batch_size", "4", *more]


def test_recipes_and_flat_command_lines_are_told_apart():
    assert is_flat(["grpo", "--config", "flat.yaml"])
    assert is_flat(["sft", "--dataset_name=rows", "--learning_rate", "1"])
    assert not any(map(is_flat, [[], ["grpo", "arithmetic"], ["sft", "recipe.yaml", "--model.name=a"], ["plan", "--config", "x"]]))


def test_a_flat_file_trains_and_leaves_the_model(folder):
    (folder / "flat.yaml").write_text("learning_rate: 1e-3\neval_strategy: steps\neval_steps: 1\nuse_peft: true\nlora_r: 2\n", encoding="utf-8")
    command = [sys.executable, "-m", "posttrain.cli.main", "sft", "--config", str(folder / "flat.yaml"), *words(folder, "sft")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_DATASETS_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_online_methods_take_rewards_by_name(folder, monkeypatch):
    (folder / "own_flat_rewards.py").write_text("def right(completions, solution, **_):\n    return [0.5] * len(completions)\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    own = ["--num_generations", "4", "--max_completion_length", "4", "--reward_funcs", "think_format_reward", "get_soft_overlong_punishment"]
    trainer = train("grpo", words(folder, "grpo", *own, "own_flat_rewards.right"))
    assert trainer.rubric.names == ["think_format_reward", "soft_overlong_punishment_reward", "right"]
    assert (folder / "out" / "model.safetensors").is_file()


def test_pairs_train_with_a_mixture_of_datasets(folder):
    (folder / "flat.yaml").write_text(f"datasets:\n  - {{path: {folder / 'dpo'}}}\n  - {{path: {folder / 'dpo'}, split: test}}\n", encoding="utf-8")
    trainer = train("dpo", ["--config", str(folder / "flat.yaml"), *words(folder, "dpo")])
    assert len(trainer.train_dataset) == 16


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("sft", ["--dataset_name", "x"], "which model"),
        ("sft", ["--model_name_or_path", "x"], "which data"),
        ("grpo", None, "which rewards"),
        ("sft", ["--model_name_or_path", "x", "--lerning_rate", "1"], "Did you mean 'learning_rate'"),
    ],
)
def test_what_is_missing_is_asked_for(folder, method, given, said):
    with pytest.raises(UserError, match=said):
        train(method, words(folder, method, "--num_generations", "4") if given is None else given)
