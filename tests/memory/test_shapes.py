"""Shapes of known models against transformers' own, built on the meta device, and against published counts."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.errors import UserError
from posttrain.memory.known import KNOWN
from posttrain.memory.shapes import find_shape, known_name, shape_of

# As their makers and the hub state them.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-nemo": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "gemma-3-1b": 999_885_952,
}
# One of each family.
FAMILIES = ("llama-3.2-1b", "qwen2.5-1.5b", "qwen3-0.6b", "mistral-7b", "phi-4", "gemma-3-1b")


def config_of(name, **changes):
    fields = dict(KNOWN[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields | changes)


def meta_model(name, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name, **changes))


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_shape_has_the_parameters_of_the_model_that_transformers_builds(name):
    layers = 6  # of each alike, so that a test takes no minutes; the number of layers is multiplied below
    config = {**KNOWN[name], "num_hidden_layers": layers}
    model = meta_model(name, num_hidden_layers=layers)
    assert shape_of(config, name).parameters == sum(parameter.numel() for parameter in model.parameters())
    shape = find_shape(name)
    of_a_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.parameters == shape_of(config, name).parameters + (shape.layers - layers) * of_a_layer


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_the_published_number_of_parameters(name):
    assert find_shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_have_the_parameters_that_peft_makes(name):
    from peft import LoraConfig, get_peft_model

    model = meta_model(name, num_hidden_layers=2)
    targets = "all-linear"
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape_of({**KNOWN[name], "num_hidden_layers": 2}, name).adapter_weights(8) == trained


def test_adapters_on_some_layers_are_counted_there_only():
    from peft import LoraConfig, get_peft_model

    model = meta_model("qwen3-0.6b", num_hidden_layers=2)
    targets = ["q_proj", "down_proj"]
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape_of({**KNOWN["qwen3-0.6b"], "num_hidden_layers": 2}, "x").adapter_weights(4, tuple(targets)) == trained


@pytest.mark.parametrize("name", ["gemma-3-1b", "gemma-3-27b", "mistral-7b-v0.1", "qwen3-8b"])
def test_windows_are_those_of_the_layers(name):
    config = config_of(name)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if config.sliding_window else "full_attention"] * config.num_hidden_layers
    assert find_shape(name).windows == tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("unsloth/Llama-3.2-3B-Instruct-bnb-4bit", "llama-3.2-3b"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-v0.1"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo"),
        ("mistralai/Mistral-Small-24B-Instruct-2501", "mistral-small-24b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("microsoft/phi-4", "phi-4"),
        ("microsoft/Phi-4-mini-instruct", None),
        ("microsoft/Phi-4-multimodal-instruct", None),
        ("Qwen/Qwen3-30B-A3B", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),
    ],
)
def test_names_on_the_hub_are_known_by_what_they_begin_with(name, key):
    assert known_name(name) == key


def test_a_config_file_and_its_directory_say_the_same(tmp_path):
    config_of("qwen3-0.6b").save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        assert find_shape(str(place)).parameters == PUBLISHED["qwen3-0.6b"]


def test_what_a_config_leaves_out_has_transformers_default(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128})
    )
    shape = find_shape(str(tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'qwen3-8b'"):
        find_shape("qwen3-8bb")


def test_an_architecture_that_is_not_modelled_is_refused_by_name():
    with pytest.raises(UserError, match="mixtral"):
        shape_of({"model_type": "mixtral"}, "a mixture")
