import logging

import pytest
import torch
from peft import LoraConfig

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.models.adapters import add_lora
from posttrain.models.forward import make_logprobs
from posttrain.models.load import prepare_model
from posttrain.models.tiles import check_tiles, places, tiled

ITEMS = [PackItem([3, 4, 5, 6], [[7, 8, 9], [10, 11], [12, 13, 14, 15]]), PackItem([5, 9], [[4, 4, 4]])]
FAMILIES = ["llama", "qwen3", "qwen3 moe", "mistral short window", "phi3", "gemma3 short window", "gpt2", "gpt neox", "cohere"]


def gradients(model, logprobs):
    out = logprobs(model, pack(ITEMS))
    weights = torch.linspace(-1, 1, out.logps.numel()).view_as(out.logps)
    (out.logps * weights).sum().backward()
    found = {name.replace(".module", ""): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.logps.detach(), found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_of_a_tiled_model_are_its_own(tiny, family, checkpointed):
    model = tiny(family).train()
    prepare_model(model)
    logprobs = make_logprobs(model)
    expected, expected_grads = gradients(model, logprobs)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with tiled(model, 3):
        logps, grads = gradients(model, logprobs)
    assert torch.allclose(logps, expected, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-4, atol=1e-4 * float(expected_grads[name].abs().max())), name


def test_norms_mlps_and_projections_are_tiled(tiny):
    model = tiny("qwen3")
    names = {module: name for name, module in model.named_modules()}
    found = {f"{names[parent]}.{name}" for parent, name in places(model)}
    layer = {"input_layernorm", "post_attention_layernorm", "mlp"} | {
        f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    assert found == {f"model.layers.{i}.{part}" for i in range(2) for part in layer} | {"model.norm"}


def test_adapters_are_tiled_with_what_they_adapt(tiny):
    model = add_lora(tiny("llama"), LoraConfig(r=2, target_modules="all-linear"))
    prepare_model(model)
    logprobs = make_logprobs(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, expected_grads = gradients(model, logprobs)
    with tiled(model, 4):
        logps, grads = gradients(model, logprobs)
    assert len(grads) == 2 * 2 * 7
    assert torch.allclose(logps, expected, atol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-4, atol=1e-4 * float(expected_grads[name].abs().max())), name


def test_everything_is_put_back_after_an_error(tiny):
    model = tiny("llama")
    before = dict(model.named_modules())

    def fail():
        with tiled(model, 3):
            assert dict(model.named_modules()) != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert dict(model.named_modules()) == before


def test_mixtures_of_experts_are_left_alone_and_named(tiny, caplog):
    model = tiny("qwen3 moe")
    with caplog.at_level(logging.WARNING):
        check_tiles(model)
    assert "Qwen3MoeSparseMoeBlock mixes experts" in caplog.text
    assert not any(name == "mlp" for _, name in places(model))


def test_a_model_without_known_layers_is_refused(tiny):
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="tile_rows: LlamaForCausalLM has no layers"):
        check_tiles(model)
    check_tiles(model, strict=False)
