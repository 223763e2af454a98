"""Loading by path: what works, and a sentence for what does not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, PreTrainedTokenizerFast, T5Config

from posttrain.errors import UserError
from posttrain.models.load import context_length, load_model, load_tokenizer, prepare_model, stop_token_ids, without_dropout
from posttrain.ops.attention import NAME
from posttrain.policy import load_policy


@pytest.fixture
def directory(tiny, tmp_path):
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_comes_back_hooked_in_float32(directory, tiny):
    model = load_model(str(directory))
    assert model.config._attn_implementation == NAME
    assert model.dtype == torch.float32
    for ours, saved in zip(model.parameters(), tiny("llama").parameters(), strict=True):
        assert torch.equal(ours, saved)
    assert load_model(str(directory), dtype="bfloat16").dtype == torch.bfloat16


def test_a_path_that_does_not_exist_is_a_sentence(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="there is no model directory"):
            load(str(tmp_path / "nowhere"))


def test_a_directory_without_safetensors_is_a_sentence(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load the model .*safetensors"):
        load_model(str(directory))


def test_an_empty_directory_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("config", "reason"), [(T5Config(), "encoder-decoder"), (LlavaConfig(), "takes more than text")])
def test_other_kinds_of_model_are_refused_by_name(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{reason}.*{config.model_type}|{reason}.*\\({config.model_type}"):
        load_model(str(tmp_path))


def test_stop_tokens_are_all_of_the_generation_config_and_the_tokenizers(directory):
    model, tokenizer = load_model(str(directory)), load_tokenizer(str(directory))
    assert stop_token_ids(model, tokenizer) == (2, 9, 1)


def test_a_missing_padding_token_becomes_eos(directory):
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("family", "dropout"),
    [("qwen2", {"attention_dropout": 0.5}), ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5}), ("gpt neox", {"attention_dropout": 0.5})],
)
def test_no_dropout_is_left_where_none_is_wanted(tiny, family, dropout):
    model = tiny(family, **dropout).train()
    prepare_model(model)
    ids = torch.arange(1, 13)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_context_length_is_the_configs(directory):
    assert context_length(load_model(str(directory))) == 128


def test_a_policy_is_a_model_with_its_tokenizer_and_adapters(directory):
    model, tokenizer = load_policy(str(directory), lora=LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    assert model.get_base_model().config._attn_implementation == NAME
    assert tokenizer.eos_token == "<eos>"


def test_four_bits_without_adapters_or_bitsandbytes_are_refused(directory, monkeypatch):
    with pytest.raises(UserError, match="only adapters"):
        load_policy(str(directory), load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        load_policy(str(directory), lora=LoraConfig(r=2), load_in_4bit=True)


def test_a_model_that_is_already_built_is_hooked_inside_its_adapters(tiny):
    from posttrain.models.adapters import add_lora

    adapted = add_lora(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    prepare_model(adapted)
    assert adapted.get_base_model().config._attn_implementation == NAME
