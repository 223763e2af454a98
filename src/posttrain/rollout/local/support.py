"""What the local engine cannot do, said in a sentence before (or at) the first token. Nothing here computes."""

from __future__ import annotations

import sys
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.ops import attention
from posttrain.types import Request

_WAY_OUT = "use the hf engine for this model"
_MOVING_ROPE = {"dynamic", "longrope"}  # their frequencies depend on the longest position in the call


def prepare(model: torch.nn.Module) -> Any:
    """Route `model`'s attention through the hook if nobody has; return its text config. Raises UserError for a model
    that cannot be served."""
    base: Any = _without_peft(model)
    name = type(base).__name__
    config = base.config.get_text_config()
    moving = sorted(_rope_types(config.to_dict().get("rope_parameters")) & _MOVING_ROPE)
    if moving:
        raise UserError(
            f"{name} uses {moving[0]!r} RoPE, whose frequencies depend on the longest position in a call: "
            f"rows decoded together, and keys cached earlier, would change each other; {_WAY_OUT}"
        )
    if not base._supports_attention_backend:
        raise UserError(
            f"{name} does not let transformers choose its attention function (or has none), so completions cannot share a prompt; {_WAY_OUT}"
        )
    if base.config._attn_implementation != attention.NAME:
        attention.install(base)
    return config


def _without_peft(model: torch.nn.Module) -> torch.nn.Module:
    peft = sys.modules.get("peft")  # whoever made a PeftModel has imported it
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def _rope_types(parameters: dict[str, Any] | None) -> set[str]:
    """Of a flat `rope_parameters`, or of one with an entry for each type of layer."""
    if not parameters:
        return set()
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {rope_type for nested in parameters.values() if isinstance(nested, dict) for rope_type in _rope_types(nested)}


def check_context(request: Request, config: Any) -> None:
    if not request.prompt_ids:
        raise UserError(f"the prompt of request {request.id} has no tokens; a completion needs at least one to continue (a BOS token will do)")
    needed = len(request.prompt_ids) + request.sampling.max_new_tokens
    if needed > config.max_position_embeddings:
        raise UserError(
            f"a prompt of {len(request.prompt_ids)} tokens and max_new_tokens={request.sampling.max_new_tokens} need {needed} positions, "
            f"but the model's context has {config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
        )


def check_layers(model: torch.nn.Module, config: Any, attended: set[int]) -> None:
    if len(attended) != config.num_hidden_layers:
        raise UserError(
            f"only {len(attended)} of the {config.num_hidden_layers} layers of {type(_without_peft(model)).__name__} attend through the layout "
            f"(the others may be recurrent or convolutional): their state cannot be shared by completions; {_WAY_OUT}"
        )
