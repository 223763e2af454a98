"""LoRA's precision, and a reference that is really the reference."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.models.adapters import add_lora, reference_for
from posttrain.models.forward import logprobs
from posttrain.models.load import prepare_model
from posttrain.ops.attention import NAME

STREAM = pack([PackItem([5, 6, 7], [[8, 9], [10]])])
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture
def plain(tiny):
    model = tiny("llama")
    prepare_model(model)
    return model


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_stated_precision(plain, base, dtype):
    adapted = add_lora(plain.to(base), LoraConfig(**LORA), dtype=dtype)
    for name, parameter in adapted.named_parameters():
        assert parameter.dtype == (dtype if "lora_" in name else base)
        assert parameter.requires_grad == ("lora_" in name)


def test_other_adapters_and_second_adapters_are_refused_by_name(plain):
    with pytest.raises(UserError, match="PrefixTuningConfig; only LoRA"):
        add_lora(plain, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="already has adapters"):
        add_lora(add_lora(plain, LoraConfig(**LORA)), LoraConfig(**LORA))


def test_no_reference_is_made_when_none_is_needed(plain):
    assert reference_for(plain, needed=False) is None


def check_that_the_reference_stays(adapted, logps):
    """Training moves the policy; the reference says `logps` before and after, and leaves the policy as it is."""
    reference = reference_for(adapted, needed=True)
    move(adapted)
    policy = logprobs(adapted, STREAM).logps
    assert not torch.allclose(policy, logps, atol=1e-2)
    with reference.active() as module:
        assert torch.equal(logprobs(module, STREAM).logps, logps)
    assert torch.equal(logprobs(adapted, STREAM).logps, policy)


@torch.no_grad()
def test_the_reference_of_new_adapters_is_the_base_model_also_after_training(plain):
    base = logprobs(plain, STREAM).logps
    adapted = add_lora(
        plain, LoraConfig(**LORA | {"init_lora_weights": True, "target_modules": ["q_proj", "embed_tokens"]}, modules_to_save=["lm_head"])
    )
    check_that_the_reference_stays(adapted, base)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"init_lora_weights": True, "bias": "all"}, {"init_lora_weights": True, "modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=["trained", "biases", "a trained head", "pissa"],
)
def test_the_reference_of_adapters_that_had_learned_something_is_the_model_as_it_was(tiny, changes):
    """The start of DPO behind SFT with the same adapters: the reference is what SFT made, not the base model."""
    plain = tiny("gpt neox" if "bias" in changes else "llama")  # the latter has no biases
    prepare_model(plain)
    targets = ["query_key_value"] if "bias" in changes else ["q_proj", "v_proj"]
    adapted = add_lora(plain, LoraConfig(**LORA | changes | {"target_modules": targets}))
    if "modules_to_save" in changes:
        move(adapted)
    start = logprobs(adapted, STREAM).logps
    check_that_the_reference_stays(adapted, start)


@torch.no_grad()
def test_what_autocast_remembers_of_the_policy_is_not_taken_for_the_reference(plain):
    adapted = add_lora(plain, LoraConfig(**LORA))
    reference = reference_for(adapted, needed=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = logprobs(adapted, STREAM).logps
    move(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy = logprobs(adapted, STREAM).logps
        with reference.active() as module:
            assert torch.equal(logprobs(module, STREAM).logps, start)
        assert torch.equal(logprobs(adapted, STREAM).logps, policy)


def move(adapted):
    """As an optimizer would."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4)


@pytest.mark.parametrize("initial", [True, False], ids=["new", "trained"])
def test_adapters_come_back_after_an_exception_and_still_train(plain, initial):
    adapted = add_lora(plain, LoraConfig(**LORA | {"init_lora_weights": initial}, modules_to_save=["lm_head"]))
    policy = logprobs(adapted, STREAM).logps
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    reference = reference_for(adapted, needed=True)
    with pytest.raises(RuntimeError, match="in between"), reference.active():
        raise RuntimeError("in between")
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logprobs(adapted, STREAM).logps, policy)


def test_a_reference_pass_between_forward_and_backward_loses_no_gradient(plain):
    adapted = add_lora(plain, LoraConfig(**LORA))
    logprobs(adapted, STREAM).logps.sum().backward()
    alone = {name: parameter.grad.clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapted.zero_grad()
    total = logprobs(adapted, STREAM).logps.sum()
    with reference_for(adapted, needed=True).active() as module, torch.no_grad():
        logprobs(module, STREAM)
    total.backward()
    for name, parameter in adapted.named_parameters():
        if name in alone:
            assert torch.equal(parameter.grad, alone[name])


@torch.no_grad()
def test_a_frozen_copy_stays_while_the_policy_moves(plain):
    before = logprobs(plain, STREAM).logps
    reference = reference_for(plain, needed=True)
    plain.lm_head.weight.mul_(2.0)
    with reference.active() as module:
        assert module is not plain
        assert module.config._attn_implementation == NAME
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert torch.equal(logprobs(module, STREAM).logps, before)


@torch.no_grad()
def test_sync_moves_a_frozen_copy_by_alpha_and_is_refused_for_lora(plain):
    reference = reference_for(plain, needed=True)
    old = [parameter.clone() for parameter in plain.parameters()]
    for parameter in plain.parameters():
        parameter.add_(1.0)
    reference.sync(plain, alpha=0.25)
    for ours, start in zip(reference.frozen.parameters(), old, strict=True):
        assert torch.allclose(ours, start + 0.25, atol=1e-6)
    with pytest.raises(UserError, match="sync_ref_model needs a frozen copy"):
        reference_for(add_lora(plain, LoraConfig(**LORA)), needed=True).sync(plain, alpha=0.5)
