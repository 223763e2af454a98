"""Models and tokenizers by name: safetensors only, no remote code unless asked, attention hooked. What cannot work is
refused in a sentence.

Weights come in float32 by default: they are the masters that an optimizer updates; bf16 is autocast's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.models.adapter_files import base_of, is_adapter
from posttrain.models.head import base_model
from posttrain.models.quantise import keep_packing
from posttrain.models.seeding import seeded
from posttrain.ops.attention import install

logger = logging.getLogger(__name__)

_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config")
# Keywords of from_pretrained under their former names. A default of ours would stand beside the old name and win.
_NEW_NAMES = {"torch_dtype": "dtype", "use_auth_token": "token"}
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")  # which files: the config's too
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_KERNELS = ("use_kernels", "kernel_config", "allow_all_kernels")  # of transformers: code from the hub


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    seed: int = 0,
    auto: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model (or what the Auto class `auto` makes) from a directory or the hub, ready for streams.
    `kwargs` go to `from_pretrained`.

    seed: of weights that the checkpoint lacks, which transformers draws.

    Raises UserError for a path that does not exist, weights that are not safetensors, and encoder-decoder, vision and
    audio models.
    """
    check_exists(name)
    kwargs = with_new_names(kwargs)
    dtype = kwargs.pop("dtype", dtype)
    if not kwargs.pop("use_safetensors", True):
        raise UserError(
            f"use_safetensors=False: weights are read as safetensors only, and '{name}' would be unpickled; convert it to safetensors first"
        )
    config = kwargs.pop("config", None)
    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    with explained(f"the model '{name}'"):
        config = config if config is not None else AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
    _check_kind(name, config)
    _refuse_kernels(name, config, kwargs)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True, "attn_implementation": None} | kwargs
    with explained(f"the model '{name}'"), seeded(seed):
        model = auto.from_pretrained(name, config=config, **options)
    prepare_model(model)
    return model


def with_new_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of from_pretrained under the names that transformers has for them now. Raises UserError where both names
    say different things."""
    renamed = {name: value for name, value in given.items() if name not in _NEW_NAMES and (name, value) != ("dtype", None)}
    for old, new in _NEW_NAMES.items():
        if given.get(old) is None:
            continue
        if renamed.get(new, given[old]) != given[old]:
            raise UserError(f"{old}={given[old]!r} and {new}={renamed[new]!r} are one setting with two values; leave {old} out")
        renamed[new] = given[old]
    return renamed


def _refuse_kernels(name: str, config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """No code comes from the hub. What a caller asks for is refused; what a config names is not used, since attention
    is computed here anyway."""
    if asked := [key for key in _KERNELS if kwargs.get(key)]:
        raise UserError(f"{asked[0]}: kernels of the hub are code that is downloaded, which is never done; leave it out")
    given = kwargs.pop("attn_implementation", None)
    if isinstance(given, str) and "/" in given:
        raise UserError(f"attn_implementation={given!r} names code on the hub, which is never downloaded; leave it out: attention is posttrain's own")
    if given not in (None, "sdpa", "eager"):
        logger.warning("attn_implementation=%r is not used: attention is posttrain's own", given)
    named = config._attn_implementation
    if isinstance(named, str) and "/" in named:
        logger.warning("the config of '%s' names the attention kernel %r, which is code on the hub: it is not loaded, and not needed", name, named)


def prepare_model(model: nn.Module) -> None:
    """Check and hook a model that is already built, inside PEFT or not. Ordinary calls and `generate` stay what they
    were.

    A model whose attention sdpa cannot compute is left to its own, in eager mode; `stream_support` then says that it
    goes in padded rows.
    """
    base = base_model(model)
    _check_kind(type(base).__name__, base.config)
    keep_packing(base)
    if base._supports_sdpa and getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is None:
        install(base)
    else:
        base.set_attn_implementation("eager")


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: modules, and the numbers that some layers hand to attention or to a function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or for adapters that have none beside them their model's. Without a padding token
    it pads with EOS, which is safe: padding is masked by length, never by its id."""
    check_exists(name)
    if is_adapter(name) and not any((Path(name) / file).is_file() for file in _TOKENIZERS):
        name = base_of(name)
    with explained(f"a tokenizer from '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the generation config's, which may be several, and the tokenizer's EOS."""
    base = base_model(model)
    source = base.generation_config if base.can_generate() else base.config.get_text_config()  # a classifier has no generation config
    listed = getattr(source, "eos_token_id", None)  # None: there is no generation config, or no EOS in it
    ids = [*(listed if isinstance(listed, (list, tuple)) else [listed]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(id) for id in ids if id is not None))


def context_length(model: nn.Module) -> int | None:
    """Most positions the model was made for; None if its config does not say."""
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


def check_exists(name: str) -> None:
    """A hub name is `name` or `owner/name`; everything else was meant as a path."""
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_a_path and not Path(name).is_dir():
        raise UserError(f"there is no model directory '{name}'; give a directory with config.json and safetensors, or a name on the hub")


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise UserError(f"'{name}' is an encoder-decoder model ({config.model_type}); only decoder-only language models are built in")
    other = [key for key in _OTHER_INPUTS if getattr(config, key, None) is not None]
    if other:
        raise UserError(f"'{name}' takes more than text ({config.model_type} has a {other[0]}); load its text model on its own")


def is_quantised(model: nn.Module) -> bool:
    """Whether weights of `model` are packed, by this load or in its checkpoint."""
    return any(parameter.dtype in (torch.uint8, torch.int8) for parameter in model.parameters())


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Libraries' complaints about files, in their first line. Of a damaged tokenizer.json the tokenizers library raises
    a bare Exception."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (isinstance(error, (OSError, ValueError, SafetensorError)) or type(error) is Exception):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load {what}: {said[0]}") from error
