"""The answering head leaves the model as it found it, and refuses by name what it cannot fold in."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.models.forward import logprobs
from posttrain.models.head import RESCALINGS, HeadRequest, answering
from posttrain.models.load import prepare_model

STREAM = pack([PackItem([5, 6, 7], [[8, 9], [10, 11, 12]])])
QUESTION = HeadRequest(STREAM.logit_index, STREAM.targets)


@pytest.mark.parametrize("family", ["llama tied", "gemma3 short window", "cohere", "granite", "qwen3 moe"])
def test_everything_is_put_back_after_an_exception(tiny, family):
    model = tiny(family)
    model.config.output_router_logits = family == "qwen3 moe"
    keys, config, head = list(model.state_dict()), copy.deepcopy(model.config.to_dict()), model.lm_head
    scale = getattr(model, "logit_scale", None)
    with answering(model, QUESTION):
        assert model.lm_head is not head
    with pytest.raises(RuntimeError, match="in between"), answering(model, QUESTION):
        raise RuntimeError("in between")
    assert model.lm_head is head
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert getattr(model, "logit_scale", None) == scale


def test_tied_weights_stay_tied(tiny):
    model = tiny("llama tied")
    prepare_model(model)
    logprobs(model, STREAM).logps.sum().backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == []


def test_a_head_trained_by_peft_answers_with_its_active_copy(tiny):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    prepare_model(model)
    before = logprobs(model, STREAM).logps
    copied = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        copied.weight.mul_(3.0)
    after = logprobs(model, STREAM).logps
    assert not torch.allclose(before, after, atol=1e-2)
    after.sum().backward()
    assert copied.weight.grad.any()
    with model.disable_adapter():
        assert torch.allclose(logprobs(model, STREAM).logps, before, atol=1e-6)


def test_lora_on_the_head_is_refused_by_name(tiny):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    prepare_model(model)
    with pytest.raises(UserError, match="LM head carries an adapter"):
        logprobs(model, STREAM)


def test_an_unknown_way_to_reshape_logits_is_refused_by_name(tiny):
    model = tiny("llama")
    model.config.logit_scale = 0.25
    with pytest.raises(UserError, match=r"llama models reshape their logits \(logit_scale=0.25\)"), answering(model, QUESTION):
        pass


def test_a_model_without_a_language_head_is_refused(tiny):
    with pytest.raises(UserError, match="no language-model head"), answering(tiny("llama").model, QUESTION):
        pass


def test_a_wrapper_that_is_not_known_is_refused(tiny):
    with pytest.raises(UserError, match="inside a Sequential"), answering(nn.Sequential(tiny("llama")), QUESTION):
        pass


def test_the_table_names_real_model_types():
    from transformers import CONFIG_MAPPING

    newer = {"cohere2_moe", "hyperclovax"}  # not in every supported transformers
    assert set(RESCALINGS) - newer <= set(CONFIG_MAPPING)
