"""Which models take streams, which fall back to padded rows by name, and that the fallback's numbers are the model's own."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Lfm2Config, Lfm2ForCausalLM

from posttrain.data.stream import PackItem, pack
from posttrain.errors import UserError
from posttrain.models.forward import logprobs, make_logprobs, padded_logprobs
from posttrain.models.load import prepare_model
from posttrain.models.support import stream_support

ITEMS = [PackItem([5, 9, 3, 7], [[21, 22, 23], [27]]), PackItem([6, 6], [[31, 32, 33, 34]])]


@pytest.mark.parametrize("family", ["llama", "qwen3 moe", "mistral short window", "gemma3 short window", "gpt2", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_models_take_streams(tiny, family, dtype):
    model = tiny(family).to(dtype)
    prepare_model(model)
    assert stream_support(model) is None
    assert make_logprobs(model) is logprobs


def own_logps(model, items):
    for item in items:
        for completion in item.completions:
            ids = torch.tensor([[*item.prompt_ids, *completion]])
            table = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            start = len(item.prompt_ids)
            yield torch.stack([table[start + col - 1, token] for col, token in enumerate(completion)])


def scrambled(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Lfm2ForCausalLM(
            Lfm2Config(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
            )
        ),
        lambda: FalconMambaForCausalLM(FalconMambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)),
    ],
    ids=["convolution", "recurrence"],
)
def test_models_with_state_fall_back_to_padded_rows_by_name(build, caplog):
    model = scrambled(build())
    prepare_model(model)
    with caplog.at_level(logging.WARNING):
        assert make_logprobs(model) is padded_logprobs
    assert "padded rows" in caplog.text
    answer = padded_logprobs(model, pack(ITEMS)).logps
    for row, expected in zip(answer, own_logps(model, ITEMS), strict=True):
        assert torch.allclose(row[: len(expected)], expected, atol=1e-5)


def test_attention_that_is_not_hooked_falls_back(tiny):
    assert "not routed" in stream_support(tiny("llama"))


def test_an_unknown_attention_keyword_falls_back_by_its_name(tiny, monkeypatch):
    model = tiny("llama")
    prepare_model(model)
    forward = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", lambda self, *args, **kwargs: forward(self, *args, s_aux=1.0, **kwargs))
    assert "s_aux" in stream_support(model)


def test_softcapped_attention_goes_in_padded_rows_with_its_softcap(tiny):
    model = tiny("gemma2", attn_logit_softcapping=0.5)
    prepare_model(model)
    assert make_logprobs(model) is padded_logprobs
    assert model.config._attn_implementation == "eager"
    for row, expected in zip(padded_logprobs(model, pack(ITEMS)).logps, own_logps(model, ITEMS), strict=True):
        assert torch.allclose(row[: len(expected)], expected, atol=1e-5)


def test_attention_dropout_in_training_falls_back(tiny):
    model = tiny("llama", attention_dropout=0.1)
    prepare_model(model)
    assert "dropout" in stream_support(model)


def test_rope_that_depends_on_the_longest_row_falls_back(tiny):
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    prepare_model(model)
    assert "dynamic RoPE" in stream_support(model)


def test_a_layout_that_leaks_is_caught_by_the_trial(tiny, monkeypatch):
    model = tiny("llama")
    prepare_model(model)
    causal = lambda self, layer_idx, q, k, v, *, scaling, window: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        q, k, v, is_causal=True, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    monkeypatch.setattr("posttrain.models.layout.TrainLayout.attend", causal)
    assert "differ from those in rows" in stream_support(model)


def test_logits_changed_behind_the_head_in_an_unknown_way_are_refused(tiny):
    model = tiny("llama")
    prepare_model(model)
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        if output.logits.shape[-1] == 61:
            output.logits = output.logits * 1.7
        return output

    model.forward = forward
    with pytest.raises(UserError, match="changes its logits after the head"):
        stream_support(model)


def test_the_trial_leaves_modes_and_random_numbers_alone(tiny):
    model = tiny("gpt2", resid_pdrop=0.3)
    prepare_model(model)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stream_support(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes


def test_a_hooked_model_still_generates_and_pads_like_sdpa(tiny):
    plain = tiny("gemma3 short window")
    hooked = copy.deepcopy(plain)
    prepare_model(hooked)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    tokens = [model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for model in (plain, hooked)]
    assert torch.equal(*tokens)
