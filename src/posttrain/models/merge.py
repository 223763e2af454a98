"""Adapters folded into the weights, and what plain transformers loads: W + (alpha / r) B A, exact up to rounding.

The sum is computed in float32 and rounded once, when it is saved. A base that was quantised is dequantised first,
because the adapters learned against the quantised weights; it is never quantised again. Every merged model is asked
whether it still says what it said before.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import TrainingError, UserError
from posttrain.models.adapter_files import base_of, is_adapter, put_adapters
from posttrain.models.head import base_model
from posttrain.models.load import load_model, prepare_model, stop_token_ids
from posttrain.models.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_DRIFT = 1e-4  # nats a position between a model with adapters and the same merged in float32; rounding gives less than 1e-6
MOST_ROUNDING = 0.1  # between weights in float32 and in 16 bits; of usual models it is below 0.001
_ASKED = (4, 16)  # rows and tokens of that question


class Drift(NamedTuple):
    """Two models on the same tokens: how far what they say differs."""

    kl: float  # nats a position, mean; of scores: the mean of the differences
    agreeing: float  # share of positions at which the same token is the likeliest; of scores: 1

    def __str__(self) -> str:
        return f"KL {self.kl:.1e} nats a token, the likeliest token agrees at {self.agreeing:.0%} of places"


def load_trainable(name: str, *, trust_remote_code: bool = False, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """As `load_model`; from a directory of adapters the model they belong to, with the adapters on it and ready to be
    trained on."""
    if not is_adapter(name):
        return load_model(name, trust_remote_code=trust_remote_code, seed=seed, **kwargs)
    base = load_model(base_of(name), trust_remote_code=trust_remote_code, seed=seed, **kwargs)
    adapted: Any = put_adapters(base, name, is_trainable=True, seed=seed)  # not a PreTrainedModel, and used like one
    return adapted


def load_merged(name: str, *, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A model without adapters: plain ones as they are, adapters folded into theirs, in float32 and then rounded to
    `dtype`. A quantised base (keyword `quantization_config`) is dequantised."""
    if not is_adapter(name):
        return load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    base = load_model(base_of(name), dtype=torch.float32, trust_remote_code=trust_remote_code, **kwargs)
    if "quantization_config" in kwargs:
        base = base.dequantize()
    merged = merge_adapters(put_adapters(base, name, is_trainable=False))
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return merged if isinstance(wanted, str) else merged.to(wanted)  # type: ignore[arg-type]


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel (changed in place), the adapters folded into its weights, which are
    float32 then.

    Raises UserError where folding gives no finite weights, TrainingError where the merged model says something else.
    """
    model.eval()
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    said = say(model)
    was_tied = _untie(base_model(model))
    try:
        merged = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:  # PEFT's, for NaN
        raise UserError(f"the adapters cannot be merged: {error}") from error
    _settle_ties(merged, was_tied)
    prepare_model(merged)
    drift = drift_of(said, say(merged))
    if not drift.kl <= MOST_DRIFT:
        raise TrainingError(
            f"the merged model says something else than the one with adapters ({drift}), so it was not written; keep the adapters, and please report this"
        )
    return merged


@torch.no_grad()
def say(model: nn.Module) -> torch.Tensor:
    """(rows, tokens, V) log-probs of a few tokens from all over the vocabulary, or a classifier's (rows, 1, 1)
    scores."""
    base = base_model(model)
    vocabulary = vocabulary_of(base)
    rows, tokens = _ASKED
    ids = (torch.arange(rows * tokens) * 7919 % vocabulary).view(rows, tokens).to(base.device)
    if base.get_output_embeddings() is None:  # a classifier, asked row by row: its padding does not count
        return torch.stack([model(input_ids=row[None], use_cache=False).logits for row in ids]).float()
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def drift_of(before: torch.Tensor, after: torch.Tensor) -> Drift:
    """Between two answers of `say`."""
    if before.shape[-1] == 1:
        return Drift(float((before - after).abs().mean()), 1.0)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    return Drift(float(kl.clamp_min(0)), float((before.argmax(-1) == after.argmax(-1)).float().mean()))


def save_rounded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, dtype: torch.dtype) -> Drift:
    """As `save_plain`; how far rounding to `dtype` moved the model. Raises TrainingError, and writes nothing, where
    that is another model."""
    said = say(model)
    model.to(dtype)  # type: ignore[arg-type]
    drift = drift_of(said, say(model))
    if not drift.kl <= MOST_ROUNDING:
        raise TrainingError(f"rounded to {dtype} the model says something else ({drift}), so it was not written; try dtype float32")
    save_plain(model, tokenizer, directory)
    return drift


def save_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """A directory that transformers, vLLM and llama.cpp's converter read: safetensors, config, tokenizer with its chat
    template, and every stop token in generation_config.json. `dtype`: of the saved weights; the model is cast. None: as
    they are."""
    base = base_model(model)
    if dtype is not None:
        base = base.to(dtype)  # type: ignore[arg-type]
    if base.can_generate():  # a classifier has no generation config, and pads as it was trained
        stops = list(stop_token_ids(base, tokenizer))
        base.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        if base.generation_config.pad_token_id is None:
            base.generation_config.pad_token_id = tokenizer.pad_token_id
        base.config.eos_token_id, base.config.pad_token_id = (
            tokenizer.eos_token_id,
            base.generation_config.pad_token_id,
        )  # a single one, for converters
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _untie(model: PreTrainedModel) -> bool:
    """A head that is the embedding gets weights of its own: what is folded into the one must not reach the other.
    Whether it was."""
    head, embedding = (_inner(module) for module in (model.get_output_embeddings(), model.get_input_embeddings()))
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    return True


def _inner(module: Any) -> Any:
    """The layer inside PEFT's wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def _settle_ties(model: PreTrainedModel, was_tied: bool) -> None:
    """A head that was the embedding is it again if both are still equal. The config says which it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    is_tied = was_tied and torch.equal(head.weight, embedding.weight)  # type: ignore[arg-type]
    if is_tied:
        head.weight = embedding.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = is_tied
