"""Tiny random models of every family the engine is promised for, and the ways to ask them."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from posttrain.types import Request, RequestOutput, Sampling

VOCABULARY = 300
_SHAPE = {
    "vocab_size": VOCABULARY,
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
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**_SHAPE, **_MOE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=6),
    "phi3": lambda: transformers.Phi3Config(**_SHAPE, sliding_window=None),
    "gemma3-window": lambda: transformers.Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 6}, head_dim=16, sliding_window=5, query_pre_attn_scalar=16
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_SHAPE),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}, rotary_pct=0.5),
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def tiny():
    """tiny(name): a random model in training mode whose distributions are far from uniform."""

    def build(name="qwen3", seed=0):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        return model.train()

    return build


@pytest.fixture
def prompts():
    """Six prompts of lengths 3 to 19, two of them equal."""
    generator = torch.Generator().manual_seed(1)
    drawn = [tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in (3, 19, 7, 12, 8)]
    return [*drawn, drawn[0]]


@pytest.fixture
def complete():
    """complete(engine, model, requests): completions by request id, and the number of steps."""

    def run(engine, model, requests) -> tuple[dict[int, RequestOutput], int]:
        done: dict[int, RequestOutput] = {}
        steps = 0
        with engine.serving(model, version=7):
            for request in requests:
                engine.submit(request)
            while len(done) < len(requests):
                done.update((completion.request_id, completion) for completion in engine.step())
                steps += 1
        return done, steps

    return run


@pytest.fixture
def requests_for():
    """requests_for(prompts, **sampling): one request for each prompt, keyed by its position."""

    def build(prompts, **sampling) -> list[Request]:
        sampling = {"max_new_tokens": 12, **sampling}
        return [Request(i, prompt, Sampling(**sampling), key=(0, 0, i, 0, 0)) for i, prompt in enumerate(prompts)]

    return build
