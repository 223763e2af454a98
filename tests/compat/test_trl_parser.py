"""TRL's parser and the dataclasses of its scripts: the same names and defaults, YAML below the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain.compat.trl import (
    DatasetConfig,
    DatasetMixtureConfig,
    GRPOConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from posttrain.errors import UserError

TYPES = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_importing_the_names_imports_nothing_heavy():
    code = "import sys, posttrain.compat.trl as trl; trl.ModelConfig(); assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_overrides_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_SWITCH", raising=False)
    file = write(
        tmp_path / "flat.yaml",
        "env: {SOME_SWITCH: 3}\nmodel_name_or_path: a\ndataset_name: rows\nlearning_rate: 1e-4\nuse_peft: true\nlora_target_modules: [all-linear]\n"
        "use_cpu: true\nreport_to: none\ngradient_checkpointing_kwargs: {use_reentrant: false}\ndatasets: [{path: b, columns: [text]}]\n",
    )
    given = ["--config", file, "--learning_rate", "3e-4", "--lora_r", "8", "--output_dir", str(tmp_path)]
    script, training, model, mixture = TrlParser(TYPES).parse_args_and_config(given)
    assert (script.dataset_name, model.model_name_or_path, training.learning_rate) == ("rows", "a", 3e-4)
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (True, 8, "all-linear")
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert mixture.datasets == [DatasetConfig("b", columns=["text"])]
    assert os.environ.pop("SOME_SWITCH") == "3"


def test_what_nothing_knows_is_refused_or_handed_back(tmp_path):
    file = write(tmp_path / "flat.yaml", "lerning_rate: 1e-4\n")
    with pytest.raises(UserError, match=r"lerning_rate is not known to ScriptArguments, .*Did you mean 'learning_rate'"):
        TrlParser(TYPES).parse_args_and_config(["--config", file])
    with pytest.raises(UserError, match="--lora_rank=3 is not known"):
        TrlParser(TYPES).parse_args_and_config(["--lora_rank=3"])
    with pytest.raises(UserError, match="cannot be read"):
        TrlParser(TYPES).parse_args_and_config(["--config", str(tmp_path / "none.yaml")])
    parser = TrlParser(ModelConfig)
    assert parser.parse_args_and_config(["--config", file, "--x", "1"], return_remaining_strings=True)[1:] == (
        ["--lerning_rate", "1e-4", "--x", "1"],
    )
    both = parser.parse_args_and_config(["--config", file, "--x"], return_remaining_strings=True, separate_remaining_strings=True)
    assert both[1:] == (["--lerning_rate", "1e-4"], ["--x"])
    assert len(parser.parse_args_and_config(["--config", file], fail_with_unknown_args=False)) == 1


def test_a_required_field_may_stand_in_the_file(tmp_path):
    @dataclass
    class Own:
        number: int
        text: str = "alpha"

    parser = TrlParser(dataclass_types=[Own])
    assert parser.parse_args_and_config(["--config", write(tmp_path / "a.yaml", "number: 23\n")]) == (Own(23),)
    assert parser.parse_args_and_config(["--number", "5", "--text", "beta"]) == (Own(5, "beta"),)

    @dataclass
    class Taken:
        config: str = ""

    with pytest.raises(UserError, match="has a field named 'config'"):
        TrlParser(Taken)


def test_settings_without_a_field_reach_the_config(tmp_path):
    file = write(tmp_path / "flat.yaml", "vllm_mode: colocate\nuse_cpu: true\n")
    (training,) = TrlParser(GRPOConfig).parse_args_and_config(["--config", file, "--output_dir", str(tmp_path), "--repetition_penalty", "1.0"])
    assert training.num_generations == 8
    with pytest.raises(UserError, match="repetition_penalty"):
        TrlParser(GRPOConfig).parse_args_and_config(["--repetition_penalty", "1.2"])


def test_every_name_is_there():
    from posttrain.compat import trl

    assert all(getattr(trl, name) is not None or name == "get_kbit_device_map" for name in dir(trl))
    assert trl.is_conversational_from_value({"conversations": [{"from": "user", "value": "hi"}]})
    assert not trl.is_conversational_from_value({"conversations": [{"role": "user", "content": "hi"}]})
    assert not trl.is_conversational_from_value({"conversations": "not a list"})
    with pytest.raises(AttributeError, match="has no attribute 'NotThere'"):
        _ = trl.NotThere


def test_adapters_and_quantisation_are_made_from_the_arguments():
    assert get_peft_config(ModelConfig()) is None
    assert get_quantization_config(ModelConfig()) is None
    made = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"], lora_task_type="SEQ_CLS"))
    assert made is not None
    assert (made.r, made.lora_alpha, made.lora_dropout, made.task_type) == (4, 8, 0.05, "SEQ_CLS")
    assert made.target_modules == {"q_proj", "v_proj"}
    assert get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["q_proj"])).target_modules == {"q_proj"}
    packed = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16", use_bnb_nested_quant=True))
    assert packed is not None
    assert (packed.load_in_4bit, packed.bnb_4bit_quant_type, packed.bnb_4bit_use_double_quant) == (True, "nf4", True)
    with pytest.raises(UserError, match="contradict each other"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)


def test_a_mixture_joins_datasets_by_their_fractions(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, count in (("a", 8), ("b", 30)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{name}{number}", "other": number}) for number in range(count)]
        write(tmp_path / name / "train.jsonl", "\n".join(lines) + "\n")
    parts = [DatasetConfig(str(tmp_path / name), columns=["text"]) for name in "ab"]
    whole = get_dataset(DatasetMixtureConfig(datasets=parts))["train"]
    assert whole["text"][:9] == [*(f"a{number}" for number in range(8)), "b0"]
    assert len(whole) == 38
    assert whole.column_names == ["text"]
    split = get_dataset(DatasetMixtureConfig(datasets=parts, test_split_size=0.5))
    assert [len(split[name]) for name in ("train", "test")] == [19, 19]
    parts[0].fraction, parts[1].fraction = 1, 3
    assert len(get_dataset(DatasetMixtureConfig(datasets=parts))["train"]) == 32
    parts[0].fraction = None
    with pytest.raises(UserError, match="for every dataset of the mixture or for none"):
        get_dataset(DatasetMixtureConfig(datasets=parts))
    with pytest.raises(UserError, match="names no dataset"):
        get_dataset(DatasetMixtureConfig())
    with pytest.raises(UserError, match="is no dataset"):
        DatasetMixtureConfig(datasets=[{"pth": "x"}])
