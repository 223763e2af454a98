"""Tiny random models of many families. Weights are drawn large enough that attention matters: at the usual 0.02 a leak would hide in rounding."""

from __future__ import annotations

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "output_router_logits": False}
SHORT_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}

FAMILIES = {
    "llama": ("Llama", SMALL),
    "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 8}),
    "qwen3 moe": ("Qwen3Moe", SMALL | MOE | {"head_dim": 8}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None}),
    "mistral short window": ("Mistral", SMALL | {"sliding_window": 5}),
    "phi3": ("Phi3", SMALL | {"sliding_window": None}),
    "gemma3": ("Gemma3", SMALL | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3 short window": ("Gemma3", SMALL | SHORT_WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "smollm3": ("SmolLM3", SMALL),
    "gpt2": ("GPT2", GPT2),
    "gpt neox": ("GPTNeoX", NEOX),
    "cohere": ("Cohere", SMALL | {"logit_scale": 0.5}),
    "granite": ("Granite", SMALL | {"logits_scaling": 3.0}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 8, "query_pre_attn_scalar": 8}),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}


@pytest.fixture
def tiny():
    """`tiny(family, **changes)` builds one, in eval mode, unhooked."""

    def build(family: str, **changes):
        name, settings = FAMILIES[family]
        config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**(settings | changes))
        torch.manual_seed(7)
        model = getattr(transformers, MODELS.get(name, f"{name}ForCausalLM"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 and name not in ("Gemma2", "Gemma3") else 0.0, 0.2)
        return model.eval()

    return build
