"""The shapes of well-known models, as their config.json says them: a plan needs no network. Data only; `shapes.py`
reads it.

Keys are names in lower case without their owner and without what does not change the shape (-Instruct, -it, a date).
tests/memory/test_shapes.py builds each of them on the meta device and counts.
"""

from __future__ import annotations

from typing import Any

_COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def _rows(model_type: str, common: dict[str, Any], rows: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Each row: the columns above, then what it has of its own."""
    return {
        name: {"model_type": model_type, "dtype": "bfloat16", **common, **dict(zip(_COLUMNS, row, strict=False)), **dict(*row[6:])}
        for name, row in rows.items()
    }


_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_LLAMA_70B = (8192, 28672, 80, 64, 8, 128)
_QWEN_25 = {"vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False}
_SMALL_QWEN_25 = {"vocab_size": 151936, "tie_word_embeddings": True}
_QWEN_3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "attention_bias": False}
_MISTRAL = {"vocab_size": 32768, "max_position_embeddings": 32768, "tie_word_embeddings": False, "sliding_window": None}
_PHI = {"vocab_size": 100352, "max_position_embeddings": 16384, "tie_word_embeddings": False, "sliding_window": None}
_GEMMA = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
_SMALL_GEMMA = {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512}

KNOWN: dict[str, dict[str, Any]] = {
    **_rows(
        "llama",
        _LLAMA,
        {
            "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128),
            "llama-3.1-70b": _LLAMA_70B,
            "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, {"tie_word_embeddings": True}),
            "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, {"tie_word_embeddings": True}),
            "llama-3.3-70b": _LLAMA_70B,
        },
    ),
    **_rows(
        "qwen2",
        _QWEN_25,
        {
            "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, _SMALL_QWEN_25),
            "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, _SMALL_QWEN_25),
            "qwen2.5-3b": (2048, 11008, 36, 16, 2, 128, _SMALL_QWEN_25),
            "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128),
            "qwen2.5-14b": (5120, 13824, 48, 40, 8, 128),
            "qwen2.5-32b": (5120, 27648, 64, 40, 8, 128),
            "qwen2.5-72b": (8192, 29568, 80, 64, 8, 128),
        },
    ),
    **_rows(
        "qwen3",
        _QWEN_3,
        {
            "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, {"tie_word_embeddings": True}),
            "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, {"tie_word_embeddings": True}),
            "qwen3-4b": (2560, 9728, 36, 32, 8, 128, {"tie_word_embeddings": True}),
            "qwen3-8b": (4096, 12288, 36, 32, 8, 128),
            "qwen3-14b": (5120, 17408, 40, 40, 8, 128),
            "qwen3-32b": (5120, 25600, 64, 64, 8, 128),
        },
    ),
    **_rows(
        "mistral",
        _MISTRAL,
        {
            "mistral-7b": (4096, 14336, 32, 32, 8, 128),
            "mistral-7b-v0.1": (4096, 14336, 32, 32, 8, 128, {"vocab_size": 32000, "sliding_window": 4096}),
            "mistral-7b-v0.2": (4096, 14336, 32, 32, 8, 128, {"vocab_size": 32000}),
            "mistral-nemo": (5120, 14336, 40, 32, 8, 128, {"vocab_size": 131072, "max_position_embeddings": 131072}),
            "mistral-small-22b": (6144, 16384, 56, 48, 8, 128),
            "mistral-small-24b": (5120, 32768, 40, 32, 8, 128, {"vocab_size": 131072}),
        },
    ),
    **_rows("phi3", _PHI, {"phi-4": (5120, 17920, 40, 40, 10, 128)}),
    **_rows(
        "gemma3_text",
        _GEMMA,
        {
            "gemma-3-270m": (640, 2048, 18, 4, 1, 256, _SMALL_GEMMA),
            "gemma-3-1b": (1152, 6912, 26, 4, 1, 256, _SMALL_GEMMA),
            "gemma-3-4b": (2560, 10240, 34, 8, 4, 256),
            "gemma-3-12b": (3840, 15360, 48, 16, 8, 256),
            "gemma-3-27b": (5376, 21504, 62, 32, 16, 128),
        },
    ),
}

# Parts of a name behind the key that leave the shape as it is.
SAME_SHAPE = {"it", "pt", "base", "chat", "text", "bnb", "4bit", "unsloth", "qat", "bf16", "reasoning", "plus", "thinking", "distill"}
ALIASES = {"meta-llama-3.1": "llama-3.1", "mistral-nemo-base": "mistral-nemo"}
