"""What Unsloth's notebooks call, from loading to saving."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small import build_model, build_tokenizer

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.compat.unsloth import FastLanguageModel, PatchFastRL, SamplingParams
from posttrain.errors import UserError
from posttrain.models.load import load_model


@pytest.fixture
def saved(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def loaded(saved):
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=saved, max_seq_length=64, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8, random_state=1), tokenizer


def test_importing_the_names_imports_nothing_heavy():
    code = "import sys, posttrain.compat.unsloth; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_notebook_from_loading_to_saving(loaded, tmp_path, caplog):
    PatchFastRL("GRPO", FastLanguageModel)
    model, tokenizer = loaded
    greedy = SamplingParams(temperature=0, max_tokens=6)
    before = model.fast_generate("1+1=", sampling_params=greedy)[0].outputs[0]
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), use_vllm=True, learning_rate=0.1, per_device_train_batch_size=4, num_generations=4, max_prompt_length=32,
        max_completion_length=6, max_steps=3, save_strategy="no", use_cpu=True, vllm_sampling_params=SamplingParams(min_p=0.1, top_k=-1, stop=["="]),
    )  # fmt: skip
    assert (args.min_p, args.top_k, args.sampling(()).stop_strings) == (0.1, 0, ("=",))
    rewards = [lambda completions, **_: [float(text.count("1")) for text in completions]]
    GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=rewards, args=args, train_dataset=[{"prompt": "1+1="}]).train()
    model.save_lora(str(tmp_path / "lora"))
    request = model.load_lora(str(tmp_path / "lora"))
    trained = model.fast_generate(["1+1=", "2+2="], sampling_params=greedy, lora_request=request)
    assert [answer.prompt for answer in trained] == ["1+1=", "2+2="]
    assert model.fast_generate("1+1=", sampling_params=greedy, lora_request=None)[0].outputs[0].token_ids == before.token_ids, "adapters are off"
    assert trained[0].outputs[0].token_ids != before.token_ids, "adapters are on"
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method="merged_16bit")
    model.save_pretrained_merged(str(tmp_path / "adapters"), tokenizer, save_method="lora")
    assert load_model(str(tmp_path / "merged"), dtype="auto").dtype == torch.bfloat16
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


def test_saved_adapters_leave_the_model_as_it_was(loaded, tmp_path):
    model, _ = loaded
    model.save_lora(str(tmp_path / "lora"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    held = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.fast_generate("1+", sampling_params=SamplingParams(max_tokens=2), lora_request=model.load_lora(str(tmp_path / "lora")))
    assert all(torch.equal(held[name], weight) for name, weight in model.state_dict().items())


def test_adapters_that_were_saved_are_loaded_again(loaded, tmp_path):
    loaded[0].save_lora(str(tmp_path / "lora"))
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), load_in_4bit=False)
    assert hasattr(model, "peft_config")


def test_what_has_nothing_to_set_is_said_and_the_unknown_refused(saved, caplog):
    model, _ = FastLanguageModel.from_pretrained(saved, load_in_4bit=False, fast_inference=True, max_lora_rank=32, gpu_memory_utilization=0.6)
    assert "fast_inference=True, max_lora_rank=32, gpu_memory_utilization=0.6: nothing to set here" in caplog.text
    with pytest.raises(UserError, match="rank is not known here"):
        FastLanguageModel.get_peft_model(model, rank=4)
    with pytest.raises(UserError, match="no adapters to save"):
        model.save_lora("x")
    with pytest.raises(UserError, match=r"llama\.cpp"):
        model.save_pretrained_gguf("x", None, quantization_method="q4_k_m")
