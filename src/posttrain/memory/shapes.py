"""The shape of a decoder: from a known name, a config.json, or a config as a mapping. Counts its parameters exactly;
holds no tensors.

D hidden size, F intermediate size, V vocabulary, H heads, Hkv key and value heads, d head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.errors import UserError, did_you_mean
from posttrain.memory.known import ALIASES, KNOWN, SAME_SHAPE


class Linear(NamedTuple):
    """One linear layer of a decoder layer."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


class Family(NamedTuple):
    """What models of one `model_type` have in common. Biases: of q, k, v; of o; of the MLP (None: the config says)."""

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    sandwich: bool = False  # a norm behind attention and MLP too, in float32 throughout (Gemma)
    is_fused: bool = False  # one linear for q, k, v and one for gate and up


FAMILIES = {
    "llama": Family(None, None, None),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(None, None, qk_norm=True),
    "phi3": Family(is_fused=True),
    "gemma3_text": Family(None, None, qk_norm=True, sandwich=True),
}


@dataclass(frozen=True)
class Shape:
    """What decides how much memory a model takes."""

    name: str
    model_type: str
    vocab: int  # V
    hidden: int  # D
    intermediate: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # Hkv
    head_dim: int  # d
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_positions: int | None  # None: the config does not say
    windows: tuple[int | None, ...]  # of each layer; None: it sees everything
    dtype: str = "float32"  # of the weights in the checkpoint; float32 where its config does not say

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def q(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all keys; that of all values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[Linear]:
        """Those of one layer, in the order of the forward."""
        o = Linear("o_proj", self.q, self.hidden, self.o_bias)
        down = Linear("down_proj", self.intermediate, self.hidden, self.mlp_bias)
        if self.family.is_fused:
            return [
                Linear("qkv_proj", self.hidden, self.q + 2 * self.kv),
                o,
                Linear("gate_up_proj", self.hidden, 2 * self.intermediate),
                down,
            ]
        qkv = [Linear(f"{name}_proj", self.hidden, width, self.qkv_bias) for name, width in (("q", self.q), ("k", self.kv), ("v", self.kv))]
        return [*qkv, o, *(Linear(f"{name}_proj", self.hidden, self.intermediate, self.mlp_bias) for name in ("gate", "up")), down]

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers but the head: what LoRA adapts and 4 bits hold."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def small_weights(self) -> int:
        """Norms and biases."""
        biases = sum(linear.outputs for linear in self.linears if linear.has_bias)
        norms = (4 if self.family.sandwich else 2) * self.hidden + (2 * self.head_dim if self.family.qk_norm else 0)
        return self.layers * (biases + norms) + self.hidden

    @property
    def embedding_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_weights(self) -> int:
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.small_weights + self.embedding_weights + self.head_weights

    def adapter_weights(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """LoRA on the linear layers of these names; None: on all but the head."""
        adapted = [linear for linear in self.linears if targets is None or linear.name in targets]
        return self.layers * rank * sum(linear.inputs + linear.outputs for linear in adapted)


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """From the fields of a config.json (or its text_config). Raises UserError for an architecture whose memory is not
    modelled."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    config = config.get("text_config") or config
    dtype = dtype or config.get("dtype") or config.get("torch_dtype")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"the plan does not know the architecture of {name} ({kind}); it knows {', '.join(FAMILIES)}.{did_you_mean(kind, FAMILIES)}")
    family, heads, layers = FAMILIES[kind], int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return Shape(
        name=name,
        model_type=kind,
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        tied=bool(config.get("tie_word_embeddings")),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        max_positions=config.get("max_position_embeddings"),
        windows=_windows(config, layers),
        dtype=str(dtype or "float32").removeprefix("torch."),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if kinds is None:
        period = config.get("sliding_window_pattern")
        kinds = ["sliding_attention" if period is None or (index + 1) % period else "full_attention" for index in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def known_name(name: str) -> str | None:
    """The key of a model that is known without asking anybody: `meta-llama/Llama-3.1-8B-Instruct` is llama-3.1-8b.
    None: it is not."""
    plain = name.rstrip("/").rpartition("/")[2].lower().replace("-instruct", "")
    for alias, key in ALIASES.items():
        if plain.startswith(alias):
            plain = key + plain.removeprefix(alias)
            break
    for key in sorted(KNOWN, key=len, reverse=True):
        rest = plain.removeprefix(key)
        if plain.startswith(key) and all(part in SAME_SHAPE or re.fullmatch(r"|\d+|v\d+(\.\d+)*", part) for part in rest.split("-")):
            return key
    return None


def find_shape(name: str) -> Shape:
    """The shape of a model by its name, or from a config.json or the directory that holds one. Names that are not known
    are asked for where transformers finds them (its cache, the hub). Raises UserError where there is none."""
    path = Path(name).expanduser()
    if path.exists():
        return shape_of(_read_config(str(path)), name)
    key = known_name(name)
    if key is not None:
        return shape_of(KNOWN[key], key)
    if "/" not in name:
        raise UserError(
            f"there is no model {name}: give a directory, a config.json, a name on the hub as owner/name, or one of {', '.join(KNOWN)}."
            f"{did_you_mean(name.lower(), KNOWN)}"
        )
    return shape_of(_read_config(name), name)


def _read_config(name: str) -> dict[str, Any]:
    """With transformers, which knows what a config leaves out."""
    from transformers import AutoConfig

    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(name).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {name}: {str(error).strip().splitlines()[0]}") from error
    return fields
